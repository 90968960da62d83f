"""One streaming pass over experts: truth, gauges and the comparison of every stage with its own inputs' truth.

Two chains run side by side. The FED chain starts anew at every stage the subject shows: act is judged
from x, down from the subject's act and weights, merged from its down, reduced from its merged rows. The
OUTPUT chain (output_chain.py) never looks at the subject's rows: the unsharded oracle with the propagated bound.
Routing choices are the subject's own in both, once they are accepted.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.case import Case
from moe_ref.contract.vocabulary import Stage
from moe_ref.contract.weights import ExpertWeights
from moe_ref.inputs.build import Inputs
from moe_ref.records.schema import from_number
from moe_ref.verify.bounds.output_chain import ExpertRows, OutputChain
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.bounds.rows import DownRows, Partials, Rows, exact
from moe_ref.verify.bounds.steps import Steps
from moe_ref.verify.measure.measurement import Measurement
from moe_ref.verify.measure.routing import FollowedRouting, RankTensors, measure_routing, tainted_tokens
from moe_ref.verify.measure.stage_meter import Place, StageMeter
from moe_ref.verify.measure.structure import struct_faults


@dataclass(frozen=True)
class Chosen:
    """The rows of one expert: token, slot and routed row (token * K + slot)."""

    token_R: torch.Tensor
    slot_R: torch.Tensor
    row_R: torch.Tensor
    expert: int

    def place(self, rank: int, column: int) -> Place:
        """Where a block of these rows sits."""
        return Place(rank, self.token_R, self.slot_R, self.expert, column)


class Comparison:
    """State of one pass; `measure` below is the way in."""

    def __init__(self, case: Case, inputs: Inputs, ranks: list[RankTensors], numerics: Numerics,
                 model: RoundingModel, followed: FollowedRouting) -> None:
        self.case, self.inputs, self.ranks, self.followed = case, inputs, ranks, followed
        self.spec = case.problem.spec
        self.steps = Steps(self.spec, numerics, model)
        self.chain = OutputChain(self.steps, inputs.x_TH, case.parallel)
        self.fed = Partials.zeros(case.parallel.tp, inputs.x_TH)
        self.differing_ranks: list[int] = []
        intermediate, projections = self.spec.intermediate_size, self.spec.experts.num_projections
        widths = {Stage.GATE_UP: projections * intermediate, Stage.ACT: intermediate}
        stored = {**numerics.storage, Stage.OUTPUT: numerics.storage.get(Stage.REDUCED)}
        tainted_T = tainted_tokens(inputs)
        self.meters = {stage: StageMeter(stage, widths.get(stage, self.spec.hidden_size),
                                         model.largest(stored.get(stage)), tainted_T=tainted_T) for stage in Stage}

    def shows(self, stage: Stage) -> bool:
        return stage in self.ranks[0]

    def run(self, tell: Callable[[str], None]) -> None:
        for e in range(self.spec.num_choices):
            tell(f"oracle, expert {e + 1} of {self.spec.num_choices}")
            token_R, slot_R = (self.followed.ids_TK == e).nonzero(as_tuple=True)
            if len(token_R) == 0:
                continue
            chosen = Chosen(token_R, slot_R, token_R * self.spec.top_k + slot_R, e)
            weight = Rows(*(tensor[token_R, slot_R, None] for tensor in (self.followed.weights.value,
                                                                         self.followed.weights.bound)))
            if e < self.spec.num_experts:
                self._routed(chosen, self.inputs.weights.expert(e), weight)
            else:
                self._identity(chosen, weight)
        if shared := self.inputs.weights.shared_expert():
            self._shared(shared)
        self._merged()
        self._reduced()

    def _routed(self, chosen: Chosen, expert: ExpertWeights, weight: Rows) -> None:
        real = self.chain.routed(chosen.token_R, expert, weight)
        for rank, (start, stop) in enumerate(self.case.parallel.ranges(self.spec.intermediate_size)):
            own_weight = self._own_weight(rank, chosen, weight)
            gate_up = self._fed_gate_up(rank, chosen, expert, real, own_weight).columns(start, stop)
            if self.shows(Stage.GATE_UP):
                gate_up = self._judge_gate_up(rank, chosen, gate_up, start)
            act = self._fed_act(gate_up, real.act.columns(start, stop), own_weight)
            if self.shows(Stage.ACT):
                got = self.ranks[rank][Stage.ACT][chosen.row_R]
                self.meters[Stage.ACT].add(got, act.value, act.bound, chosen.place(rank, start))
                act = exact(got)
            share = expert._replace(w2_HI=expert.w2_HI[:, start:stop])
            self._judge_down(rank, chosen, self.steps.down(act, share, own_weight, rank == 0), own_weight)

    def _own_weight(self, rank: int, chosen: Chosen, weight: Rows) -> Rows:
        """The rank's own routing weights where it shows them."""
        if not self.shows(Stage.WEIGHTS):
            return weight
        return exact(self.ranks[rank][Stage.WEIGHTS][chosen.token_R, chosen.slot_R, None])

    def _fed_gate_up(self, rank: int, chosen: Chosen, expert: ExpertWeights, real: ExpertRows,
                     weight: Rows) -> Rows:
        """What gate_up should be: the output chain's, unless the rank's own weights are part of its input."""
        if not (self.steps.on_input and self.shows(Stage.WEIGHTS)):
            return real.gate_up
        return self.steps.gate_up(self.steps.tokens(self.inputs.x_TH[chosen.token_R], weight), expert)

    def _judge_gate_up(self, rank: int, chosen: Chosen, want: Rows, start: int) -> Rows:
        got = self.ranks[rank][Stage.GATE_UP][chosen.row_R]
        for g in range(got.shape[1]):
            self.meters[Stage.GATE_UP].add(got[:, g], want.value[:, g], want.bound[:, g],
                                           chosen.place(rank, g * self.spec.intermediate_size + start))
        return exact(got)

    def _fed_act(self, gate_up: Rows, real: Rows, weight: Rows) -> Rows:
        """What act should be: from the subject's gate_up and weights where they are shown."""
        weighted = self.steps.on_input or self.steps.act_weight(weight) is not None
        if not self.shows(Stage.GATE_UP) and not (weighted and self.shows(Stage.WEIGHTS)):
            return real
        return self.steps.act(gate_up, self.spec.experts, self.steps.act_weight(weight))

    def _identity(self, chosen: Chosen, weight: Rows) -> None:
        self.chain.identity(chosen.token_R, weight)
        x_RH = self.inputs.x_TH[chosen.token_R].double()
        for rank in range(self.case.parallel.tp):
            own_weight = self._own_weight(rank, chosen, weight)
            self._judge_down(rank, chosen, self.steps.identity(x_RH, own_weight, rank == 0), own_weight)

    def _judge_down(self, rank: int, chosen: Chosen, want: DownRows, weight: Rows) -> None:
        addend = want.addend
        if self.shows(Stage.DOWN):
            got = self.ranks[rank][Stage.DOWN][chosen.row_R]
            self.meters[Stage.DOWN].add(got, want.stored.value, want.stored.bound, chosen.place(rank, 0))
            weighs_later = self.steps.numerics.weight_at == "merge" and not self.steps.on_input
            addend = self.steps.weigh(exact(got), weight) if weighs_later else exact(got)
        self.fed.add(rank, chosen.token_R, addend)

    def _shared(self, expert: ExpertWeights) -> None:
        gates, token_T = self.followed.shared, torch.arange(len(self.inputs.x_TH))
        if self.spec.shared is not None and self.spec.shared.gate == "sigmoid":
            gates = self.steps.shared_gate(self.inputs.x_TH, self.inputs.weights)
        for rank, rows in enumerate(self.chain.shared(expert, gates)):
            if self.shows(Stage.SHARED):
                got = self.ranks[rank][Stage.SHARED]
                self.meters[Stage.SHARED].add(got, rows.value, rows.bound, Place(rank, token_T))
                rows = exact(got)
            self.fed.add(rank, token_T, rows)

    def _merged(self) -> None:
        self.fed = self.steps.merged(self.fed, self.inputs.weights.output_bias_H)
        if not self.shows(Stage.MERGED):
            return
        for rank, tensors in enumerate(self.ranks):
            got = tensors[Stage.MERGED]
            self.meters[Stage.MERGED].add(got, self.fed.value[rank], self._unjudged(self.fed.bound[rank]),
                                          Place(rank, torch.arange(len(got))))
        merged = torch.stack([tensors[Stage.MERGED].double() for tensors in self.ranks])
        self.fed = Partials(merged, torch.zeros_like(merged), merged.abs())

    def _reduced(self) -> None:
        residual = self.inputs.residual_TH
        bound_TH = self.chain.finish(residual, self.inputs.weights.output_bias_H)
        want_TH = self.fed.value.sum(0) if residual is None else self.fed.value.sum(0) + residual.double()
        fed_bound_TH = self.steps.reduced(self.fed, want_TH, residual)
        for stage, want, bound in ((Stage.REDUCED, want_TH, fed_bound_TH),
                                   (Stage.OUTPUT, self.chain.truth_TH, bound_TH)):
            allowed = self._unjudged(bound)
            for rank, tensors in enumerate(self.ranks):
                place = Place(rank, torch.arange(len(want)))
                self.meters[stage].add(tensors[Stage.REDUCED], want, allowed, place)
        first = bits(self.ranks[0][Stage.REDUCED])
        self.differing_ranks = [rank for rank, tensors in enumerate(self.ranks)
                                if not torch.equal(bits(tensors[Stage.REDUCED]), first)]

    def power(self) -> float:
        """How far an all-zero result would miss its bound; see Measurement."""
        if not self.chain.truth_TH.numel():
            return torch.inf
        chain = [self.meters[stage].power for stage in (Stage.ACT, Stage.DOWN, Stage.MERGED) if self.shows(stage)]
        shown = min([*chain, self.meters[Stage.REDUCED].power]) if len(chain) == 3 else 0.0
        return max(shown, self.meters[Stage.OUTPUT].power)

    def _unjudged(self, bound_TH: torch.Tensor) -> torch.Tensor:
        """Tokens whose choice is hidden and ambiguous are not judged: their bound is infinite."""
        return bound_TH.masked_fill(~self.followed.judged_T[:, None], torch.inf)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, every NaN the same."""
    return torch.where(torch.isnan(tensor), torch.nan, tensor).contiguous().view(torch.uint8)


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
