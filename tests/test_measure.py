"""Protects the measurement: a single injected fault is found at its stage, expert, rank, token and column.

A right observation is made from the oracle's own formulas, each stage rounded once to its declared format;
then one element is changed and everything after it is computed from the changed value, as a real fault would be.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.case import Case
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.vocabulary import Dtype, Format, Stage
from moe_ref.inputs.build import Inputs, build_inputs
from moe_ref.oracle import expert as formula
from moe_ref.oracle.router import route
from moe_ref.records.schema import StageResult, from_number
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.bounds.rows import Rows
from moe_ref.verify.judge import failing
from moe_ref.verify.measure.measurement import Measurement
from moe_ref.verify.measure.stage_meter import Place, StageMeter
from moe_ref.verify.measure.stages import measure

ROWS = (Stage.ACT, Stage.DOWN, Stage.SHARED, Stage.MERGED, Stage.REDUCED)
SHOWN = (Stage.LOGITS, Stage.IDS, Stage.WEIGHTS, *ROWS)
MODEL = RoundingModel(load_tolerances(), "cpu", Format.FP32)

Tamper = Callable[[int, torch.Tensor], torch.Tensor]
Ranks = list[dict[Stage, torch.Tensor]]


def numerics(dtype: Dtype) -> Numerics:
    """Rows and partial sums in the model's dtype, the router in fp32."""
    stored = Format(dtype.value)
    return Numerics(storage={Stage.LOGITS: Format.FP32, Stage.WEIGHTS: Format.FP32, **dict.fromkeys(ROWS, stored)},
                    reduce=stored)


CAPABILITIES = Capabilities(name="observation", version="0", numerics={dtype: numerics(dtype) for dtype in Dtype},
                            stages=SHOWN, lower_id_ties=True)


