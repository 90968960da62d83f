"""One streaming pass over experts: truth, gauges and the comparison of every stage with its own inputs' truth.

Two chains run side by side. The FED chain starts anew at every stage the subject shows: act is judged
from x, down from the subject's act and weights, merged from its down, reduced from its merged rows. The
OUTPUT chain never looks at the subject's rows: the unsharded oracle with the propagated bound. Routing choices are
the subject's own in both, once they are accepted.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.case import Case
from moe_ref.contract.spec import MLP
from moe_ref.contract.vocabulary import Format, Stage
from moe_ref.contract.weights import ExpertWeights
from moe_ref.inputs.build import Inputs
from moe_ref.oracle import expert as formula
from moe_ref.records.schema import from_number
from moe_ref.verify.bounds import RoundingModel
from moe_ref.verify.measure_routing import FollowedRouting, RankTensors, measure_routing
from moe_ref.verify.measurement import Measurement
from moe_ref.verify.stage_meter import Place, StageMeter
from moe_ref.verify.structure import struct_faults


@dataclass
class Partials:
    """Per rank and token: a partial sum's value, its bound and the sum of absolute addends, (tp, T, H) fp64."""

    value: torch.Tensor
    bound: torch.Tensor
    gauge: torch.Tensor

    @classmethod
    def zeros(cls, ranks: int, shape: torch.Size) -> "Partials":
        return cls(*(torch.zeros(ranks, *shape, dtype=torch.float64) for _ in range(3)))

    def add(self, rank: int, token_R: torch.Tensor, rows: "Rows") -> None:
        self.value[rank].index_add_(0, token_R, rows.value)
        self.bound[rank].index_add_(0, token_R, rows.bound)
        self.gauge[rank].index_add_(0, token_R, rows.value.abs() + rows.bound)


@dataclass(frozen=True)
class Rows:
    """A block of rows of one expert: values and their bound."""

    value: torch.Tensor
    bound: torch.Tensor


@dataclass(frozen=True)
class DownRows:
    """Down rows as they are stored, and as they are summed; the same unless the weight joins at the merge."""

    stored: Rows
    addend: Rows


@dataclass(frozen=True)
class Chosen:
    """The rows of one expert: token, slot and routed row (token * K + slot)."""

    token_R: torch.Tensor
    slot_R: torch.Tensor
    row_R: torch.Tensor
    expert: int | None


