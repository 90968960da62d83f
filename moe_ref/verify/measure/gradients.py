"""Gradients of every rank against the unsharded layer's, expert by expert, with the bound that their roundings allow.

The values are those of moe_ref.oracle.backward for the subject's own choice of experts; a rank answers for its part of
each parameter, for the rows that its copies of experts serve, and for its own tokens.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType

import torch

from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.case import Case
from moe_ref.contract.placements import part_range, placements, rank_part
from moe_ref.contract.shares import RankShare, rank_shares
from moe_ref.contract.vocabulary import Direction, Format, Schedule, SharedPlacement, Stage, gradient_stage
from moe_ref.contract.weights import EXPERT_PARAMETERS, SHARED_PARAMETERS, ExpertWeights, parameter_shapes
from moe_ref.inputs.build import Inputs, output_gradient
from moe_ref.verify.bounds.backward_mlp import Cut, MLPBackward, MLPRows
from moe_ref.verify.bounds.backward_router import LinearGradients, Parts, RouterBackward, linear_backward
from moe_ref.verify.bounds.backward_steps import BackwardSteps, spread
from moe_ref.verify.bounds.backward_sums import RankSums, over_groups, token_gradient
from moe_ref.verify.bounds.limits import likely_limits
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.bounds.rows import Rows, exact
from moe_ref.verify.bounds.steps import Steps
from moe_ref.verify.measure.gradient_facts import differing, gradient_faults, power
from moe_ref.verify.measure.gradient_routing import GradientRouting, gradient_routing
from moe_ref.verify.measure.measurement import Measurement
from moe_ref.verify.measure.placing import RankTensors, over_all_tokens, serving_places
from moe_ref.verify.measure.routing import measure_routing
from moe_ref.verify.measure.stage_meter import Place, StageMeter, Watched
from moe_ref.verify.measure.stages import measure


class GradientComparison:
    """State of one pass; `measure_case` below is the way in."""

    def __init__(self, case: Case, inputs: Inputs, ranks: list[RankTensors], numerics: Numerics, model: RoundingModel,
                 routing: GradientRouting, judged_T: torch.Tensor, watched: Watched) -> None:
        self.case, self.inputs, self.ranks, self.routing, self.judged_T = case, inputs, ranks, routing, judged_T
        self.spec, self.parallel, self.shares = case.problem.spec, case.parallel, rank_shares(case)
        self.back = BackwardSteps(Steps(self.spec, numerics, model), Format(case.problem.dtype.value))
        self.x_TH, self.grad_y_TH = inputs.x_TH.double(), output_gradient(case.problem).double()
        halves = self.spec.shared is not None and self.spec.shared.merge == "mean"
        self.grad_merged_TH = self.grad_y_TH / 2 if halves else self.grad_y_TH
        self.server_TK, self.place_TK = serving_places(routing.ids_TK, case, self.shares)
        self.token_parts = sorted({share.tokens for share in self.shares})
        self.by_output = self.parallel.schedule is Schedule.GATHER
        gates = self.spec.shared.num_gates if self.spec.shared else 0
        self.sums, self.weight_sums, self.gate_sums = (
            RankSums(self.parallel.size, len(self.x_TH), width)
            for width in (self.spec.hidden_size, self.spec.top_k, gates))
        self.shapes, self.meters = parameter_shapes(self.spec), dict[Stage, StageMeter]()
        self.watched = watched
        self.all_judged, self.sigmas_allowed = bool(judged_T.all()), likely_limits(model.tolerances, case).gradient

    def run(self, tell: Callable[[str], None]) -> None:
        for e in range(self.spec.num_choices):
            tell(f"oracle backward, expert {e + 1} of {self.spec.num_choices}")
            if e < self.spec.num_experts:
                self._routed(e, self.inputs.weights.expert(e))
            else:
                self._identity(e)
        if shared := self.inputs.weights.shared_expert():
            self._shared(shared)
        joined = self._router() + self._sigmoid_gate()
        if self.inputs.weights.output_bias_H is not None:
            groups = [self.back.down_columns(exact(self.grad_y_TH[slice(*part)])) for part in self.token_parts]
            self._compare_whole("output_bias_H", over_groups(self.back, groups))
        if self.inputs.residual_TH is not None:
            self._compare_tokens("residual_TH", exact(self.grad_y_TH))
        x = token_gradient(self.back, self.sums, joined)
        self._compare_tokens("x_TH", x.masked(~self.judged_T[:, None]))

    def _home(self, token_R: torch.Tensor, server_R: torch.Tensor) -> torch.Tensor:
        """The ep rank to whose sums a row belongs: where its token came from, else where it was served."""
        if not self.parallel.tokens.over_ep:
            return server_R
        ends = torch.tensor([share.merged_tokens[1] for share in self.shares[::self.parallel.tp]])
        return torch.searchsorted(ends, token_R, right=True)

    def _routed(self, e: int, expert: ExpertWeights) -> None:
        """Every copy of an expert, with the rows that it serves."""
        for ep_rank, hosted in enumerate(self.parallel.hosted(self.spec.num_experts)):
            shares = self.shares[ep_rank * self.parallel.tp:(ep_rank + 1) * self.parallel.tp]
            for place in (place for place, held in enumerate(hosted) if held == e):
                served_TK = (self.server_TK == ep_rank) & (self.place_TK == place)
                token_R, slot_R = served_TK.nonzero(as_tuple=True)
                cuts = [Cut(share.columns, self._inner(share.columns, self.spec.intermediate_size), share.outputs)
                        for share in shares]
                rows = MLPRows.routed(self.back, self.x_TH[token_R], self.grad_merged_TH[token_R],
                                      self._weight(token_R, slot_R))
                gradients = MLPBackward(self.back, expert, self.spec.experts, cuts).run(rows)
                for tp_rank, part in enumerate(gradients.parts):
                    rank_R = self._home(token_R, torch.full_like(token_R, ep_rank)) * self.parallel.tp + tp_rank
                    self.sums.add(rank_R, token_R, part.x)
                    assert part.weights is not None
                    self.weight_sums.add(rank_R, token_R, [part.weights], slot_R)
                for name, found in zip(EXPERT_PARAMETERS, gradients.parameters, strict=True):
                    if found is not None:
                        for share in shares:
                            self._compare(name, found, share.rank, e, place)

    def _inner(self, columns: tuple[int, int], size: int) -> tuple[int, int]:
        """Columns of the activation that a rank's w2 takes."""
        return (0, size) if self.by_output else columns

    def _weight(self, token_R: torch.Tensor, slot_R: torch.Tensor) -> Rows:
        return self.routing.weights.mapped(lambda one: one[token_R, slot_R, None])

    def _identity(self, e: int) -> None:
        """y = weight * x, on the first of the ranks that add up."""
        token_R, slot_R = (self.routing.ids_TK == e).nonzero(as_tuple=True)
        rank_R = self._home(token_R, torch.zeros_like(token_R)) * self.parallel.tp
        grad = exact(self.grad_merged_TH[token_R])
        rows = self.back.product(grad, self._weight(token_R, slot_R))
        self.sums.add(rank_R, token_R, [rows])
        weights = self.back.dot(grad, exact(self.x_TH[token_R]))
        self.weight_sums.add(rank_R, token_R, [weights], slot_R)

    def _shared(self, expert: ExpertWeights) -> None:
        """The shared expert, for the tokens of each group of ranks that share it."""
        shared, groups = self.spec.shared, dict[tuple[int, int], list[RankShare]]()
        assert shared is not None
        whole = self.parallel.shared is SharedPlacement.REPLICATED
        for share in self.shares:
            groups.setdefault(share.tokens if whole else share.merged_tokens, []).append(share)
        steps, found = self.back.steps, []
        weight = steps.shared_gate(self.inputs.x_TH, self.inputs.weights) if shared.gate == "sigmoid" else None
        for tokens, shares in groups.items():
            size, hidden, at = shared.intermediate_size, self.spec.hidden_size, slice(*tokens)
            shares = shares[:1] if whole else shares
            cuts = [Cut(share.shared_columns, self._inner(share.shared_columns, size),
                        (0, hidden) if whole else share.outputs) for share in shares]
            rows = MLPRows(self.x_TH[at], self.grad_merged_TH[at], None if weight is None else weight.rows(at),
                           blocks=self.routing.shared.rows(at) if self.routing.shared else None)
            gradients = MLPBackward(self.back, expert, shared.mlp, cuts).run(rows)
            token_T = torch.arange(*tokens)
            for share, part in zip(shares, gradients.parts, strict=True):
                rank_T = torch.full_like(token_T, share.rank)
                self.sums.add(rank_T, token_T, part.x)
                if part.weights is not None:
                    self.gate_sums.add(rank_T, token_T, [part.weights])
            found.append(gradients.parameters)
        for name, parts in zip(SHARED_PARAMETERS, zip(*found, strict=True), strict=True):
            if present := [part for part in parts if part is not None]:
                self._compare_whole(name, over_groups(self.back, present))

    def _router(self) -> list[LinearGradients]:
        """Router, its further columns and the learned scale; what they add to the gradient of the tokens."""
        inputs, spec, weights, routing = self.inputs, self.spec, self.inputs.weights, self.routing
        if routing.scores is None:
            return []
        gated = spec.shared is not None and spec.shared.gate == "router"
        columns = self.gate_sums.parts() if gated else RankSums(self.parallel.size, len(self.x_TH), 0).parts()
        found = RouterBackward(self.back, routing.scores, routing.shared_logits, routing.ids_TK).run(
            self.weight_sums.parts(), columns)
        joined = []
        if weights.shared_gate_SH is not None and gated:
            joined.append(self._linear("shared_gate_SH", found.columns))
        if found.scale is not None:
            self._compare_whole("weight_scale_E", found.scale, Format.FP32)
        if inputs.logits_TE is None:
            return [*joined, self._linear("router_EH", found.logits, "router_bias_E")]
        logits, times = found.logits, 2 * self.parallel.size
        given = Rows(logits.total, logits.bound + self.back.rounded(logits.gauge, self.back.weights_in, times),
                     logits.variance + self.back.stores(logits.squares, self.back.weights_in, times))
        self._compare_tokens("logits_TE", given.masked(~self.judged_T[:, None]), Format.FP32)
        for name in ("router_EH", "router_bias_E"):
            if name in self.shapes:
                self._compare_whole(name, exact(torch.zeros(self.shapes[name])))
        return joined

    def _sigmoid_gate(self) -> list[LinearGradients]:
        """v = sigmoid(l): d_l = v (1 - v) d_v, where 1 - v may cancel."""
        if self.spec.shared is None or self.spec.shared.gate != "sigmoid":
            return []
        back, grad = self.back, self.gate_sums.parts()
        gate = back.steps.shared_gate(self.inputs.x_TH, self.inputs.weights)
        slope_TS = gate.value * (1 - gate.value)
        off_TS = gate.bound + 8 * back.steps.model.evaluation_unit * gate.largest
        stored = back.rounded(grad.gauge, back.weights_in, 2 * self.parallel.size)
        error = (grad.bound + stored) * (slope_TS + off_TS) + grad.gauge * off_TS
        error = error + back.rounded(grad.gauge * (slope_TS + off_TS), back.logits_in, 3)
        known = grad.variance + back.stores(grad.squares, back.weights_in, 2 * self.parallel.size)
        slope_off_TS = spread(gate) + (2 * back.steps.model.evaluation_unit * gate.value).square()
        variance = (known * slope_TS.square() + grad.squares * slope_off_TS
                    + back.stores(grad.squares * slope_TS.square(), back.logits_in, 3))
        return [self._linear("shared_gate_SH", Parts(grad.value * slope_TS, error, variance))]

    def _linear(self, name: str, grad: Parts, bias: str = "") -> LinearGradients:
        """Compare the parameters of logits = x @ parameter^T + bias."""
        found = linear_backward(self.back, grad, self.x_TH, getattr(self.inputs.weights, name), self.token_parts)
        self._compare_whole(name, found.weight)
        if bias in self.shapes:
            self._compare_whole(bias, found.bias)
        return found

    def _meter(self, name: str, num_columns: int) -> StageMeter:
        stage, largest = gradient_stage(name), self.back.steps.model.largest(self.back.leaf)
        return self.meters.setdefault(stage, StageMeter(stage, num_columns, largest, whole_layer=True,
                                                        sigmas_allowed=self.sigmas_allowed,
                                                        watch=self.watched.get(stage)))

    def _compare_whole(self, name: str, found: Rows, leaf: Format | None = None) -> None:
        """A parameter that is no routed expert's, on every rank."""
        for share in self.shares:
            self._compare(name, found, share.rank, leaf=leaf)

    def _compare(self, name: str, found: Rows, rank: int, expert: int | None = None, place: int | None = None,
                 leaf: Format | None = None) -> None:
        """One rank's part of a parameter; nothing is said of any where a hidden choice may be another."""
        if not self.all_judged and name != "output_bias_H":
            return
        found, got = self.back.finished(found, leaf), self.ranks[rank][gradient_stage(name)]
        got = got if place is None else got[place]
        dim, axes, starts = placements(self.parallel)[name].shard_dim, name.rpartition("_")[2], [0, 0]
        if dim is not None and len(axes) - dim <= 2:
            starts[dim - len(axes)] = part_range(name, self.shapes[name][dim], self.parallel, rank)[0]
        want = found.mapped(lambda one: rank_part(name, one, self.parallel, rank))
        matrices = range(len(_matrices(got)))
        meter = self._meter(name, self.shapes[name][-1])
        for number in matrices:
            row = starts[0] + number * (self.shapes[name][-2] if len(axes) > 1 else 1)
            meter.add(_matrices(got)[number], want.mapped(lambda one, number=number: _matrices(one)[number]),
                      Place(rank, None, expert=expert, column=starts[1], row=row))

    def _compare_tokens(self, name: str, found: Rows, leaf: Format | None = None) -> None:
        found = self.back.finished(found, leaf)
        meter = self._meter(name, found.value.shape[1])
        for share in self.shares:
            at = slice(*share.tokens)
            meter.add(self.ranks[share.rank][gradient_stage(name)], found.rows(at),
                      Place(share.rank, torch.arange(*share.tokens)))


