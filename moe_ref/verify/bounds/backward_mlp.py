"""One expert backward with the error of all it makes: gradients of its parameters, and what each rank adds to sums.

    values    as in moe_ref.oracle.backward.mlp
    orders    the routing weight may join the gradient of the rows before the product with w2, or after it; its own
              gradient may be a sum over the output, grad . row, or over the activation, act . grad_act: the wider
    weights   the error of a routing weight is shared by a whole row: its variance does not go through products element
              by element, but is put on what comes out of them
    8 bits    where products round their operands, what they multiply is the contract's: a weight joins where it does
              forward, its own gradient is of that product, and gate and up are one row or two
"""

from dataclasses import dataclass, replace

import torch

from moe_ref.contract.parallel import Range
from moe_ref.contract.spec import MLP
from moe_ref.contract.vocabulary import Stage
from moe_ref.contract.weights import ExpertWeights
from moe_ref.verify.bounds.activation import activation, up_factor
from moe_ref.verify.bounds.backward_steps import BackwardSteps, spread
from moe_ref.verify.bounds.rows import Rows, exact, joined_columns
from moe_ref.verify.bounds.slopes import activation_slope, factor_slope


@dataclass(frozen=True)
class Cut:
    """One rank's part: columns of the activation that its w13 makes, those that its w2 takes, and outputs of w2."""

    columns: Range
    inner: Range
    outputs: Range


@dataclass(frozen=True)
class MLPRows:
    """Rows that pass one expert: their tokens (R, H), the gradient of what they add to the sum (R, H), both exact.

    weight: (R, 1), of the rows, or of the tokens with on_input, or of the activation with in_act; blocks: (R, S), of
    equal blocks of the activation.
    """

    x_RH: torch.Tensor
    grad_RH: torch.Tensor
    weight: Rows | None = None
    on_input: bool = False
    blocks: Rows | None = None
    in_act: bool = False

    @classmethod
    def routed(cls, back: BackwardSteps, x_RH: torch.Tensor, grad_RH: torch.Tensor, weight: Rows) -> "MLPRows":
        """Rows of a routed expert; where products round their operands a weight is one of what it is declared to be."""
        in_act = back.rule is not None and back.steps.act_weight(weight) is not None
        return cls(x_RH, grad_RH, weight, back.steps.on_input, in_act=in_act)

    @property
    def of_columns(self) -> Rows | None:
        """Weights of blocks of the activation, or of all of it."""
        return self.weight if self.in_act else self.blocks

    @property
    def of_output(self) -> Rows | None:
        """Weights of what the second product makes."""
        return None if self.on_input or self.in_act else self.weight


@dataclass(frozen=True)
class RankPart:
    """What one rank adds to the gradients of tokens, an addend per projection, and of weights, row by row."""

    x: list[Rows]
    weights: Rows | None


@dataclass(frozen=True)
class _Passed:
    """What rows leave behind on their way back: what products took, and the gradients of what came out of them.

    relative: variance of the weights, shared by whole rows. grads: of gate and up without the former.
    """

    tokens: Rows
    act: Rows
    taken: Rows
    grad_taken: Rows
    complete_down: Rows
    grads: list[Rows]
    relative: torch.Tensor | None


@dataclass(frozen=True)
class MLPGradients:
    """Of the parameters, in the order of ExpertWeights and before their last store; every rank's part of the rest."""

    parameters: tuple[Rows, Rows, Rows | None, Rows | None]
    parts: list[RankPart]