@dataclass(frozen=True)
class Observation:
    """What all ranks of a right layer show, computed stage by stage; a tampered stage feeds those after it."""

    case: Case
    inputs: Inputs
    tampers: dict[Stage, Tamper]

    def shown(self, stage: Stage, rank: int, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        value = value.to(dtype)
        return self.tampers[stage](rank, value.clone()) if stage in self.tampers else value

    def run(self) -> Ranks:
        ranks = [self.rank(rank) for rank in range(self.case.parallel.tp)]
        total = ranks[0][Stage.MERGED].clone()
        for tensors in ranks[1:]:
            total += tensors[Stage.MERGED]
        if self.inputs.residual_TH is not None:
            total += self.inputs.residual_TH
        for rank, tensors in enumerate(ranks):
            tensors[Stage.REDUCED] = self.shown(Stage.REDUCED, rank, total, total.dtype)
        return ranks

    def rank(self, rank: int) -> dict[Stage, torch.Tensor]:
        """Every stage up to this rank's partial sum."""
        spec, inputs, dtype = self.case.problem.spec, self.inputs, TORCH_DTYPES[self.case.problem.dtype]
        routing = route(inputs.x_TH, inputs.weights, spec, logits_TE=inputs.logits_TE)
        seen: dict[Stage, torch.Tensor] = {}
        if routing.logits_TE is not None:
            seen[Stage.LOGITS] = self.shown(Stage.LOGITS, rank, routing.logits_TE, torch.float32)
            routing = route(inputs.x_TH, inputs.weights, spec, logits_TE=seen[Stage.LOGITS])
        seen[Stage.IDS] = self.shown(Stage.IDS, rank, routing.ids_TK, torch.int64)
        seen[Stage.WEIGHTS] = self.shown(Stage.WEIGHTS, rank, routing.weights_TK, torch.float32)
        seen |= self.routed_rows(rank, seen[Stage.IDS], seen[Stage.WEIGHTS], dtype)
        merged = seen[Stage.DOWN].double().unflatten(0, (-1, spec.top_k)).sum(1)
        if shared := inputs.weights.shared_expert():
            start, stop = self.case.parallel.ranges(spec.shared.intermediate_size)[rank]
            act = formula.activate(formula.gate_up(inputs.x_TH, shared.w13_GIH), spec.shared.mlp)[:, start:stop]
            gate = 1.0 if routing.shared_TS is None else routing.shared_TS.double()
            value = gate * formula.down(act, shared.w2_HI[:, start:stop])
            seen[Stage.SHARED] = self.shown(Stage.SHARED, rank, value, dtype)
            merged = merged + seen[Stage.SHARED].double()
        seen[Stage.MERGED] = self.shown(Stage.MERGED, rank, merged, dtype)
        return seen

    def routed_rows(self, rank: int, ids_TK: torch.Tensor, weights_TK: torch.Tensor,
                    dtype: torch.dtype) -> dict[Stage, torch.Tensor]:
        """act and down in (token, slot) order."""
        spec, x_TH = self.case.problem.spec, self.inputs.x_TH
        start, stop = self.case.parallel.ranges(spec.intermediate_size)[rank]
        act = torch.zeros(ids_TK.numel(), stop - start, dtype=torch.float64)
        down = torch.zeros(ids_TK.numel(), spec.hidden_size, dtype=torch.float64)
        chosen = [(e, *(ids_TK == e).nonzero(as_tuple=True), self.inputs.weights.expert(e))
                  for e in range(spec.num_experts)]
        for _, token_R, slot_R, weights in chosen:
            rows = formula.activate(formula.gate_up(x_TH[token_R], weights.w13_GIH), spec.experts)
            act[token_R * spec.top_k + slot_R] = rows[:, start:stop]
        act = self.shown(Stage.ACT, rank, act, dtype)
        for _, token_R, slot_R, weights in chosen:
            row_R = token_R * spec.top_k + slot_R
            down[row_R] = weights_TK[token_R, slot_R, None].double() * formula.down(act[row_R],
                                                                                     weights.w2_HI[:, start:stop])
        return {Stage.ACT: act, Stage.DOWN: self.shown(Stage.DOWN, rank, down, dtype)}


def capabilities_for(ranks: Ranks) -> Capabilities:
    """Capabilities that declare exactly the stages shown."""
    return replace(CAPABILITIES, stages=tuple(ranks[0]))


def measured(text: str, tampers: dict[Stage, Tamper] | None = None, hide: tuple[Stage, ...] = ()) -> Measurement:
    """The measurement of an observation of this case; hidden stages are computed, but not shown."""
    case = parse_case(text)
    inputs = build_inputs(case.problem)
    ranks = Observation(case, inputs, tampers or {}).run()
    ranks = [{stage: tensor for stage, tensor in tensors.items() if stage not in hide} for tensors in ranks]
    return measure(case, inputs, ranks, capabilities_for(ranks), MODEL)


def wrong(measurement: Measurement) -> list[Stage]:
    """Failing stages in data order."""
    return [Stage(stage.stage) for stage in failing(measurement.stages, 1.0)]


def result(measurement: Measurement, stage: Stage) -> StageResult:
    """The numbers of one stage."""
    return next(one for one in measurement.stages if one.stage == stage)


CASE = "v1-T33.H96.I160.E8.K2-bf16-norm-tp3"
FULL = "v1-T17.H80.I72.E8.K3-fp16-sigmoid-norm-eps1em20-bias-g4.2-top2sum-scale2.5-sh39-shgate-res-tp2"


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize("text", [
    CASE, FULL, CASE.replace("bf16", "fp32"), "v1-T40.H72.I90-fp16-res-tp2", "v1-T0.H64.I96.E4.K2-bf16-tp2",
    "v1-T1.H64.I96.E4.K2-fp32", "v1-T19.H48.I33.E64.K8-bf16-tp2", "v1-T8.H64.I3.E8.K2-bf16-tp8",
    "v1-T33.H96.I160.E8.K2-bf16-norm-ties-tp2", "v1-T33.H96.I160.E8.K2-bf16-empty-outlier",
    "v1-T9.H40.I24.E6.K2-bf16-norm-tp2-split5.1",
])
@pytest.mark.parametrize("hide", [(), (Stage.ACT, Stage.DOWN, Stage.MERGED), tuple(set(SHOWN) - {Stage.REDUCED})],
                         ids=["all shown", "routing shown", "output only"])
def test_a_right_layer_passes(text: str, hide: tuple[Stage, ...]) -> None:
    """Whatever it shows: dense, empty ranks, no tokens, ties, uneven shares, shared expert and residual."""
    measurement = measured(text, hide=hide)
    assert measurement.struct_faults == ()
    assert wrong(measurement) == []


def element(row: int, column: int, change: Callable[[torch.Tensor], torch.Tensor], rank: int = 0) -> Tamper:
    """Changes one element on one rank."""
    def tamper(at: int, tensor: torch.Tensor) -> torch.Tensor:
        if at == rank:
            tensor[row, column] = change(tensor[row, column])
        return tensor
    return tamper


def test_one_element_of_act() -> None:
    """Off by three times what is allowed there, on rank 2 of 3: its place, in the unsharded numbering of columns."""
    row, column, rank = 2 * 20 + 1, 7, 2
    allowed = element_bound(row, column, rank)

    def shift(value: torch.Tensor) -> torch.Tensor:
        return (value.double() + 3 * allowed).to(value.dtype)

    measurement = measured(CASE.replace("bf16", "fp32"), {Stage.ACT: element(row, column, shift, rank)})
    found = result(measurement, Stage.ACT)
    start = parse_case(CASE).parallel.ranges(160)[rank][0]
    inputs = build_inputs(parse_case(CASE.replace("bf16", "fp32")).problem)
    expert = int(route(inputs.x_TH, inputs.weights, inputs.problem.spec).ids_TK[20, 1])
    assert wrong(measurement)[0] is Stage.ACT
    assert (found.worst.rank, found.worst.token, found.worst.slot, found.worst.column) == (rank, 20, 1, start + column)
    assert found.worst.expert == expert
    assert (found.num_bad, found.bad_tokens, found.bad_experts, found.bad_ranks) == (1, [20], [expert], [rank])
    assert found.bad_tiles == [(start + column) // 64]
    assert 2.0 <= from_number(found.ratio) <= 4.0
    # Judged from the act that was shown, nothing after it is to blame.
    assert not {Stage.DOWN, Stage.MERGED, Stage.REDUCED} & set(wrong(measurement))


def element_bound(row: int, column: int, rank: int) -> float:
    """What is allowed for one element of act, read from a run in which it is infinitely wrong."""
    huge = element(row, column, lambda value: torch.full_like(value, 1e30), rank)
    return from_number(result(measured(CASE.replace("bf16", "fp32"), {Stage.ACT: huge}), Stage.ACT).worst.allowed)


def test_nan_in_one_row_of_down() -> None:
    """Infinitely wrong at down; later stages get NaN in that token and are not accused of it."""
    def poison(rank: int, down: torch.Tensor) -> torch.Tensor:
        if rank == 1:
            down[2 * 5] = torch.nan
        return down

    measurement = measured(CASE, {Stage.DOWN: poison})
    found = result(measurement, Stage.DOWN)
    assert wrong(measurement)[0] is Stage.DOWN
    assert found.ratio == "inf"
    assert (found.worst.rank, found.worst.token, found.worst.slot) == (1, 5, 0)
    assert (found.bad_tokens, found.bad_ranks, found.num_bad) == ([5], [1], 96)
    assert len(found.bad_experts) == 1
    assert "nan" in (str(found.worst.got),)
    assert not {Stage.ACT, Stage.MERGED} & set(wrong(measurement))


def test_a_wrong_expert_everywhere() -> None:
    """All ranks take the worst expert for token 7: ids fail; the rest is judged by the choice that was made."""
    def choose(rank: int, ids: torch.Tensor) -> torch.Tensor:
        ids[7, 0] = WORST_EXPERT
        return ids

    inputs = build_inputs(parse_case(CASE).problem)
    logits_TE = route(inputs.x_TH, inputs.weights, inputs.problem.spec).logits_TE
    WORST_EXPERT = int(logits_TE[7].argmin())
    measurement = measured(CASE, {Stage.IDS: choose})
    found = result(measurement, Stage.IDS)
    assert wrong(measurement)[0] is Stage.IDS
    assert (found.ratio, found.exact, found.bad_tokens, found.bad_ranks) == ("inf", True, [7], [0, 1, 2])
    assert found.worst.token == 7
    assert f"token 7 took experts [{WORST_EXPERT}, " in found.note
    assert not {Stage.ACT, Stage.DOWN, Stage.MERGED, Stage.REDUCED} & set(wrong(measurement))


def test_a_wrong_expert_on_one_rank() -> None:
    """Ranks that route differently add up parts of different experts."""
    measurement = measured(CASE, {Stage.IDS: lambda rank, ids: ids.roll(1, 1) if rank == 1 else ids})
    found = result(measurement, Stage.IDS)
    assert wrong(measurement)[0] is Stage.IDS
    assert found.bad_ranks == [1]
    assert "ranks disagree" in found.note


def test_a_tie_given_to_the_higher_id() -> None:
    """Allowed by the scores, but not by a subject that promises the lower id."""
    text = CASE.replace("norm", "norm-ties")
    inputs = build_inputs(parse_case(text).problem)
    tied = [(t, int(e)) for t in range(33) for e in higher_ties(inputs.logits_TE[t], 2)]
    token, higher = tied[0]

    def choose(rank: int, ids: torch.Tensor) -> torch.Tensor:
        ids[token, 1] = higher
        return ids

    found = result(measured(text, {Stage.IDS: choose}), Stage.IDS)
    assert found.bad_tokens == [token]
    assert "exact tie not given to the lower id" in found.note
    assert "outside" not in found.note


def higher_ties(logits_E: torch.Tensor, top_k: int) -> list[int]:
    """Experts that tie with the last one chosen and were passed over for their higher id."""
    chosen = torch.sort(logits_E, descending=True, stable=True).indices[:top_k].tolist()
    return [e for e in range(len(logits_E)) if e not in chosen and logits_E[e] == logits_E[chosen[-1]]]


def test_one_scaled_weight() -> None:
    """Off by 2^-8 for one token and slot; down is judged with the weight that was shown."""
    measurement = measured(CASE, {Stage.WEIGHTS: lambda rank, weights: element(11, 1, lambda w: w * (1 + 2**-8), rank)(
        rank, weights)})
    found = result(measurement, Stage.WEIGHTS)
    assert wrong(measurement)[0] is Stage.WEIGHTS
    assert (found.worst.token, found.worst.column, found.bad_tokens, found.bad_ranks) == (11, 1, [11], [0, 1, 2])
    assert not {Stage.DOWN, Stage.MERGED, Stage.REDUCED} & set(wrong(measurement))


def test_a_weight_scaled_in_secret() -> None:
    """Shown right, applied wrong: then down is the first stage that fails, at the expert it was applied for."""
    def scale(rank: int, down: torch.Tensor) -> torch.Tensor:
        return element(2 * 11 + 1, slice(None), lambda row: row * 1.25, rank)(rank, down)

    measurement = measured(CASE, {Stage.DOWN: scale})
    assert wrong(measurement)[0] is Stage.DOWN
    assert result(measurement, Stage.DOWN).bad_tokens == [11]
    assert len(result(measurement, Stage.DOWN).bad_experts) == 1


def test_the_partial_sum_of_one_rank_is_lost() -> None:
    """merged of rank 1 is zero: merged fails there, and reduced, which adds what it was given, does not."""
    measurement = measured(CASE, {Stage.MERGED: lambda rank, merged: merged * 0 if rank == 1 else merged})
    assert wrong(measurement)[0] is Stage.MERGED
    assert result(measurement, Stage.MERGED).bad_ranks == [1]
    assert set(wrong(measurement)) == {Stage.MERGED, Stage.OUTPUT}


def test_a_rank_that_was_not_added() -> None:
    """Partial sums right, the all-reduce forgot rank 2: reduced is the first to fail, on every rank."""
    case = parse_case(CASE)
    inputs = build_inputs(case.problem)
    ranks = Observation(case, inputs, {}).run()
    for tensors in ranks:
        tensors[Stage.REDUCED] = ranks[0][Stage.MERGED] + ranks[1][Stage.MERGED]
    measurement = measure(case, inputs, ranks, capabilities_for(ranks), MODEL)
    assert wrong(measurement) == [Stage.REDUCED, Stage.OUTPUT]
    assert result(measurement, Stage.REDUCED).bad_ranks == [0, 1, 2]


@pytest.mark.parametrize("times", [0, 2])
def test_a_residual_not_added_once(times: int) -> None:
    """Forgotten, or added by each of two ranks: reduced fails and nothing before it."""
    residual = build_inputs(parse_case(FULL).problem).residual_TH
    measurement = measured(FULL, {Stage.REDUCED: lambda rank, reduced: reduced + (times - 1) * residual})
    assert wrong(measurement) == [Stage.REDUCED, Stage.OUTPUT]


def test_ranks_that_differ_in_one_bit() -> None:
    """Inside the bound, and yet reported: whether it was promised is for the judge to know."""
    measurement = measured(CASE.replace("bf16", "fp32"), {Stage.REDUCED: element(
        3, 4, lambda value: torch.nextafter(value, torch.tensor(torch.inf)), rank=1)})
    assert wrong(measurement) == []
    assert measurement.differing_ranks == (1,)
    assert measured(CASE).differing_ranks == ()


def test_a_shared_expert_at_fault() -> None:
    """Its stage is named, the routed experts are not."""
    measurement = measured(FULL, {Stage.SHARED: element(4, 9, lambda value: value + 1.0, rank=1)})
    assert wrong(measurement)[0] is Stage.SHARED
    found = result(measurement, Stage.SHARED).worst
    assert (found.rank, found.token, found.column, found.expert) == (1, 4, 9, None)
    assert not {Stage.ACT, Stage.DOWN, Stage.MERGED, Stage.REDUCED} & set(wrong(measurement))


def test_one_wrong_logit() -> None:
    """The router's own product; the choice is then judged by the logits that were shown."""
    measurement = measured(CASE, {Stage.LOGITS: lambda rank, logits: element(6, 3, lambda value: value + 2**-6, rank)(
        rank, logits)})
    found = result(measurement, Stage.LOGITS).worst
    assert wrong(measurement)[0] is Stage.LOGITS
    assert (found.token, found.column) == (6, 3)
    assert not {Stage.IDS, Stage.WEIGHTS, Stage.ACT, Stage.DOWN} & set(wrong(measurement))


def test_hidden_ids_are_followed_where_they_are_certain() -> None:
    """Clear choices are judged by the output alone, and a fault in one such token is still found."""
    hide = tuple(set(SHOWN) - {Stage.REDUCED})
    fault = {Stage.REDUCED: lambda rank, reduced: element(8, 2, lambda value: value + 4.0, rank)(rank, reduced)}
    right, faulty = (measured(CASE, tampers, hide) for tampers in ({}, fault))
    assert right.unjudged_tokens == 0
    assert wrong(right) == []
    assert wrong(faulty)[-1] is Stage.OUTPUT
    assert result(faulty, Stage.OUTPUT).worst.token == 8


def test_hidden_ids_with_ties_are_not_judged() -> None:
    """Where equal logits meet at the cut nobody can know the choice: such tokens are counted, not judged."""
    text = CASE.replace("norm", "norm-ties")
    inputs = build_inputs(parse_case(text).problem)
    ambiguous = [t for t in range(33) if higher_ties(inputs.logits_TE[t], 2)]
    certain = next(t for t in range(33) if t not in ambiguous)
    hide = tuple(set(SHOWN) - {Stage.REDUCED})

    def spoil(token: int) -> dict[Stage, Tamper]:
        return {Stage.REDUCED: lambda rank, reduced: element(token, 2, lambda value: value + 4.0, rank)(rank, reduced)}

    assert measured(text, {}, hide).unjudged_tokens == len(ambiguous) > 0
    assert wrong(measured(text, spoil(ambiguous[0]), hide)) == []
    assert Stage.OUTPUT in wrong(measured(text, spoil(certain), hide))


def overflowing(factor: float) -> tuple[Case, Inputs]:
    """Tokens so large that fp16 overflows on the way, all exactly on the grid."""
    case = parse_case("v1-T6.H32.I32.E4.K2-fp16-zipf-tp2")
    inputs = build_inputs(case.problem)
    return case, replace(inputs, x_TH=inputs.x_TH * factor)


def test_overflow_to_infinity_is_right_where_the_value_is_too_large() -> None:
    """act beyond 65504 is inf in fp16 as declared; of what follows from it nothing is claimed, output included."""
    case, inputs = overflowing(256.0)
    ranks = Observation(case, inputs, {}).run()
    assert any(torch.isinf(tensors[Stage.ACT]).any() for tensors in ranks)
    assert wrong(measure(case, inputs, ranks, capabilities_for(ranks), MODEL)) == []


def test_overflow_of_the_sum_alone() -> None:
    """Every row fits fp16, their sum with the residual does not: the infinity is right at reduced and at output."""
    case = parse_case("v1-T6.H32.I32.E4.K2-fp16-res-zipf")
    inputs = build_inputs(case.problem)
    inputs = replace(inputs, residual_TH=torch.full_like(inputs.residual_TH, 65504.0), x_TH=inputs.x_TH * 16.0)
    ranks = Observation(case, inputs, {}).run()
    assert torch.isinf(ranks[0][Stage.REDUCED]).any()
    assert not torch.isinf(ranks[0][Stage.MERGED]).any()
    assert wrong(measure(case, inputs, ranks, capabilities_for(ranks), MODEL)) == []


@pytest.mark.parametrize(("got", "want", "ratio"), [
    (torch.inf, 70000.0, 0.0), (-torch.inf, -70000.0, 0.0), (-torch.inf, 70000.0, torch.inf),
    (torch.inf, 60000.0, torch.inf), (torch.nan, 70000.0, torch.inf), (torch.nan, torch.nan, 0.0),
    (1.0, torch.inf, 0.0), (65504.0, 65510.0, 6.0), (1.0, 1.0, 0.0), (2.0, 1.0, 1.0),
])
def test_infinities_and_nans(got: float, want: float, ratio: float) -> None:
    """One element with an allowed error of 1 in fp16: an infinity of the right sign is right beyond 65504."""
    meter = StageMeter(Stage.ACT, 1, largest=65504.0)
    one = torch.ones(1, 1, dtype=torch.float64)
    meter.add(one * got, Rows(one * want, one), Place(0, torch.zeros(1, dtype=torch.int64)))
    assert meter.ratio == ratio


@pytest.mark.parametrize(("got", "want", "ratio"), [
    (torch.nan, torch.nan, 0.0), (torch.inf, torch.nan, 0.0), (torch.nan, torch.inf, 0.0), (0.0, torch.nan, torch.inf),
    (1.0, -torch.inf, torch.inf), (torch.nan, 1.0, 0.0), (7.0, 1.0, 0.0),
])
@pytest.mark.parametrize("tainted", [True, False])
def test_tokens_that_were_not_finite_before(got: float, want: float, ratio: float, tainted: bool) -> None:
    """What is not finite must not come out as a number, in such a token; other tokens are judged as always."""
    meter = StageMeter(Stage.ACT, 1, tainted_T=torch.tensor([False, tainted]))
    one = torch.ones(1, 1, dtype=torch.float64)
    meter.add(one * got, Rows(one * want, one), Place(0, torch.ones(1, dtype=torch.int64)))
    usual = StageMeter(Stage.ACT, 1)
    usual.add(one * got, Rows(one * want, one), Place(0, torch.ones(1, dtype=torch.int64)))
    assert meter.ratio == (ratio if tainted else usual.ratio)


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("hide", [(), tuple(set(SHOWN) - {Stage.REDUCED})], ids=["all shown", "output only"])
@pytest.mark.parametrize("words", ["-norm", "-norm-zipf", "-sigmoid-norm-bias-sh39-shgate-zipf"])
def test_a_nan_that_left_its_token(words: str, hide: tuple[Stage, ...]) -> None:
    """Tokens 1 and 2 may be anything but numbers; a NaN in token 3 is infinitely wrong, a number in token 1 as well."""
    text = "v1-T9.H48.I40.E8.K2-fp32" + words + "-nonfinite-tp2"
    assert wrong(measured(text, {}, hide)) == []
    for token, value in ((3, torch.nan), (1, 0.0)):
        spoilt = {Stage.REDUCED: lambda rank, reduced, token=token, value=value: element(
            token, slice(None), lambda row: torch.full_like(row, value), rank)(rank, reduced)}
        found = measured(text, spoilt, hide)
        assert wrong(found)[0] is Stage.REDUCED
        assert result(found, Stage.OUTPUT).bad_tokens == [token]


def test_no_tokens() -> None:
    """Nothing to compare, nothing wrong, and no lack of power either."""
    measurement = measured("v1-T0.H64.I96.E4.K2-bf16-tp2")
    assert wrong(measurement) == []
    assert measurement.power == float("inf")


@pytest.mark.parametrize(("change", "words"), [
    (lambda tensors: tensors.update({Stage.ACT: tensors[Stage.ACT][:, 1:]}),
     "act: shape (66, 52), but should be (66, 53)"),
    (lambda tensors: tensors.update({Stage.DOWN: tensors[Stage.DOWN].float()}), "down: dtype torch.float32"),
    (lambda tensors: tensors.update({Stage.IDS: tensors[Stage.IDS].float()}), "ids: dtype torch.float32"),
    (lambda tensors: tensors.pop(Stage.DOWN), "rank 1 does not show down, but should"),
    (lambda tensors: tensors.pop(Stage.REDUCED), "rank 1 does not show reduced, but should"),
    (lambda tensors: tensors.update({Stage.PERMUTE: torch.zeros(1)}), "permute"),
])
def test_structure_comes_first(change: Callable[[dict], object], words: str) -> None:
    """Wrong shape, dtype or set of stages on rank 1: said in words, and no number is compared."""
    case = parse_case(CASE)
    inputs = build_inputs(case.problem)
    ranks = Observation(case, inputs, {}).run()
    declared = capabilities_for(ranks)
    change(ranks[1])
    measurement = measure(case, inputs, ranks, declared, MODEL)
    assert any(words in fault and "rank 1" in fault for fault in measurement.struct_faults)
    assert measurement.stages == ()


def test_power_is_what_an_all_zero_result_would_show() -> None:
    """A real case misses the bound by far more than the required factor of two when its rows are zero."""
    assert measured(CASE).power > 2.0
    zero = {stage: lambda rank, tensor: tensor * 0 for stage in (Stage.ACT, Stage.DOWN, Stage.MERGED, Stage.REDUCED)}
    assert wrong(measured(CASE, zero))[0] is Stage.ACT