def _matrices(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The matrices along the first axis; a vector is a row."""
    return tensor.unbind() if tensor.dim() == 3 else (torch.atleast_2d(tensor),)


def forward_part(ranks: list[RankTensors]) -> list[RankTensors]:
    """What ranks showed besides gradients."""
    return [{stage: one for stage, one in tensors.items() if not stage.is_gradient} for tensors in ranks]


def measure_case(case: Case, inputs: Inputs, ranks: list[RankTensors], capabilities: Capabilities,
                 model: RoundingModel, tell: Callable[[str], None] = lambda text: None,
                 watched: Watched = MappingProxyType({})) -> Measurement:
    """Compare what every rank showed: the forward pass as `measure` does, then gradients where the case has them."""
    shown = forward_part(ranks)
    forward = measure(case, inputs, shown, capabilities, model, tell, watched)
    if case.direction is Direction.FORWARD or forward.struct_faults:
        return forward
    if faults := gradient_faults(case, inputs, ranks):
        return replace(forward, struct_faults=tuple(faults))
    shares, numerics = rank_shares(case), capabilities.contract(case.problem)
    expanded = over_all_tokens(shown, shares, case.problem.num_tokens)
    followed = measure_routing(inputs, expanded, [one.tokens for one in shares], numerics, capabilities, model,
                               math.inf).followed
    routing = gradient_routing(inputs, expanded, followed, Steps(case.problem.spec, numerics, model))
    comparison = GradientComparison(case, inputs, ranks, numerics, model, routing, followed.judged_T, watched)
    comparison.run(tell)
    weakest = min(forward.power, power(comparison.meters))
    stages = [meter.result() for meter in comparison.meters.values() if meter.num_checked]
    found = replace(forward, stages=(*forward.stages, *stages), power=weakest)
    return found if found.differing_ranks else differing(found, case, ranks)
