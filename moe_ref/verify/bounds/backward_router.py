"""Gradients of routing weights on their way to logits, router, gates and tokens, with their errors.

Every map on this way is linear in the gradient: J(scores) g. A right result differs from it by what g is off, sent
through abs(J), and by what the factors of J are off, relative to abs(J) abs(g). Ranks may add up partial gradients at
any point of the way, so roundings are relative to the sum of all ranks' absolute parts. The variance goes the same way
through the squares of J, column by column, and its roundings are relative to the ranks' squares.
"""

from dataclasses import dataclass, replace

import torch

from moe_ref.contract.parallel import Range
from moe_ref.contract.spec import Router
from moe_ref.numerics.accumulation import ROUNDING
from moe_ref.numerics.gauges import Gauges, gauges
from moe_ref.oracle import router as formula
from moe_ref.oracle.backward.weights import divisor, score_backward, weigh_backward
from moe_ref.verify.bounds.backward_steps import BackwardSteps, column_sums, spread
from moe_ref.verify.bounds.rounding import FLUSH
from moe_ref.verify.bounds.rows import Rows
from moe_ref.verify.bounds.scores import Scores
from moe_ref.verify.bounds.slopes import LARGEST_TANH_CURVATURE

_SCORE_FACTORS = 6
"""Scores, divisors and slopes that one term of a logit's gradient is a product of, at most."""
_BEYOND = 9.0
"""In standard deviations: a clamp farther away than this is not reached."""


@dataclass(frozen=True)
class Parts:
    """A gradient of every token as ranks hold it before they add up, (ranks, T, N); bound and variance of the sum."""

    value: torch.Tensor
    bound: torch.Tensor
    variance: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        return self.value.sum(0)

    @property
    def gauge(self) -> torch.Tensor:
        """Sum of the ranks' absolute parts, errors included, (T, N)."""
        return self.value.abs().sum(0) + self.bound

    @property
    def squares(self) -> torch.Tensor:
        """The larger of the squares of the sum and of the sum of squares: what roundings are relative to, (T, N)."""
        return larger_squares(self.value)


def larger_squares(parts: torch.Tensor) -> torch.Tensor:
    """Whether parts are rounded or their sum is not known: the larger of both squares, over the first axis."""
    return torch.maximum(parts.sum(0).square(), parts.square().sum(0))


@dataclass(frozen=True)
class LinearGradients:
    """Of y = x @ w^T + b: w (N, H), b (N,), before their last store; x with sums over all ranks' parts.

    x_gauge: of absolute values; x_squares: of squares.
    """

    weight: Rows
    bias: Rows
    x: Rows
    x_gauge: torch.Tensor
    x_squares: torch.Tensor


def linear_backward(back: BackwardSteps, grad: Parts, x_TH: torch.Tensor, w_NH: torch.Tensor,
                    token_parts: list[Range]) -> LinearGradients:
    """token_parts: the tokens of ranks that hold different ones."""
    x_TH, w_NH, num_tokens, model = x_TH.double(), w_NH.double(), len(x_TH), back.steps.model
    gauge, total = grad.gauge, grad.total
    error_TN = grad.bound + back.coefficient(num_tokens) * gauge
    held = [(part[slice(*tokens)], x_TH[slice(*tokens)]) for part in grad.value for tokens in token_parts]
    joins = 2 * (len(held) - 1)

    def joined(value: torch.Tensor, bound: torch.Tensor, variance: torch.Tensor, parts: torch.Tensor) -> Rows:
        """A sum over tokens with the additions between ranks."""
        gauge, squares = parts.abs().sum(0) + bound, larger_squares(parts)
        if joins:
            variance = variance + back.joins(value, squares, len(parts), back.joined_in)
        return Rows(value, bound + back.rounded(gauge, back.joined_in, joins), variance)

    def over_tokens(sums: list[Gauges]) -> torch.Tensor:
        """Variance of sums over tokens: of the first, which is complete, or of all others, whichever is larger."""
        whole, *parts = (model.summed_variance(one, num_tokens) for one in sums)
        return torch.maximum(whole, torch.stack(parts).sum(0))

    of_weight = [gauges(part.T, x.T) for part, x in [(total, x_TH), *held]]
    weight = joined(total.T @ x_TH, error_TN.T @ x_TH.abs() + num_tokens * FLUSH,
                    over_tokens(of_weight) + grad.variance.T @ x_TH.square(),
                    torch.stack([one.value for one in of_weight[1:]]))
    of_bias = [column_sums(part) for part in (total, *(part for part, _ in held))]
    bias = joined(total.sum(0), error_TN.sum(0) + num_tokens * FLUSH, over_tokens(of_bias) + grad.variance.sum(0),
                  torch.stack([one.value for one in of_bias[1:]]))
    x_error = (grad.bound + back.coefficient(len(w_NH)) * gauge) @ w_NH.abs() + len(w_NH) * FLUSH
    x_parts = torch.stack([part @ w_NH for part in grad.value])
    x_gauge, x_squares = x_parts.abs().sum(0) + x_error, larger_squares(x_parts)
    of_x = [model.summed_variance(gauges(part, w_NH.T), len(w_NH)) for part in (total, *grad.value)]
    x_variance = torch.maximum(of_x[0], torch.stack(of_x[1:]).sum(0)) + grad.variance @ w_NH.square()
    x_variance = x_variance + back.stores(x_squares, back.joined_in, 1)
    return LinearGradients(
        weight, bias, Rows(total @ w_NH, x_error + back.rounded(x_gauge, back.joined_in, 1), x_variance), x_gauge,
        x_squares)


