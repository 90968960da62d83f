"""Protects the power guard: what it says a case would see is what the case sees, and loose contracts are refused."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from moe_ref.contract.capabilities import Numerics
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Dtype, Format, Stage, Verdict
from moe_ref.inputs.build import build_inputs
from moe_ref.numerics.formats import round_to, unit_in_last_place
from moe_ref.records.schema import from_number
from moe_ref.simulated.fault import Fault, Matmul, Product
from moe_ref.simulated.faults import OneWeightOff, PartialDropped
from moe_ref.simulated.layer import RIGHT, SimulatedLayer
from moe_ref.simulated.subjects import Subject, in_order, usual_numerics
from moe_ref.tolerances.load import Tolerances, default_path, load_tolerances
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.judge import Guard, RunFacts, failing, judge
from moe_ref.verify.measure.measurement import Measurement, Mutant
from moe_ref.verify.measure.stages import measure
from moe_ref.verify.run.case_runner import needed
from tests.in_process import judged

CASE = "v1-T33.H96.I160.E8.K2-{dtype}-norm-tp2"
WIDE = "v1-T9.H320.I256.E4.K2-{dtype}-norm-tp2"
FACTS = RunFacts(calls=(), wanted_calls=(), same_bits=True, differing_stages=(), promised_deterministic=True,
                 promised_equal_ranks=True, changed_inputs=())

ROUTED = (Stage.LOGITS, Stage.IDS, Stage.WEIGHTS)
ROWS = (*ROUTED, Stage.ACT, Stage.DOWN, Stage.MERGED)
SHOWN = {"all": (*ROWS, Stage.GATE_UP), "rows": ROWS, "sums": (*ROUTED, Stage.MERGED), "ids": (Stage.IDS,),
         "nothing": (), "rows without weights": (Stage.IDS, Stage.ACT, Stage.DOWN)}


@dataclass(frozen=True)
class TileLost(Fault):
    """The last 64 columns of one expert's up projection lose the last 64 products."""

    stage: ClassVar[Stage] = Stage.GATE_UP
    expert: int = 0

    def product(self, matmul: Matmul, a_RK: torch.Tensor, b_KN: torch.Tensor, of: Product) -> torch.Tensor:
        whole_RN = matmul(a_RK, b_KN)
        if of == Product(Stage.GATE_UP, self.expert):
            whole_RN[:, -64:] = matmul(a_RK[:, :-64], b_KN[:-64, -64:])
        return whole_RN


@dataclass(frozen=True)
class StoresCut(Fault):
    """Rows and partial sums are cut off to their format."""

    stage: ClassVar[Stage] = Stage.ACT

    def store(self, value: torch.Tensor, stored: Format, stage: Stage) -> torch.Tensor:
        return round_to(value, stored, "truncate" if stage in (Stage.ACT, Stage.DOWN, Stage.MERGED) else "nearest")


def shown_by(case_id: str, fault: Fault = RIGHT) -> list[dict[Stage, torch.Tensor]]:
    """Every stage of every rank of a simulated layer whose long sums have no error."""
    case = parse_case(case_id)
    layer = SimulatedLayer(usual_numerics(case.problem.dtype), torch.matmul, fault=fault)
    return layer.run(case, build_inputs(case.problem))


def measured(case_id: str, ranks: list[dict[Stage, torch.Tensor]], shown: tuple[Stage, ...],
             tolerances: Tolerances | None = None) -> Measurement:
    """The comparison of what a layer shows of itself."""
    case, numerics = parse_case(case_id), usual_numerics(parse_case(case_id).problem.dtype)
    model = RoundingModel.of(tolerances or load_tolerances(), "cpu", numerics, case.problem.dtype)
    capabilities = replace(in_turn().CAPABILITIES, stages=shown)
    some = [{stage: one for stage, one in rank.items() if stage in (*shown, Stage.REDUCED)} for rank in ranks]
    measurement = measure(case, build_inputs(case.problem), some, capabilities, model)
    assert measurement.struct_faults == ()
    return measurement


@cache
def in_turn() -> Subject:
    """A right layer under the usual contract."""
    return Subject("in turn", in_order("sequential"))


def busiest(ranks: list[dict[Stage, torch.Tensor]]) -> tuple[int, int, int]:
    """The expert with the most rows, and token and slot of its first one."""
    ids_TK = ranks[0][Stage.IDS]
    expert = int(torch.bincount(ids_TK.flatten()).argmax())
    token, slot = (ids_TK == expert).nonzero()[0].tolist()
    return expert, token, slot


def seen_at(measurement: Measurement, where: str) -> float:
    """error / allowed, or statistic / allowed, of the check of this name."""
    stage, _, name = where.partition(" ")
    result = next(one for one in measurement.stages if one.stage == stage)
    if not name:
        return from_number(result.ratio)
    statistic = next(one for one in result.statistics if one.name == name)
    return from_number(statistic.value) / from_number(statistic.allowed)