class MLPBackward:
    """One expert with its cuts, a cut per rank that shares it."""

    def __init__(self, back: BackwardSteps, expert: ExpertWeights, mlp: MLP, cuts: list[Cut]) -> None:
        self.back, self.steps, self.expert, self.mlp, self.cuts = back, back.steps, expert, mlp, cuts
        self.w13_GIH, self.w2_HI = expert.w13_GIH.double(), expert.w2_HI.double()
        self.by_output = any(cut.outputs != (0, len(self.w2_HI)) for cut in cuts)

    def run(self, rows: MLPRows) -> MLPGradients:
        """All gradients of these rows."""
        back, passed = self.back, self._passed(rows)
        complete = [_with_shared(one, passed.relative) for one in passed.grads]
        w13 = [back.outer(one, passed.tokens) for one in complete]
        biases = [back.down_columns(one) for one in complete] if self.expert.w13_bias_GI is not None else []
        parameters = (_stacked(w13), back.outer(passed.complete_down, passed.taken),
                      _stacked(biases) if biases else None,
                      None if self.expert.w2_bias_H is None else back.down_columns(self._grad_bias(rows, passed)))
        return MLPGradients(parameters, self._parts(rows, passed))

    def _grad_bias(self, rows: MLPRows, passed: _Passed) -> Rows:
        """Gradient of w2's bias in every row; weighted apart where the weight joins the activation."""
        if rows.in_act and rows.weight is not None:
            return self.back.product(exact(rows.grad_RH), rows.weight)
        return passed.complete_down

    def parts(self, rows: MLPRows) -> list[RankPart]:
        """What ranks add to the gradients of tokens and weights alone, without the parameters' own."""
        return self._parts(rows, self._passed(rows))

    def _parts(self, rows: MLPRows, passed: _Passed) -> list[RankPart]:
        return [self._part(number, rows, passed.grads, passed.relative, passed.act, passed.grad_taken)
                for number in range(len(self.cuts))]

    def _passed(self, rows: MLPRows) -> _Passed:
        back, grad = self.back, exact(rows.grad_RH)
        tokens = self.steps.tokens(rows.x_RH, rows.weight) if rows.on_input and rows.weight else exact(rows.x_RH)
        gate_up = back.saved(self.steps.gate_up(tokens, self.expert, None), Stage.GATE_UP)
        taken = act = back.saved(self.steps.act(gate_up, self.mlp), Stage.ACT)
        relative, grad_down, complete_down = None, grad, grad
        if (weight := rows.of_output) is not None:
            relative = relative_variance(weight)
            grad_down = back.product(grad, _without_variance(weight))
            complete_down = _with_shared(grad_down, relative)
        grad_act = grad_taken = self._through_w2(grad_down)
        if (blocks := rows.of_columns) is not None:
            relative, columns = relative_variance(blocks), self._columns(blocks)
            taken, grad_act = back.product(act, columns), back.product(grad_taken, _without_variance(columns))
        return _Passed(tokens, act, taken, grad_taken, complete_down, self._activation_backward(grad_act, gate_up),
                       relative)

    def _through_w2(self, grad_down: Rows) -> Rows:
        """Gradient of what w2 took; where w2 is cut by output it is a sum over ranks."""
        back = self.back
        if not self.by_output:
            return back.again(back.through(grad_down, self.w2_HI), 1)
        parts = [back.through(grad_down.columns(*cut.outputs), self.w2_HI[slice(*cut.outputs)]) for cut in self.cuts]
        gauge = torch.stack([part.largest for part in parts]).sum(0)
        value, bound, variance, squares = (torch.stack(one).sum(0) for one in zip(
            *((part.value, part.bound, spread(part), part.value.square()) for part in parts), strict=True))
        total = Rows(value, bound + back.rounded(gauge, back.joined_in, 2 * len(parts)),
                     variance + back.joins(value, squares, len(parts), back.joined_in))
        return back.again(total, 1)

    def _columns(self, blocks: Rows) -> Rows:
        width = self.w2_HI.shape[1] // blocks.value.shape[1]
        return blocks.mapped(lambda one: one.repeat_interleave(width, 1))

    def _activation_backward(self, grad_act: Rows, gate_up: Rows) -> list[Rows]:
        """Gradients of gate and up, or of the one projection; a cap is a step more where each of them is rounded."""
        times = 1 if self.steps.numerics.activation is None else 2
        back, model, inner, mlp = self.back, self.steps.model, self.steps.numerics.activation, self.mlp
        gate = gate_up.mapped(lambda one: one[:, 0])
        grad_gate = back.product(grad_act, activation_slope(model, gate, mlp, inner), times)
        if not mlp.gated:
            return [grad_gate]
        up = gate_up.mapped(lambda one: one[:, 1])
        grad_up = back.product(grad_act, back.again(activation(model, gate, mlp, inner), 1), times)
        return [back.product(grad_gate, up_factor(model, up, mlp, inner), times),
                back.product(grad_up, factor_slope(model, up, mlp, inner), times)]

    def _part(self, number: int, rows: MLPRows, grads: list[Rows], relative: torch.Tensor | None, act: Rows,
              grad_taken: Rows) -> RankPart:
        cut, back = self.cuts[number], self.back
        parts = [one.columns(*cut.columns) for one in grads]
        w13_GIH = self.w13_GIH[:, slice(*cut.columns)]
        if back.rule is not None and back.steps.numerics.gradient_rows == "both":
            parts, w13_GIH = [joined_columns(parts)], w13_GIH.flatten(0, 1)[None]
        through = [self._through_w13(one, w_NH, relative, cut.columns)
                   for one, w_NH in zip(parts, w13_GIH, strict=True)]
        weights = None
        if rows.on_input and rows.weight is not None:
            weights = back.dot(exact(rows.x_RH), _sum(through))
            through = [back.product(one, rows.weight) for one in through]
        elif rows.of_output is not None:
            weights = self._weight_part(number, rows.grad_RH, act)
        elif (blocks := rows.of_columns) is not None:
            weights = self._block_part(cut, blocks.value.shape[1], act, grad_taken)
            if rows.in_act and self._adds_bias(number):
                weights = _sum([weights, self._bias_part(cut, rows.grad_RH)])
        return RankPart(through, weights)

    def _through_w13(self, part: Rows, w_NH: torch.Tensor, relative: torch.Tensor | None, columns: Range) -> Rows:
        """A projection's part of the gradient of the rows' tokens, or that of both: rows (R, N), N a multiple of the
        rank's columns; an error that columns share adds up coherently.
        """
        result = self.back.again(self.back.through(part, w_NH), 1)
        if relative is None:
            return result
        if relative.shape[1] == 1:
            return _with_shared(result, relative)
        width, num_blocks, variance = columns[1] - columns[0], relative.shape[1], spread(result)
        for block in range(num_blocks):
            start, stop = (one - columns[0] for one in self._block(block, num_blocks, columns))
            column_N = torch.arange(len(w_NH)) % max(1, width)
            inside_N = (column_N >= start) & (column_N < stop)
            variance = variance + relative[:, block, None] * (part.value[:, inside_N] @ w_NH[inside_N]).square()
        return replace(result, variance=variance)

    def _block(self, block: int, num_blocks: int, columns: Range) -> Range:
        """The columns of a block within a range."""
        width = self.w2_HI.shape[1] // num_blocks
        start, stop = (min(max(end, columns[0]), columns[1]) for end in (block * width, (block + 1) * width))
        return start, stop

    def _weight_part(self, number: int, grad_RH: torch.Tensor, act: Rows) -> Rows:
        """One rank's part of the gradient of the rows' weights, (R, 1)."""
        cut, back = self.cuts[number], self.back
        w2_HI, grad = self.w2_HI[slice(*cut.outputs), slice(*cut.inner)], exact(grad_RH[:, slice(*cut.outputs)])
        inner = act.columns(*cut.inner)
        down = back.again(back.through(inner, w2_HI.T), 1)
        result = back.dot(grad, down)
        if back.rule is None:
            over_columns = back.dot(inner, back.again(back.through(grad, w2_HI), 1))
            result = Rows(result.value, torch.maximum(result.bound, over_columns.bound),
                          torch.maximum(spread(result), spread(over_columns)))
        return _sum([result, self._bias_part(cut, grad_RH)]) if self._adds_bias(number) else result

    def _adds_bias(self, number: int) -> bool:
        return self.expert.w2_bias_H is not None and (self.by_output or number == 0)

    def _bias_part(self, cut: Cut, grad_RH: torch.Tensor) -> Rows:
        """What w2's bias adds to the gradient of the rows' weights, (R, 1)."""
        assert self.expert.w2_bias_H is not None
        grad = exact(grad_RH[:, slice(*cut.outputs)])
        bias = exact(self.expert.w2_bias_H[slice(*cut.outputs)].expand_as(grad.value))
        return self.back.dot(grad, self.back.again(bias, 1))

    def _block_part(self, cut: Cut, num_blocks: int, act: Rows, grad_taken: Rows) -> Rows:
        """One rank's part of the gradient of the blocks' weights, (R, S)."""
        ranges = [self._block(block, num_blocks, cut.columns) for block in range(num_blocks)]
        return joined_columns([self.back.dot(act.columns(*one), grad_taken.columns(*one)) for one in ranges])


def relative_variance(weight: Rows) -> torch.Tensor:
    """Mean square of the relative errors of weights; infinite where a weight of 0 may be another."""
    variance = spread(weight)
    return torch.where(variance == 0, 0.0, variance / weight.value.square())


def _without_variance(rows: Rows) -> Rows:
    return replace(rows, variance=torch.zeros_like(rows.value))


def _with_shared(rows: Rows, relative: torch.Tensor | None) -> Rows:
    """Rows with the error of weights that multiply equal blocks of their columns, (R, S)."""
    if relative is None:
        return rows
    relative = relative.repeat_interleave(rows.value.shape[1] // relative.shape[1], 1)
    return replace(rows, variance=spread(rows) + relative * rows.value.square())


def _sum(parts: list[Rows]) -> Rows:
    value, bound, variance = (torch.stack(one).sum(0) for one in zip(
        *((part.value, part.bound, spread(part)) for part in parts), strict=True))
    return Rows(value, bound, variance)


def _stacked(parts: list[Rows]) -> Rows:
    value, bound, variance = (torch.stack(one) for one in zip(
        *((part.value, part.bound, spread(part)) for part in parts), strict=True))
    return Rows(value, bound, variance)