@dataclass(frozen=True)
class LogitGradients:
    """Of the logits (T, E + Z), of the further columns' (T, S), and of the learned scale before its last store."""

    logits: Parts
    columns: Parts
    scale: Rows | None


class RouterBackward:
    """The way from weights to logits for the choice that was made.

    ids_TK: -1 where a slot was dropped or is no expert's.
    """

    def __init__(self, back: BackwardSteps, scores: Scores, shared_logits: torch.Tensor | None,
                 ids_TK: torch.Tensor) -> None:
        self.back, self.scores, self.shared_logits = back, scores, shared_logits
        self.router, capacity = scores.router, scores.router.capacity
        self.kept_TK = (ids_TK >= 0) & (ids_TK < self.router.num_choices)
        self.whole_TK = torch.where(self.kept_TK, ids_TK, 0).long()
        self.after = capacity is not None and capacity.renormalize_after
        if capacity is not None:
            self.whole_TK = scores.choice.whole(torch.where(self.kept_TK, ids_TK, -1))
        self.score_TE, self.plain = scores.score_TE, replace(self.router, capacity=None)
        self.shared_TS = self.score_TE[:, :0] if scores.shared_TS is None else scores.shared_TS
        if self.after:
            # A token that lost every slot needs a sum to divide by, whatever it is, unless shared columns are in it.
            left_TK = self.kept_TK
            if not self.shared_TS.shape[1]:
                left_TK = left_TK | ~left_TK.any(-1, keepdim=True)
            self.score_TE = self.score_TE.scatter(1, self.whole_TK, self.score_TE.gather(1, self.whole_TK) * left_TK)

    @property
    def unknown_T(self) -> torch.Tensor:
        """Tokens whose sum of scores holds a dropped expert, and it is not certain which."""
        if self.router.capacity is None or self.after or not self.router.renormalize:
            return torch.zeros(len(self.kept_TK), dtype=torch.bool)
        return ~self.kept_TK.all(-1) & ~self.scores.choice.chosen.unambiguous_T

    def run(self, weights: Parts, columns: Parts) -> LogitGradients:
        """From the gradients of routing weights (T, K) and of shared weights (T, S), S = 0 without."""
        back = self.back
        mapped = [self._mapped(*pair) for pair in zip(weights.value, columns.value, strict=True)]
        relative_T1, stores = self._relative(), 2 * len(weights.value)
        stored = [one.bound + back.rounded(one.gauge, back.weights_in, stores) + relative_T1 * one.gauge
                  for one in (weights, columns)]
        errors = self._gauge(*stored)
        gauges = self._gauge(weights.gauge, columns.gauge)
        likely = self._factor_variances(weights, columns)
        variances = [one + other for one, other in zip(likely, self._variances(
            *(one.variance + back.stores(one.squares, back.weights_in, stores) for one in (weights, columns))),
            strict=True)]
        logits, shared = (self._parts(torch.stack([one[number] for one in mapped]), errors[number], gauges[number],
                                      variances[number]) for number in (0, 1))
        return LogitGradients(logits, shared, self._scale(mapped, errors[2], gauges[2], variances[2]))

    def _parts(self, value: torch.Tensor, error: torch.Tensor, gauge: torch.Tensor, variance: torch.Tensor) -> Parts:
        back = self.back
        stored = back.stores(larger_squares(value), back.logits_in, 3)
        return Parts(value, *(one.masked_fill(self.unknown_T[:, None], torch.inf) for one in (
            error + back.rounded(gauge, back.logits_in, 3), variance + stored)))

    def _variances(self, weights_TK: torch.Tensor, columns_TS: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of independent errors of each slot, with the squares of J, column by column; and of its part of the scale."""
        num_slots, slots = weights_TK.shape[1], torch.cat([weights_TK, columns_TS], 1)
        logits_TE, shared_TS = torch.zeros_like(self.score_TE), torch.zeros_like(columns_TS)
        for slot in range(slots.shape[1]):
            one = torch.zeros_like(slots)
            one[:, slot] = 1.0
            of_logits, of_shared, _ = self._mapped(one[:, :num_slots], one[:, num_slots:])
            logits_TE = logits_TE + of_logits.square() * slots[:, slot, None]
            shared_TS = shared_TS + of_shared.square() * slots[:, slot, None]
        return logits_TE, shared_TS, self._gauge(weights_TK, columns_TS, power=2)[2]

    def _mapped(self, grad_TK: torch.Tensor, grad_TS: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """J g by the oracle's formulas: of logits, of the further columns' logits, of the learned scale."""
        grads = weigh_backward(grad_TK * self.kept_TK, grad_TS, self.score_TE, self.whole_TK, self.plain,
                               self.scores.scale_E, self.shared_TS)
        score_TE = grads.score_TE
        if self.after:
            dropped_TE = torch.zeros_like(score_TE, dtype=torch.bool).scatter(1, self.whole_TK, ~self.kept_TK)
            score_TE = score_TE.masked_fill(dropped_TE, 0.0)
        columns_TS = grads.shared_TS
        if self.shared_logits is not None:
            columns_TS = score_backward(columns_TS, self.shared_logits, self.router)
        scale_E = grads.weight_scale_E if grads.weight_scale_E is not None else torch.zeros(0)
        return score_backward(score_TE, self.scores.logits.value, self.router), columns_TS, scale_E

    def _relative(self) -> torch.Tensor:
        """What the factors of one term are off together, (T, 1); 2 where a clamped sum may lie on either side."""
        scores, router, unit = self.scores, self.router, self.back.steps.model.evaluation_unit
        relative_TN = scores.relative_TE
        if scores.shared_relative_TS is not None:
            relative_TN = torch.cat([relative_TN, scores.shared_relative_TS], 1)
        relative_T1 = relative_TN.amax(-1, keepdim=True)
        terms = relative_TN.shape[1] + 2 * self.kept_TK.shape[1] + 40
        result = torch.expm1(_SCORE_FACTORS * relative_T1 + terms * unit)
        if router.logit_softcap:
            moved_T1 = router.logit_scale * scores.logits.bound.amax(-1, keepdim=True)
            result = result + 16 * unit + LARGEST_TANH_CURVATURE * moved_T1 / router.logit_softcap
        if router.renormalize and router.epsilon_rule == "clamp":
            sum_T1 = self.score_TE.gather(1, self.whole_TK).sum(-1, keepdim=True) + self.shared_TS.sum(-1, keepdim=True)
            near_T1 = (sum_T1 - router.renormalize_epsilon).abs() <= (relative_T1 + terms * unit) * sum_T1
            result = torch.where(near_T1, 2.0, result)
        return torch.where(relative_T1 < 1, result, torch.inf)

    def _factor_variances(self, weights: Parts, columns: Parts) -> tuple[torch.Tensor, ...]:
        """Variances of J g from those of the factors of J, as `_gauge` has them: each term has errors of its own.

        Scores are the same in all parts of a gradient, roundings of products with them are not.
        """
        scores, router, unit = self.scores, self.router, self.back.steps.model.evaluation_unit
        spread_TN = scores.spread_TE
        if scores.shared_spread_TS is not None:
            spread_TN = torch.cat([spread_TN, scores.shared_spread_TS], 1)
        largest_T1 = spread_TN.amax(-1, keepdim=True)
        terms = spread_TN.shape[1] + 2 * self.kept_TK.shape[1] + 40
        of_scores_T1 = _SCORE_FACTORS * largest_T1
        if router.logit_softcap:
            slope = LARGEST_TANH_CURVATURE * router.logit_scale / router.logit_softcap
            moved_T1 = spread(scores.logits).amax(-1, keepdim=True)
            of_scores_T1 = of_scores_T1 + (4 * unit) ** 2 + slope**2 * moved_T1
        if router.renormalize and router.epsilon_rule == "clamp":
            sum_T1 = self.score_TE.gather(1, self.whole_TK).sum(-1, keepdim=True) + self.shared_TS.sum(-1, keepdim=True)
            reach_T1 = _BEYOND * (largest_T1 + terms * unit**2).sqrt() * sum_T1
            of_scores_T1 = torch.where((sum_T1 - router.renormalize_epsilon).abs() <= reach_T1, 4.0, of_scores_T1)
        of_roundings = terms * ROUNDING * unit**2
        return self._gauge(*(of_scores_T1 * one.total.square() + of_roundings * one.squares
                             for one in (weights, columns)), power=2)

    def _gauge(self, size_TK: torch.Tensor, size_TS: torch.Tensor, *, power: int = 1) -> tuple[torch.Tensor, ...]:
        """abs(J) times sizes: of logits, of the further columns' logits, and of every slot's part of the scale.

        power 2: of squares, the sums of the squares of all terms.
        """
        router, score_TK = self.plain, self.score_TE.gather(1, self.whole_TK)
        sum_T1 = score_TK.sum(-1, keepdim=True) + self.shared_TS.sum(-1, keepdim=True)
        divisor_T1 = divisor(sum_T1, router)
        divisor_T1 = torch.where(divisor_T1 > 0, divisor_T1, 1.0)
        share_TK, share_TS = ((one / divisor_T1) ** power for one in (score_TK, self.shared_TS))
        scaling, divisor_T1 = router.scaling_factor**power, divisor_T1**power
        size_TK, size_TS = size_TK * self.kept_TK * scaling, size_TS * scaling
        slots, scale_E = torch.cat([size_TK * share_TK, size_TS * share_TS], 1), self.scores.scale_E
        if scale_E is not None:
            scale_E, of_layer = scale_E.double().abs() ** power, router.learned_scale == "layer"
            size_TK = size_TK * (scale_E if of_layer else scale_E[self.whole_TK])
            size_TS = size_TS * scale_E if of_layer else size_TS
        spread_T1 = ((size_TK * share_TK).sum(-1, keepdim=True) + (size_TS * share_TS).sum(-1, keepdim=True))
        spread_T1 = spread_T1 / divisor_T1 * float(router.renormalize)
        size_TE = torch.zeros_like(self.score_TE).scatter_add(1, self.whole_TK, size_TK / divisor_T1 + spread_T1)
        columns_TS = size_TS / divisor_T1 + spread_T1
        if self.shared_logits is not None:
            columns_TS = score_gauge(columns_TS, self.shared_logits, router, power)
        return score_gauge(size_TE, self.scores.logits.value, router, power), columns_TS, slots

    def _scale(self, mapped: list[tuple[torch.Tensor, ...]], error_TN: torch.Tensor, gauge_TN: torch.Tensor,
               variance_TN: torch.Tensor) -> Rows | None:
        """The learned scale: a sum over tokens and slots."""
        if self.scores.scale_E is None:
            return None
        back, terms = self.back, gauge_TN.numel()
        error_TN = error_TN + back.coefficient(terms) * gauge_TN
        parts = torch.stack([one[2] for one in mapped])
        value, stores = parts.sum(0), 2 * len(mapped) + 1

        def over_slots(size_TN: torch.Tensor) -> torch.Tensor:
            if self.router.learned_scale == "layer":
                return size_TN.sum().reshape(1)
            slots_TK = size_TN[:, :self.whole_TK.shape[1]]
            return torch.zeros_like(value).index_add(0, self.whole_TK.flatten(), slots_TK.flatten())

        stored = back.rounded(over_slots(gauge_TN), back.logits_in, stores)
        # Terms of each expert are few and far between: their partial sums are at most their sum of absolute values.
        summed = terms * ROUNDING * (back.steps.model.accumulation.unit * over_slots(gauge_TN)).square()
        variance = over_slots(variance_TN) + summed + back.stores(larger_squares(parts), back.logits_in, stores)
        return Rows(value, over_slots(error_TN) + stored, variance)


def score_gauge(size_TE: torch.Tensor, logits_TE: torch.Tensor, router: Router, power: int = 1) -> torch.Tensor:
    """abs of the score's derivative times sizes, or of its squares times squares.

    Differences from 1 may cancel, so that the slope of a sigmoid counts as s, and that of a cap as 1.
    """
    score_TE = formula.score(logits_TE, router)
    if router.score == "softmax":
        score_TE = score_TE**power
        result = score_TE * (size_TE + (score_TE * size_TE).sum(-1, keepdim=True))
    elif router.score == "sigmoid":
        result = score_TE**power * size_TE
    else:
        slope_TE = formula.sigmoid(formula.capped(logits_TE, router)) / (2 * score_TE)
        result = torch.where(score_TE > 0, slope_TE, 0.0) ** power * size_TE
    return result * router.logit_scale**power