def loosened(tmp_path: Path, *edits: tuple[str, str]) -> Tolerances:
    """tolerances.yaml with these edits."""
    text = default_path().read_text()
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "loose.yaml"
    path.write_text(text)
    return load_tolerances(path)


SIGMAS = (("sigmas_factor: 3.0", "sigmas_factor: 100.0"), ("sigmas_factor: 1.15", "sigmas_factor: 100.0"),
          ("rms_base: 1.08", "rms_base: 100.0"))


def really(name: str, right: list[dict[Stage, torch.Tensor]]) -> Fault:
    """The fault that a mutant stands for, where the guard takes its sample."""
    expert, token, slot = busiest(right)
    return {"k_tile": TileLost(expert=expert), "w_1ulp": OneWeightOff(token=token, slot=slot),
            "tp_partial": PartialDropped(expert=expert), "store_rz": StoresCut()}[name]


@pytest.mark.sampled(every=5)
@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize("pattern", [CASE, WIDE])
@pytest.mark.parametrize(("name", "shown", "where"), [
    ("k_tile", "all", "gate_up"), ("k_tile", "rows", "act"), ("k_tile", "sums", "output"), ("k_tile", "ids", "output"),
    ("w_1ulp", "rows without weights", "down"),
    ("tp_partial", "sums", "merged"), ("tp_partial", "ids", "output"),
    ("store_rz", "rows", ""),
])
def test_a_mutant_is_seen_as_predicted(dtype: Dtype, pattern: str, name: str, shown: str, where: str) -> None:
    """The fault planted for real is caught where the factor says, by about that factor."""
    case_id = pattern.format(dtype=dtype)
    right = shown_by(case_id)
    predicted = measured(case_id, right, SHOWN[shown]).mutants.get(name)
    if name == "store_rz" and dtype is Dtype.FP32:
        assert predicted is None  # sums are stored as they are
        return
    assert predicted is not None
    assert predicted.where.startswith(where)
    wrong = measured(case_id, shown_by(case_id, really(name, right)), SHOWN[shown])
    assert failing(wrong.stages, 1.0)
    assert predicted.factor > 1
    assert 1 / 3 < predicted.factor / seen_at(wrong, predicted.where) < 3


@pytest.mark.parametrize("dtype", list(Dtype))
def test_a_weight_that_is_shown_wrong_is_seen_as_predicted(dtype: Dtype) -> None:
    """Of one token, by one unit of bf16, on every rank."""
    case_id = CASE.format(dtype=dtype)
    ranks = shown_by(case_id)
    predicted = measured(case_id, ranks, ROUTED).mutants["w_1ulp"]
    _, token, slot = busiest(ranks)
    for rank in ranks:
        rank[Stage.WEIGHTS][token, slot] += unit_in_last_place(rank[Stage.WEIGHTS][token, slot].double(), Format.BF16)
    assert predicted.where == Stage.WEIGHTS
    assert 1 / 3 < predicted.factor / seen_at(measured(case_id, ranks, ROUTED), Stage.WEIGHTS) < 3


@pytest.mark.parametrize(("units", "passes"), [(8.0, False), (8e4, False), (8e6, True)])
def test_a_mutant_that_would_pass_does_pass(tmp_path: Path, units: float, passes: bool) -> None:
    """Thresholds so wide that in the end a lost tile hides in them, while its factor falls below 1."""
    case_id = WIDE.format(dtype=Dtype.BF16)
    tolerances = loosened(tmp_path, *SIGMAS, ("units: 8.0", f"units: {units}"))
    right = shown_by(case_id)
    predicted = measured(case_id, right, SHOWN["ids"], tolerances).mutants["k_tile"]
    wrong = measured(case_id, shown_by(case_id, really("k_tile", right)), SHOWN["ids"], tolerances)
    assert (predicted.factor < 1) == (not failing(wrong.stages, 1.0)) == passes


ABSENT = {
    "one rank has no part to lose": ("v1-T33.H96.I160.E8.K2-bf16-norm", "all", "tp_partial"),
    "a dense layer has no routing weight": ("v1-T33.H96.I160-bf16-tp2", "all", "w_1ulp"),
    "a hidden weight is left to exact probes": (CASE.format(dtype="bf16"), "nothing", "w_1ulp"),
    "a hidden store is left to nobody": (CASE.format(dtype="bf16"), "nothing", "store_rz"),
    "sums of hidden stores hide another": (CASE.format(dtype="bf16"), "sums", "store_rz"),
    "without tokens nothing is lost": ("v1-T0.H96.I160.E8.K2-bf16-norm-tp2", "all", "k_tile"),
}


