"""One streaming pass over experts: truth, gauges and the comparison of every stage with its own inputs' truth.

Two chains run side by side. The FED chain starts anew at every stage the subject shows: act is judged
from x, down from the subject's act and weights, merged from its down, reduced from its merged rows. The
OUTPUT chain (output_chain.py) never looks at the subject's rows: the unsharded oracle with the propagated bound.
Routing choices are the subject's own in both, once they are accepted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import torch

from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.case import Case
from moe_ref.contract.parallel import Range
from moe_ref.contract.shares import RankShare, rank_shares
from moe_ref.contract.vocabulary import Data, Format, SharedPlacement, Stage
from moe_ref.contract.weights import ExpertWeights
from moe_ref.inputs.build import Inputs
from moe_ref.records.schema import from_number
from moe_ref.verify.bounds.limits import Limits, likely_limits
from moe_ref.verify.bounds.output_chain import ExpertRows, OutputChain, down_part
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.bounds.rows import DownRows, Partials, Rows, exact, joined_columns
from moe_ref.verify.bounds.steps import EncodedOperands, Steps
from moe_ref.verify.bounds.summing import Summing
from moe_ref.verify.decoded import decoded_inputs
from moe_ref.verify.measure.measurement import Measurement
from moe_ref.verify.measure.operand_stages import OperandStages
from moe_ref.verify.measure.output_statistics import Beside, OutputStatistics
from moe_ref.verify.measure.placing import RankTensors, over_all_tokens, row_positions, servers, whole_output
from moe_ref.verify.measure.power import Mutants, zeros
from moe_ref.verify.measure.routing import FollowedRouting, measure_routing, tainted_tokens
from moe_ref.verify.measure.stage_meter import Place, StageMeter, Watched
from moe_ref.verify.measure.structure import struct_faults


@dataclass(frozen=True)
class Chosen:
    """The rows of one expert: token, slot, routed row (token * K + slot), and the ep rank that serves each."""

    token_R: torch.Tensor
    slot_R: torch.Tensor
    row_R: torch.Tensor
    server_R: torch.Tensor
    expert: int

    def of(self, index_R: torch.Tensor) -> "Chosen":
        """Some of the rows."""
        return Chosen(self.token_R[index_R], self.slot_R[index_R], self.row_R[index_R], self.server_R[index_R],
                      self.expert)

    def place(self, rank: int, column: int) -> Place:
        """Where a block of these rows sits."""
        return Place(rank, self.token_R, self.slot_R, self.expert, column)


class Comparison:
    """State of one pass; `measure` below is the way in."""

    def __init__(self, case: Case, inputs: Inputs, ranks: list[RankTensors], numerics: Numerics,
                 model: RoundingModel, followed: FollowedRouting, limits: Limits, watched: Watched) -> None:
        self.case, self.inputs, self.ranks, self.followed = case, inputs, ranks, followed
        self.spec, self.shares = case.problem.spec, rank_shares(case)
        self.routing = over_all_tokens(ranks, self.shares, case.problem.num_tokens)
        self.steps = Steps(self.spec, numerics, model, EncodedOperands.of(inputs))
        self.statistics = OutputStatistics(whole_output(ranks, self.shares, len(inputs.x_TH)),
                                           model.tolerances.file.checks.output, self.routed_rows,
                                           coarsest_sum(numerics, model), beside(case))
        self.chain = OutputChain(self.steps, inputs.x_TH, case.parallel, self.shares, self.statistics)
        self.fed = Summing(self.steps, inputs.x_TH, case.parallel, self.shares)
        self.server_TK = servers(followed.ids_TK, case, self.shares)
        shown_TK = servers(self.routing[0][Stage.IDS], case, self.shares) if self.shows(Stage.IDS) else self.server_TK
        self.positions = [row_positions(shown_TK, share, case.parallel.ep) for share in self.shares]
        self.differing_ranks: list[int] = []
        intermediate, projections = self.spec.intermediate_size, self.spec.experts.num_projections
        widths = {Stage.GATE_UP: projections * intermediate, Stage.ACT: intermediate, Stage.ACT_CODES: intermediate}
        stored = {**numerics.storage, Stage.OUTPUT: numerics.storage.get(Stage.REDUCED)}
        self.tainted_T = tainted_tokens(inputs)
        self.meters = {stage: StageMeter(stage, widths.get(stage, self.spec.hidden_size),
                                         model.largest(stored.get(stage)), self.tainted_T,
                                         limits.output if stage is Stage.OUTPUT else limits.stage,
                                         whole_layer=stage is Stage.OUTPUT,
                                         exact=inputs.problem.data is Data.EXACT, watch=watched.get(stage))
                       for stage in Stage}
        self.operands = OperandStages(self.steps, self.shows, self.judge_rows)
        self.mutants = Mutants(inputs, self.steps, self.shares, followed, self.meters, ranks[0])

    @property
    def routed_rows(self) -> int:
        return self.case.problem.num_tokens * self.spec.top_k

    def shows(self, stage: Stage) -> bool:
        return stage in self.ranks[0]

    def run(self, tell: Callable[[str], None]) -> None:
        for e in range(self.spec.num_choices):
            tell(f"oracle, expert {e + 1} of {self.spec.num_choices}")
            token_R, slot_R = (self.followed.ids_TK == e).nonzero(as_tuple=True)
            if len(token_R) == 0:
                continue
            chosen = Chosen(token_R, slot_R, token_R * self.spec.top_k + slot_R, self.server_TK[token_R, slot_R], e)
            weight = self.followed.weights.mapped(lambda one, at=(token_R, slot_R): one[*at, None])
            if e < self.spec.num_experts:
                self._routed(chosen, self.inputs.weights.expert(e), weight)
            else:
                self._identity(chosen, weight)
        if shared := self.inputs.weights.shared_expert():
            self._shared(shared)
        self._merged()
        self._reduced()

    def _routed(self, chosen: Chosen, expert: ExpertWeights, weight: Rows) -> None:
        real = self.chain.routed(chosen.token_R, expert, weight, chosen.server_R, chosen.expert)
        if chosen.expert == self.mutants.expert:
            self.mutants.block_lost(chosen.token_R, expert, real, weight)
        for ep_rank in range(self.case.parallel.ep):
            index_R = (chosen.server_R == ep_rank).nonzero().flatten()
            if len(index_R):
                rows = ExpertRows(real.gate_up.rows(index_R), real.act.rows(index_R))
                self._served(ep_rank, chosen.of(index_R), expert, rows, weight.rows(index_R))

    def _served(self, ep_rank: int, chosen: Chosen, expert: ExpertWeights, real: ExpertRows, weight: Rows) -> None:
        """The rows of one expert that one ep rank serves, on each of its tp ranks."""
        tp = self.case.parallel.tp
        shares = self.shares[ep_rank * tp:(ep_rank + 1) * tp]
        acts = [self._fed_columns(share, chosen, expert, real, weight) for share in shares]
        inner = [share.columns for share in shares]
        if self.fed.by_output:  # every rank takes the activations of all
            whole = joined_columns(acts)
            acts, inner = [whole] * tp, [(0, self.spec.intermediate_size)] * tp
        parts = []
        for share, act, columns in zip(shares, acts, inner, strict=True):
            own_weight = self._own_weight(share.rank, chosen, weight)
            operand = self.operands.fed(Stage.ACT, share, chosen, act, columns[0])
            want = self.steps.down(act, down_part(expert, columns, share.outputs), own_weight,
                                   self.fed.by_output or share.tp_rank == 0, chosen.expert, columns[0], operand)
            parts.append(self._judge_down(share, chosen, want, own_weight))
        if chosen.expert == self.mutants.expert and tp > 1:
            first_R = torch.zeros_like(chosen.token_R) if self.fed.reduces_rows else tp * self.fed.home_ep(
                chosen.token_R, chosen.server_R)
            self.mutants.part_lost(chosen.token_R, first_R, parts, self.fed.reduces_rows)
        self.fed.add_routed(parts, chosen.token_R, chosen.server_R)

    def _fed_columns(self, share: RankShare, chosen: Chosen, expert: ExpertWeights, real: ExpertRows,
                     weight: Rows) -> Rows:
        """The activation of one rank, judged where it is shown and then taken as the subject's."""
        start, stop = share.columns
        own_weight = self._own_weight(share.rank, chosen, weight)
        gate_up = self._fed_gate_up(share, chosen, expert, real, own_weight).columns(start, stop)
        if self.shows(Stage.GATE_UP):
            gate_up = self._judge_gate_up(share, chosen, gate_up)
        act = self._fed_act(gate_up, real.act.columns(start, stop), own_weight)
        return self.judge_rows(Stage.ACT, share, chosen, act, start)

    def judge_rows(self, stage: Stage, share: RankShare, chosen: Chosen, want: Rows, column: int) -> Rows:
        """What the subject shows of these rows, after its comparison; what is wanted where it shows nothing.

        A token without finite logits may have lost its rows; nothing is said of them then.
        """
        if not self.shows(stage):
            return want
        position_R = self.positions[share.rank][chosen.row_R]
        there_R = position_R >= 0
        got = want.value.clone()
        got[there_R] = self.ranks[share.rank][stage][position_R[there_R]].double()
        self._judge(stage, got[there_R], want.rows(there_R), chosen.of(there_R).place(share.rank, column))
        return exact(got)

    def _own_weight(self, rank: int, chosen: Chosen, weight: Rows) -> Rows:
        """The rank's own routing weights, or those of the rank that sent the rows, where they are shown."""
        if not self.shows(Stage.WEIGHTS):
            return weight
        return exact(self.routing[rank][Stage.WEIGHTS][chosen.token_R, chosen.slot_R, None])

    def _fed_gate_up(self, share: RankShare, chosen: Chosen, expert: ExpertWeights, real: ExpertRows,
                     weight: Rows) -> Rows:
        """What gate_up should be: the output chain's, unless the rank's own weights or codes are part of its input."""
        with_weights = self.steps.on_input and self.shows(Stage.WEIGHTS)
        if not with_weights and not self.shows(Stage.PERMUTE_CODES):
            return real.gate_up
        tokens = self.steps.tokens(self.inputs.x_TH[chosen.token_R], weight)
        operand = self.operands.fed(Stage.PERMUTE, share, chosen, tokens, 0)
        return self.steps.gate_up(tokens, expert, chosen.expert, operand)

    def _judge_gate_up(self, share: RankShare, chosen: Chosen, want: Rows) -> Rows:
        halves = [self._judge_rows_of(g, share, chosen, want) for g in range(want.value.shape[1])]
        return exact(torch.stack(halves, 1))

    def _judge_rows_of(self, g: int, share: RankShare, chosen: Chosen, want: Rows) -> torch.Tensor:
        """One half of gate_up, whose columns follow those of the half before."""
        position_R = self.positions[share.rank][chosen.row_R]
        there_R = position_R >= 0
        got = want.value[:, g].clone()
        got[there_R] = self.ranks[share.rank][Stage.GATE_UP][position_R[there_R], g].double()
        column = g * self.spec.intermediate_size + share.columns[0]
        self._judge(Stage.GATE_UP, got[there_R], want.mapped(lambda one: one[there_R, g]),
                    chosen.of(there_R).place(share.rank, column))
        return got

    def _judge(self, stage: Stage, got: torch.Tensor, want: Rows, place: Place) -> None:
        self.meters[stage].add(got, want, place)
        self.mutants.stored(stage, want, place)

    def _fed_act(self, gate_up: Rows, real: Rows, weight: Rows) -> Rows:
        """What act should be: from the subject's gate_up and weights where they are shown."""
        weighted = self.steps.on_input or self.steps.act_weight(weight) is not None
        known = self.shows(Stage.GATE_UP) or self.shows(Stage.PERMUTE_CODES)
        if not known and not (weighted and self.shows(Stage.WEIGHTS)):
            return real
        return self.steps.act(gate_up, self.spec.experts, self.steps.act_weight(weight))

    def _identity(self, chosen: Chosen, weight: Rows) -> None:
        """With expert parallelism these rows are no rank's to show."""
        self.chain.identity(chosen.token_R, weight)
        first = torch.zeros_like(chosen.token_R)
        if self.case.parallel.ep > 1:
            x_RH, own_weight = self.inputs.x_TH[chosen.token_R].double(), self._own_weight(0, chosen, weight)
            self.fed.add_routed(self.chain.identity_parts(x_RH, own_weight), chosen.token_R, first)
            return
        parts = []
        for share in self.shares:
            own_weight = self._own_weight(share.rank, chosen, weight)
            x_RH = self.inputs.x_TH[chosen.token_R, slice(*share.outputs)].double()
            want = self.steps.identity(x_RH, own_weight, self.fed.by_output or share.tp_rank == 0)
            parts.append(self._judge_down(share, chosen, want, own_weight))
        self.fed.add_routed(parts, chosen.token_R, first)

    def _judge_down(self, share: RankShare, chosen: Chosen, want: DownRows, weight: Rows) -> Rows:
        """What the rank adds to its sum."""
        if not self.shows(Stage.DOWN):
            return want.addend
        got = self.judge_rows(Stage.DOWN, share, chosen, want.stored, share.outputs[0])
        return self.steps.weigh(got, weight) if self.steps.weighs_later else got

    def _shared(self, expert: ExpertWeights) -> None:
        gates = self.followed.shared
        if self.spec.shared is not None and self.spec.shared.gate == "sigmoid":
            gates = self.steps.shared_gate(self.inputs.x_TH, self.inputs.weights)
        whole = self.case.parallel.shared is SharedPlacement.REPLICATED
        parts = []
        for share, rows in zip(self.shares, self.chain.shared(expert, gates), strict=True):
            if self.shows(Stage.SHARED):
                got = self.ranks[share.rank][Stage.SHARED]
                token_T = torch.arange(*(share.tokens if whole else share.merged_tokens))
                self.meters[Stage.SHARED].add(got, rows,
                                              Place(share.rank, token_T, column=0 if whole else share.outputs[0]))
                rows = exact(got)
            parts.append(rows)
        self.fed.add_shared([self._assembled(parts)] if whole else parts)

    def _assembled(self, parts: list[Rows]) -> Rows:
        """Rows of all tokens from those that each rank has of its own."""
        whole = exact(torch.zeros(self.inputs.x_TH.shape, dtype=torch.float64))
        value, bound, variance = whole.value.clone(), whole.bound.clone(), whole.bound.clone()
        for share, rows in zip(reversed(self.shares), reversed(parts), strict=True):
            at = slice(*share.tokens)
            value[at], bound[at] = rows.value, rows.bound
            variance[at] = torch.inf if rows.variance is None else rows.variance
        return Rows(value, bound, variance)

    def _merged(self) -> None:
        sums = self.fed.partials = self.fed.merged(self.inputs.weights.output_bias_H)
        self.mutants.merged(sums)
        if not self.shows(Stage.MERGED):
            return
        got, bound, variance = sums.value.clone(), sums.bound.clone(), sums.variance.clone()
        for share, tensors in zip(reversed(self.shares), reversed(self.ranks), strict=True):
            row = 0 if self.fed.reduces_rows else share.rank
            at = (row, slice(*share.merged_tokens), slice(*share.outputs))
            want = sums.rows(at).masked(~self.followed.judged_T[at[1], None])
            place = Place(share.rank, torch.arange(*share.merged_tokens), column=share.outputs[0])
            self._judge(Stage.MERGED, tensors[Stage.MERGED], want, place)
            got[at], bound[at], variance[at] = tensors[Stage.MERGED].double(), 0.0, 0.0
        self.fed.partials = Partials.of(Rows(got, bound, variance))

    def _reduced(self) -> None:
        residual, bias_H = self.inputs.residual_TH, self.inputs.weights.output_bias_H
        output = self.chain.finish(residual, bias_H)
        fed = self.fed.reduced(self.fed.partials, residual, bias_H, bias_is_summed=self.shows(Stage.MERGED))
        for stage, want in ((Stage.REDUCED, fed), (Stage.OUTPUT, output)):
            judged = want.masked(~self.followed.judged_T[:, None])
            for share, tensors in zip(self.shares, self.ranks, strict=True):
                at, place = slice(*share.tokens), Place(share.rank, torch.arange(*share.tokens))
                self.meters[stage].add(tensors[Stage.REDUCED], judged.rows(at), place)
        known = output.masked((~self.followed.judged_T | self.tainted_T)[:, None])
        self.meters[Stage.OUTPUT].statistics = self.statistics.finish(known)
        if left := self.statistics.left_out:
            self.meters[Stage.OUTPUT].notes.append(f"sums along {left} routed rows left out: too many to keep")
        self.mutants.output(known, self.statistics)
        first: dict[Range, torch.Tensor] = {}
        for share, tensors in zip(self.shares, self.ranks, strict=True):
            mine = bits(tensors[Stage.REDUCED])
            if not torch.equal(first.setdefault(share.tokens, mine), mine):
                self.differing_ranks.append(share.rank)

    def rows_moved(self) -> tuple[tuple[int, int], ...]:
        """Per rank how many routed slots its tp group has, and how many its ep rank serves."""
        moved = []
        for share in self.shares:
            routed = int((self.server_TK[slice(*share.merged_tokens)] >= 0).sum())
            moved.append((routed, int((self.server_TK == share.ep_rank).sum())))
        return tuple(moved)