class Comparison:
    """State of one pass; `measure` below is the way in."""

    def __init__(self, case: Case, inputs: Inputs, ranks: list[RankTensors], numerics: Numerics,
                 model: RoundingModel, followed: FollowedRouting) -> None:
        self.case, self.inputs, self.ranks = case, inputs, ranks
        self.numerics, self.model, self.followed = numerics, model, followed
        self.spec = case.problem.spec
        shape = inputs.x_TH.shape
        self.fed, self.real = (Partials.zeros(case.parallel.tp, shape) for _ in range(2))
        self.truth_TH = torch.zeros(shape, dtype=torch.float64)
        self.differing_ranks: list[int] = []
        widths = {Stage.GATE_UP: 2 * self.spec.intermediate_size, Stage.ACT: self.spec.intermediate_size}
        stored = {**numerics.storage, Stage.OUTPUT: numerics.storage.get(Stage.REDUCED)}
        self.meters = {stage: StageMeter(stage, widths.get(stage, shape[1]), model.largest(stored.get(stage)))
                       for stage in Stage}

    def shows(self, stage: Stage) -> bool:
        return stage in self.ranks[0]

    def stored(self, stage: Stage) -> Format | None:
        return self.numerics.storage.get(stage)

    def run(self, tell: Callable[[str], None]) -> None:
        for e in range(self.spec.num_experts):
            tell(f"oracle, expert {e + 1} of {self.spec.num_experts}")
            token_R, slot_R = (self.followed.ids_TK == e).nonzero(as_tuple=True)
            if len(token_R):
                chosen = Chosen(token_R, slot_R, token_R * self.spec.top_k + slot_R, e)
                self._routed(chosen, self.inputs.weights.expert(e))
        if shared := self.inputs.weights.shared_expert():
            self._shared(shared)
        self._merged()
        self._reduced()

    def _routed(self, chosen: Chosen, weights: ExpertWeights) -> None:
        act = self._activate(chosen, weights, self.spec.experts)
        real_weight = Rows(*(t[chosen.token_R, chosen.slot_R, None] for t in (self.followed.weights_TK,
                                                                              self.followed.bound_TK)))
        self.truth_TH.index_add_(0, chosen.token_R, real_weight.value * formula.down(act.value, weights.w2_HI))
        for rank, (start, stop) in enumerate(self.case.parallel.ranges(self.spec.intermediate_size)):
            w2_HI = weights.w2_HI[:, start:stop].double()
            own = Rows(act.value[:, start:stop], act.bound[:, start:stop])
            self.real.add(rank, chosen.token_R, self._down(own, real_weight, w2_HI, Stage.DOWN).addend)
            fed_act, fed_weight = self._fed_act(rank, chosen, own), real_weight
            if self.shows(Stage.ACT):
                got = self.ranks[rank][Stage.ACT][chosen.row_R]
                self.meters[Stage.ACT].add(got, fed_act.value, fed_act.bound, self._place(rank, chosen, start))
                fed_act = exact(got)
            if self.shows(Stage.WEIGHTS):
                fed_weight = exact(self.ranks[rank][Stage.WEIGHTS][chosen.token_R, chosen.slot_R, None])
            self._judge_down(rank, chosen, self._down(fed_act, fed_weight, w2_HI, Stage.DOWN), fed_weight, Stage.DOWN)

    def _judge_down(self, rank: int, chosen: Chosen, want: DownRows, weight: Rows, stage: Stage) -> None:
        addend = want.addend
        if self.shows(stage):
            got = self.ranks[rank][stage][chosen.row_R]
            self.meters[stage].add(got, want.stored.value, want.stored.bound, self._place(rank, chosen, 0))
            addend = self._weigh(exact(got), weight) if self._weighs_at_merge(stage) else exact(got)
        self.fed.add(rank, chosen.token_R, addend)

    def _shared(self, weights: ExpertWeights) -> None:
        assert self.spec.shared is not None
        token_T = torch.arange(len(self.inputs.x_TH))
        chosen = Chosen(token_T, torch.zeros_like(token_T), token_T, None)
        act = self._activate(chosen, weights, self.spec.shared.mlp)
        gate = self._shared_gate()
        self.truth_TH += gate.value * formula.down(act.value, weights.w2_HI)
        for rank, (start, stop) in enumerate(self.case.parallel.ranges(self.spec.shared.intermediate_size)):
            own = Rows(act.value[:, start:stop], act.bound[:, start:stop])
            real = self._down(own, gate, weights.w2_HI[:, start:stop].double(), Stage.SHARED)
            self.real.add(rank, token_T, real.addend)
            self._judge_down(rank, chosen, real, gate, Stage.SHARED)

    def _shared_gate(self) -> Rows:
        x_TH, gate_SH = self.inputs.x_TH.double(), self.inputs.weights.shared_gate_SH
        if gate_SH is None:
            return exact(torch.ones(len(x_TH), 1))
        logit_T1, gauge_T1 = x_TH @ gate_SH.double().T, x_TH.abs() @ gate_SH.double().abs().T
        bound_T1 = self.model.summed(gauge_T1, x_TH.shape[1])
        bound_T1 = bound_T1 + self.model.rounded(logit_T1.abs() + bound_T1, self.stored(Stage.LOGITS))
        value_T1 = torch.sigmoid(logit_T1)
        units = self.model.tolerances.file.evaluations.score.units + logit_T1.abs()
        error_T1 = value_T1 * (torch.expm1(2 * bound_T1) + units * self.model.evaluation_unit)
        return Rows(value_T1, error_T1 + self.model.rounded(value_T1, self.stored(Stage.WEIGHTS)))

    def _activate(self, chosen: Chosen, weights: ExpertWeights, mlp: MLP) -> Rows:
        """act of full width from exact tokens, with its bound."""
        x_RH = self.inputs.x_TH[chosen.token_R]
        gate_up = formula.gate_up(x_RH, weights.w13_GIH)
        bound = self.model.summed(formula.gate_up(x_RH.abs(), weights.w13_GIH.abs()), x_RH.shape[1])
        bound = bound + self.model.rounded(gate_up.abs() + bound, self.stored(Stage.GATE_UP))
        if chosen.expert is not None and self.shows(Stage.GATE_UP):
            self._judge_gate_up(chosen, gate_up, bound)
        return self._activated(gate_up, bound, mlp)

    def _activated(self, gate_up: torch.Tensor, bound: torch.Tensor, mlp: MLP) -> Rows:
        act = formula.activate(gate_up, mlp)
        error = self.model.activated(gate_up[:, 0], gate_up[:, 1], act, bound[:, 0], bound[:, 1], mlp)
        return Rows(act, error + self.model.rounded(act.abs() + error, self.stored(Stage.ACT)))

    def _fed_act(self, rank: int, chosen: Chosen, own: Rows) -> Rows:
        """What act should be: from the subject's gate_up where it is shown, from the tokens otherwise."""
        if not self.shows(Stage.GATE_UP):
            return own
        gate_up = self.ranks[rank][Stage.GATE_UP][chosen.row_R].double()
        return self._activated(gate_up, torch.zeros_like(gate_up), self.spec.experts)

    def _judge_gate_up(self, chosen: Chosen, want: torch.Tensor, bound: torch.Tensor) -> None:
        intermediate = self.spec.intermediate_size
        for rank, (start, stop) in enumerate(self.case.parallel.ranges(intermediate)):
            got = self.ranks[rank][Stage.GATE_UP][chosen.row_R]
            for half in (0, 1):
                self.meters[Stage.GATE_UP].add(got[:, half], want[:, half, start:stop], bound[:, half, start:stop],
                                               self._place(rank, chosen, half * intermediate + start))

    def _weighs_at_merge(self, stage: Stage) -> bool:
        return stage is Stage.DOWN and self.numerics.weight_at == "merge"

    def _down(self, act: Rows, weight: Rows, w2_HI: torch.Tensor, stage: Stage) -> DownRows:
        """act @ w2^T with the bound of the sum, weighted before or after the store."""
        value = act.value @ w2_HI.T
        gauge = (act.value.abs() + act.bound) @ w2_HI.abs().T
        bound = act.bound @ w2_HI.abs().T + self.model.summed(gauge, max(1, w2_HI.shape[1]))
        if self.numerics.weight_at == "merge":
            stored = self._stored(Rows(value, bound), stage)
            weighted = self._weigh(stored, weight)
            if stage is Stage.SHARED:
                # Whether the gate comes before or after the store, or between two, is not declared: allow for all.
                weighted = stored = self._stored(weighted, stage)
            return DownRows(stored, weighted)
        stored = self._stored(self._weigh(Rows(value, bound), weight), stage)
        return DownRows(stored, stored)

    def _weigh(self, rows: Rows, weight: Rows) -> Rows:
        """weight * rows, one product in the accumulation format."""
        value = weight.value * rows.value
        error = weight.value.abs() * rows.bound + weight.bound * (rows.value.abs() + rows.bound)
        return Rows(value, error + self.model.evaluation_unit * (value.abs() + error))

    def _stored(self, rows: Rows, stage: Stage) -> Rows:
        return Rows(rows.value, rows.bound + self.model.rounded(rows.value.abs() + rows.bound, self.stored(stage)))

    def _merged(self) -> None:
        num_addends = self.spec.top_k + (self.spec.shared is not None)
        # What travels between ranks is rounded to that format even where no rounding of merged rows is declared.
        stored = self.stored(Stage.MERGED) or (self.numerics.reduce if self.case.parallel.tp > 1 else None)
        for partials in (self.fed, self.real):
            error = partials.bound + self.model.summed(partials.gauge, num_addends)
            partials.bound = error + self.model.rounded(partials.value.abs() + error, stored)
            partials.gauge = partials.value.abs() + partials.bound
        if self.shows(Stage.MERGED):
            for rank, tensors in enumerate(self.ranks):
                got = tensors[Stage.MERGED]
                place = Place(rank, torch.arange(len(got)))
                self.meters[Stage.MERGED].add(got, self.fed.value[rank], self._unjudged(self.fed.bound[rank]), place)
            merged = torch.stack([tensors[Stage.MERGED].double() for tensors in self.ranks])
            self.fed = Partials(merged, torch.zeros_like(merged), merged.abs())

    def _reduced(self) -> None:
        residual = self.inputs.residual_TH
        added = torch.zeros_like(self.truth_TH) if residual is None else residual.double()
        self.truth_TH += added
        for stage, want, partials in ((Stage.REDUCED, self.fed.value.sum(0) + added, self.fed),
                                      (Stage.OUTPUT, self.truth_TH, self.real)):
            allowed = self._unjudged(self._reduction_bound(partials, want, residual))
            for rank, tensors in enumerate(self.ranks):
                place = Place(rank, torch.arange(len(want)))
                self.meters[stage].add(tensors[Stage.REDUCED], want, allowed, place)
                if stage is Stage.REDUCED and not torch.equal(bits(tensors[stage]), bits(self.ranks[0][stage])):
                    self.differing_ranks.append(rank)

    def power(self) -> float:
        """How far an all-zero result would miss its bound; see Measurement."""
        if not self.truth_TH.numel():
            return torch.inf
        chain = [self.meters[stage].power for stage in (Stage.ACT, Stage.DOWN, Stage.MERGED) if self.shows(stage)]
        shown = min([*chain, self.meters[Stage.REDUCED].power]) if len(chain) == 3 else 0.0
        return max(shown, self.meters[Stage.OUTPUT].power)

    def _reduction_bound(self, partials: Partials, want: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """tp - 1 additions, each rounded in the reduction's format in whatever order; then the residual's.

        The residual may join any of the partial sums or their total, as long as it joins once.
        """
        bound, additions = partials.bound.sum(0), self.case.parallel.tp - 1
        summed_in = self.numerics.reduce if additions else self.stored(Stage.MERGED)
        gauge = partials.gauge.sum(0) + bound
        if residual is not None:
            gauge, additions = gauge + residual.double().abs(), additions + 1
        bound = bound + additions * self.model.rounded(gauge, summed_in)
        if residual is not None or summed_in != self.stored(Stage.REDUCED):
            bound = bound + self.model.rounded(want.abs() + bound, self.stored(Stage.REDUCED))
        return bound

    def _unjudged(self, bound_TH: torch.Tensor) -> torch.Tensor:
        """Tokens whose choice is hidden and ambiguous are not judged: their bound is infinite."""
        return bound_TH.masked_fill(~self.followed.judged_T[:, None], torch.inf)

    def _place(self, rank: int, chosen: Chosen, column: int) -> Place:
        return Place(rank, chosen.token_R, chosen.slot_R, chosen.expert, column)


def exact(value: torch.Tensor) -> Rows:
    """Rows that carry no error: the subject's own, taken as the inputs of the next stage."""
    return Rows(value.double(), torch.zeros(value.shape, dtype=torch.float64))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, for comparisons in which NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)


def measure(case: Case, inputs: Inputs, ranks: list[RankTensors], capabilities: Capabilities,
            model: RoundingModel, tell: Callable[[str], None] = lambda text: None) -> Measurement:
    """Compare what every rank showed; ranks[r][REDUCED] is the output of rank r, the rest is optional."""
    numerics = capabilities.numerics[case.problem.dtype]
    if faults := struct_faults(case, ranks, capabilities):
        return Measurement((), tuple(faults))
    routing = measure_routing(inputs, ranks, numerics, capabilities, model)
    comparison = Comparison(case, inputs, ranks, numerics, model, routing.followed)
    comparison.run(tell)
    unjudged = int((~routing.followed.judged_T).sum())
    if unjudged:
        comparison.meters[Stage.OUTPUT].notes.append(f"{unjudged} tokens not judged: ids hidden, choice ambiguous")
    shown = [meter.result() for meter in comparison.meters.values() if meter.num_checked]
    stages = (*routing.stages, *shown)
    assert all(from_number(stage.ratio) >= 0 for stage in stages)
    return Measurement(stages, power=comparison.power(), unjudged_tokens=unjudged,
                       differing_ranks=tuple(comparison.differing_ranks))
