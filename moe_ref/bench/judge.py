"""Whether what is timed computes the layer: a few tokens and columns of the very result, against the judge's bounds.

The truth of the probes is computed once for all numbers of tokens, expert by expert, in fp64 on the CPU: outputs, and
gradients of tokens and routing weights. Gradients of an expert's weights are sums over all of its rows, so of those the
first and last column of one expert are computed anew every time.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moe_ref.bench.problem import Batch, Operation, Probes, RankLayer
from moe_ref.contract.capabilities import Numerics
from moe_ref.contract.case import Case, Problem
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MLP
from moe_ref.contract.vocabulary import Format, Stage, gradient_stage
from moe_ref.contract.weights import WHOLE_PARAMETERS, ExpertWeights, MoEWeights
from moe_ref.inputs.build import Inputs
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.bounds.backward_mlp import Cut, MLPBackward, MLPRows
from moe_ref.verify.bounds.backward_steps import BackwardSteps
from moe_ref.verify.bounds.backward_sums import RankSums, token_gradient
from moe_ref.verify.bounds.limits import likely_limits
from moe_ref.verify.bounds.output import output_rows
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.bounds.rows import Rows, exact
from moe_ref.verify.bounds.steps import Steps
from moe_ref.verify.measure.routing import true_scores
from moe_ref.verify.measure.stage_meter import Place, StageMeter

_BACKWARD_PROBES = 1
"""A token's gradient needs every column of its experts, whose own gradients come with them."""


@dataclass(frozen=True)
class OnHost:
    """Weights on a device as a source of experts in the host's memory, one at a time."""

    held: MoEWeights

    def __getattr__(self, name: str) -> torch.Tensor | None:
        if name not in WHOLE_PARAMETERS:
            raise AttributeError(name)
        tensor = getattr(self.held, name)
        return None if tensor is None else tensor.cpu()

    def expert(self, e: int) -> ExpertWeights:
        """Expert e."""
        return _on_host(self.held.expert(e))

    def shared_expert(self) -> ExpertWeights | None:
        """The shared expert, or None."""
        shared = self.held.shared_expert()
        return None if shared is None else _on_host(shared)