@pytest.mark.parametrize("why", ABSENT)
def test_a_mutant_that_no_check_is_meant_for_is_absent(why: str) -> None:
    case_id, shown, name = ABSENT[why]
    assert name not in measured(case_id, shown_by(case_id), SHOWN[shown]).mutants


class Declared:
    """The right layer, which declares another contract than it keeps, and shows only some stages."""

    def __init__(self, shown: str = "all", **changes: Any) -> None:
        subject = in_turn()
        numerics = {dtype: replace(one, **changes) for dtype, one in subject.CAPABILITIES.numerics.items()}
        self.CAPABILITIES = replace(subject.CAPABILITIES, numerics=numerics, stages=SHOWN[shown])

    def moe(self, *arguments: Any, trace: Trace | None = None, **options: Any) -> torch.Tensor:
        """The layer of `in_turn`, of whose stages the declared ones are shown."""
        every = Trace()
        y_TH = in_turn().moe(*arguments, trace=every, **options)
        if trace is not None:
            for stage in self.CAPABILITIES.stages:
                trace.record(stage, every.tensors[stage])
        return y_TH


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize("shown", ["all", "rows", "ids"])
def test_a_usual_contract_is_not_refused(dtype: Dtype, shown: str) -> None:
    """The record has every mutant with its factor."""
    line = judged(Declared(shown), CASE.format(dtype=dtype), runs=1)
    assert line.verdict == Verdict.PASS, line.message
    assert {"k_tile", "tp_partial"} <= set(line.mutants)
    assert all(from_number(one.factor) >= 1.5 for one in line.mutants.values())


REFUSED = {
    "sums in bf16": ({"accumulate": Format.BF16}, Dtype.BF16, "all"),
    "sums in bf16, fp32 rows": ({"accumulate": Format.BF16}, Dtype.FP32, "all"),
    "sums in fp16, fp32 rows": ({"accumulate": Format.FP16}, Dtype.FP32, "all"),
    "sums in fp16, logits hidden": ({"accumulate": Format.FP16}, Dtype.BF16, "rows without weights"),
}


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("why", REFUSED)
def test_a_loose_contract_is_refused(why: str) -> None:
    """Whoever declares coarse sums is told what would pass."""
    changes, dtype, shown = REFUSED[why]
    line = judged(Declared(shown, **changes), CASE.format(dtype=dtype), runs=1)
    assert line.verdict == Verdict.NOT_RUN, line.message
    assert line.reason.startswith("no power under the declared rounding")


@pytest.mark.parametrize("shown", ["all", "ids"])
def test_loosened_tolerances_are_refused(tmp_path: Path, shown: str) -> None:
    """A right layer no longer passes a case whose thresholds were raised until they say nothing."""
    line = judged(Declared(shown), CASE.format(dtype=Dtype.FP32), runs=1, tolerances=loosened(tmp_path, *SIGMAS))
    assert line.verdict == Verdict.NOT_RUN
    assert "the output is" in line.reason


def test_the_judge_names_the_first_mutant_that_would_pass() -> None:
    """At the factor itself a case counts; without the mutant it does not matter."""
    guard = Guard(5.0, {"k_tile": 1.5, "w_1ulp": 1.5})
    found = {"k_tile": Mutant(1.5, "act"), "w_1ulp": Mutant(0.6, "weights")}
    assert judge(Measurement((), mutants={"k_tile": found["k_tile"]}, signal=5.0), FACTS, 1.0, 2.0,
                 guard).verdict is Verdict.PASS
    refused = judge(Measurement((), mutants=found), FACTS, 1.0, 2.0, guard)
    assert refused.verdict is Verdict.NOT_RUN
    assert "w_1ulp (one routing weight off by one unit of bf16) would pass, at 0.6" in refused.reason
    assert judge(Measurement((), signal=4.9), FACTS, 1.0, 2.0, guard).verdict is Verdict.NOT_RUN


def test_the_floor_is_that_of_the_coarsest_store() -> None:
    """tf32 counts as fp16, and the format of sums does not: it is what a floor is for."""
    file = load_tolerances().file
    floors = {dtype: file.power_guard.floors[dtype].floor for dtype in Dtype}
    fp32 = Numerics(storage={Stage.REDUCED: Format.FP32})
    for numerics, dtype in ((fp32, Dtype.FP32), (replace(fp32, accumulate=Format.BF16), Dtype.FP32),
                            (replace(fp32, products="tf32"), Dtype.FP16),
                            (replace(fp32, reduce=Format.BF16), Dtype.BF16),
                            (replace(fp32, storage={Stage.WEIGHTS: Format.BF16}), Dtype.BF16)):
        assert needed(file, numerics).signal == floors[dtype]
    assert needed(file, replace(fp32, storage={Stage.LOGITS: Format.BF16})).signal == 0.0