def beside(case: Case) -> Beside:
    """What joins the routed rows of a case."""
    spec = case.problem.spec
    late = case.problem.residual or spec.output_bias or case.parallel.shared is SharedPlacement.REPLICATED
    return Beside(late=late, shared=spec.shared is not None)


def coarsest_sum(numerics: Numerics, model: RoundingModel) -> Format | None:
    """The narrowest format that sums of rows are stored in."""
    formats = [numerics.storage.get(Stage.MERGED), numerics.storage.get(Stage.REDUCED), numerics.reduce, numerics.merge]
    entries = model.tolerances.file.formats
    return min((one for one in formats if one is not None), key=lambda one: entries[one].significand_bits, default=None)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, every NaN the same."""
    # A copy: contiguous() leaves odd strides to axes of size 0 and 1, which view() refuses.
    same_nan = torch.where(torch.isnan(tensor), torch.nan, tensor)
    return same_nan.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def measure(case: Case, inputs: Inputs, ranks: list[RankTensors], capabilities: Capabilities,
            model: RoundingModel, tell: Callable[[str], None] = lambda text: None,
            watched: Watched = MappingProxyType({})) -> Measurement:
    """Compare what every rank showed; ranks[r][REDUCED] is the output of rank r, the rest is optional.

    watched: what is told the ratios of every block of a stage.
    """
    numerics = capabilities.contract(case.problem)
    inputs = decoded_inputs(inputs, numerics)
    if faults := struct_faults(case, ranks, capabilities):
        return Measurement((), tuple(faults))
    shares, limits = rank_shares(case), likely_limits(model.tolerances, case)
    expanded = over_all_tokens(ranks, shares, case.problem.num_tokens)
    routing = measure_routing(inputs, expanded, [share.tokens for share in shares], numerics, capabilities, model,
                              limits.stage, watched)
    comparison = Comparison(case, inputs, ranks, numerics, model, routing.followed, limits, watched)
    comparison.run(tell)
    unjudged = int((~routing.followed.judged_T).sum())
    if unjudged:
        comparison.meters[Stage.OUTPUT].notes.append(f"{unjudged} tokens not judged: ids hidden, choice ambiguous")
    shown = [meter.result() for meter in comparison.meters.values() if meter.num_checked]
    stages = (*routing.stages, *shown)
    assert all(from_number(stage.ratio) >= 0 for stage in stages)
    if routing.weights is not None:
        comparison.mutants.weights(routing.weights)
    return Measurement(stages, power=zeros(comparison.meters, ranks[0]), unjudged_tokens=unjudged,
                       mutants=comparison.mutants.found, signal=comparison.mutants.signal,
                       differing_ranks=tuple(comparison.differing_ranks), rows_moved=comparison.rows_moved())