def _on_host(expert: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(*(None if tensor is None else tensor.cpu() for tensor in expert))  # pyrefly: ignore


class Judge:
    """Compares the results of one layer, at any number of tokens, with the truth of its probes."""

    def __init__(self, layer: RankLayer, weights: MoEWeights, probes: Probes, hardware: str) -> None:
        self._layer, self._source, self._hardware = layer, OnHost(weights), hardware
        self._x_PH, self._grad_PH = probes.x_PH.cpu(), probes.grad_PH.cpu()
        given = probes.routing
        self._routing = Routing(given.ids_TK.cpu().long(), given.weights_TK.cpu(),
                                shared_TS=None if given.shared_TS is None else given.shared_TS.cpu())
        self._truths: dict[tuple[str, Operation], dict[str, Rows]] = {}

    def ratio(self, operation: Operation, numerics: Numerics, batch: Batch,
              got: torch.Tensor | Mapping[str, torch.Tensor]) -> float:
        """The largest error over what is allowed, infinite for a result of another shape or that is not finite.

        OverflowError where a sum has no bound; NaN where no probe's choice of experts is certain.
        """
        shown = dict(got) if isinstance(got, Mapping) else {"y_TH": got}
        shapes = {"y_TH": batch.x_TH.shape, "x_TH": batch.x_TH.shape, "weights_TK": batch.routing.weights_TK.shape}
        if any(tensor.shape != shapes.get(name, tensor.shape) for name, tensor in shown.items()):
            return float("inf")
        truth = self._truth(operation, numerics)
        ratios = []
        for name, want in truth.items():
            got_PH = shown[name][batch.place_P[:len(want.value)]].detach().cpu()
            ratios.append(self._ratio(name, got_PH, want.rows(slice(0, len(got_PH))), numerics))
        if operation is Operation.BACKWARD:
            ratios += self._columns(numerics, batch, shown)
        return max(ratios)

    def _truth(self, operation: Operation, numerics: Numerics) -> dict[str, Rows]:
        key = (repr(numerics), operation)
        if key not in self._truths:
            steps = self._steps(numerics)
            self._truths[key] = (self._gradients(BackwardSteps(steps, self._leaf)) if operation is Operation.BACKWARD
                                 else {"y_TH": self._output(steps, operation is Operation.LAYER)})
        return self._truths[key]

    def _steps(self, numerics: Numerics) -> Steps:
        model = RoundingModel.of(load_tolerances(), self._hardware, numerics, self._layer.dtype)
        return Steps(self._layer.spec, numerics, model)

    @property
    def _leaf(self) -> Format:
        return Format(self._layer.dtype.value)

    def _problem(self, num_tokens: int) -> Problem:
        return Problem(spec=self._layer.spec, num_tokens=num_tokens, dtype=self._layer.dtype)

    def _output(self, steps: Steps, routes_itself: bool) -> Rows:
        """Outputs of the probes; nothing is said of one whose choice of experts is not certain."""
        ids_TK, weights, gates = self._routing.ids_TK, self._stored(self._routing.weights_TK, steps), None
        if self._routing.shared_TS is not None:
            gates = self._stored(self._routing.shared_TS, steps)
        if not routes_itself or self._layer.spec.router is None:
            return output_rows(self._x_PH, ids_TK, weights, gates, self._source, steps)
        inputs = Inputs(self._problem(len(self._x_PH)), self._x_PH, None, None, self._source)  # pyrefly: ignore
        scores, _ = true_scores(inputs, steps)
        ids_TK = scores.ids()
        own = scores.weights(ids_TK)
        weights, gates = steps.stored(own.routed, Stage.WEIGHTS), own.shared and steps.stored(own.shared, Stage.WEIGHTS)
        if self._layer.spec.shared is not None and self._layer.spec.shared.gate == "sigmoid":
            gates = steps.shared_gate(self._x_PH, self._source)
        output = output_rows(self._x_PH, ids_TK, weights, gates, self._source, steps)
        return output.masked(~scores.choice.unambiguous_T[:, None])

    @staticmethod
    def _stored(given: torch.Tensor, steps: Steps) -> Rows:
        """Given weights, which an implementation may round to what it stores its own in."""
        return steps.stored(exact(given), Stage.WEIGHTS)

    def _gradients(self, back: BackwardSteps) -> dict[str, Rows]:
        """Of the first probes' tokens and routing weights."""
        spec, count = self._layer.spec, min(_BACKWARD_PROBES, len(self._x_PH))
        sums, weight_sums = RankSums(1, count, spec.hidden_size), RankSums(1, count, spec.top_k)
        ids_TK, weights = self._routing.ids_TK[:count], self._stored(self._routing.weights_TK[:count], back.steps)
        x_PH, grad_PH = self._x_PH[:count].double(), self._merged(self._grad_PH[:count])
        for e in ids_TK.unique().tolist():
            if not 0 <= e < spec.num_experts:
                continue
            token_R, slot_R = (ids_TK == e).nonzero(as_tuple=True)
            rows = MLPRows.routed(back, x_PH[token_R], grad_PH[token_R],
                                  weights.mapped(lambda one, at=(token_R, slot_R): one[*at, None]))
            self._add(back, self._source.expert(e), spec.experts, rows, (sums, token_R), (weight_sums, slot_R))
        if (shared := self._source.shared_expert()) and spec.shared is not None:
            gates = self._routing.shared_TS
            weight = None if gates is None else self._stored(gates[:count], back.steps)
            by_router = spec.shared.gate == "router"
            rows = MLPRows(x_PH, grad_PH, blocks=weight) if by_router else MLPRows(x_PH, grad_PH, weight)
            self._add(back, shared, spec.shared.mlp, rows, (sums, torch.arange(count)), None)
        parts = weight_sums.parts()
        times = 2
        weights_TK = Rows(parts.total, parts.bound + back.rounded(parts.gauge, back.weights_in, times),
                          parts.variance + back.stores(parts.squares, back.weights_in, times))
        return {"x_TH": back.finished(token_gradient(back, sums, [])),
                "weights_TK": back.finished(weights_TK, Format.FP32)}

    def _merged(self, grad_TH: torch.Tensor) -> torch.Tensor:
        """Gradient of the merged rows: half of the output's where routed and shared experts are averaged."""
        shared = self._layer.spec.shared
        return grad_TH.cpu().double() / (2 if shared is not None and shared.merge == "mean" else 1)

    @staticmethod
    def _add(back: BackwardSteps, expert: ExpertWeights, mlp: MLP, rows: MLPRows, tokens: tuple[RankSums, torch.Tensor],
             slots: tuple[RankSums, torch.Tensor] | None) -> None:
        """One expert's part of the gradients of tokens and of routing weights."""
        hidden, inner = expert.w2_HI.shape
        part = MLPBackward(back, expert, mlp, [Cut((0, inner), (0, inner), (0, hidden))]).parts(rows)[0]
        (sums, token_R), first_R = tokens, torch.zeros_like(tokens[1])
        sums.add(first_R, token_R, part.x)
        if slots is not None and part.weights is not None:
            slots[0].add(first_R, token_R, [part.weights], slots[1])

    def _columns(self, numerics: Numerics, batch: Batch, got: Mapping[str, torch.Tensor]) -> list[float]:
        """Gradients of the first and last column of one expert's w13 and w2, of the median load of those with rows."""
        spec, back = self._layer.spec, BackwardSteps(self._steps(numerics), self._leaf)
        ids_TK = batch.routing.ids_TK.cpu().long()
        loads_E = torch.bincount(ids_TK[(ids_TK >= 0) & (ids_TK < spec.num_experts)], minlength=spec.num_experts)
        visited_E = loads_E.nonzero().flatten()
        e = int(visited_E[loads_E[visited_E].argsort()[len(visited_E) // 2]])
        token_R, slot_R = (ids_TK == e).nonzero(as_tuple=True)
        column_I = torch.tensor([0, spec.intermediate_size - 1]).unique()
        w13_GIH, w2_HI, w13_bias_GI, w2_bias_H = self._source.expert(e)
        expert = ExpertWeights(w13_GIH[:, column_I], w2_HI[:, column_I],
                               None if w13_bias_GI is None else w13_bias_GI[:, column_I], w2_bias_H)
        weight = self._stored(batch.routing.weights_TK[token_R.to(batch.place_P.device)].cpu(), back.steps)
        on_device_R = token_R.to(batch.place_P.device)
        rows = MLPRows.routed(back, batch.x_TH[on_device_R].cpu().double(), self._merged(batch.grad_TH[on_device_R]),
                              weight.mapped(lambda one: one.gather(1, slot_R[:, None])))
        whole = (0, len(column_I))
        cut = Cut(whole, whole, (0, spec.hidden_size))
        w13, w2, *_ = MLPBackward(back, expert, spec.experts, [cut]).run(rows).parameters
        got_GIH, got_HI = got["w13_EGIH"][e].cpu()[:, column_I], got["w2_EHI"][e].cpu()[:, column_I]
        return [self._ratio("w13_EGIH", got_GIH.flatten(0, 1), back.finished(w13).mapped(lambda one: one.flatten(0, 1)),
                            numerics),
                self._ratio("w2_EHI", got_HI, back.finished(w2), numerics)]

    def _ratio(self, name: str, got: torch.Tensor, want: Rows, numerics: Numerics) -> float:
        """One tensor's largest error over what is allowed."""
        model = self._steps(numerics).model
        limits = likely_limits(model.tolerances, Case(problem=self._problem(len(self._x_PH))))
        if bool(torch.isinf(want.bound).all()):
            return float("nan")
        stage = {"y_TH": Stage.OUTPUT, "weights_TK": Stage.WEIGHTS}.get(name) or gradient_stage(name)
        allowed = limits.output if stage is Stage.OUTPUT else limits.gradient
        meter = StageMeter(stage, got.shape[1], model.largest(self._leaf), sigmas_allowed=allowed, whole_layer=True)
        meter.add(got, want, Place(0, torch.arange(len(got))))
        return meter.ratio
