"""Statistics of a whole layer: quiet on right layers seen from outside; each names the mistake that it is made for."""

from functools import partial

import pytest
import torch

from moe_ref.contract.case import Case
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.vocabulary import Stage
from moe_ref.inputs.build import build_inputs
from moe_ref.numerics.summation import ORDERS, matmul
from moe_ref.records.schema import StageResult, Statistic, from_number
from moe_ref.simulated.faults import StoreTruncated
from moe_ref.simulated.layer import SimulatedLayer, capabilities
from moe_ref.simulated.subjects import usual_numerics
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.judge import describe, excessive
from moe_ref.verify.measure.placing import RankTensors
from moe_ref.verify.measure.stages import measure

CASE = "v1-T32.H160.I96.E4.K2-bf16-norm"


def shown(case: Case, layer: SimulatedLayer) -> list[RankTensors]:
    """Ids, so that a choice near the cut is followed, and the output."""
    ranks = layer.run(case, build_inputs(case.problem))
    return [{stage: tensors[stage] for stage in (Stage.IDS, Stage.REDUCED)} for tensors in ranks]


def output(case: Case, ranks: list[RankTensors]) -> StageResult:
    """The result of the stage `output`, as the harness measures it."""
    dtype = case.problem.dtype
    numerics = usual_numerics(dtype)
    declared = capabilities("black box", {dtype: numerics})
    declared = type(declared)(**{**vars(declared), "stages": (Stage.IDS,)})
    model = RoundingModel.of(load_tolerances(), "cpu", numerics, dtype)
    measurement = measure(case, build_inputs(case.problem), ranks, declared, model)
    assert measurement.struct_faults == ()
    return next(stage for stage in measurement.stages if stage.stage == Stage.OUTPUT)


def named(result: StageResult, name: str) -> Statistic:
    """One statistic; the test fails where it is missing."""
    return next(one for one in result.statistics if one.name == name)


def layer_of(case: Case, order: str = "sequential", **others: object) -> SimulatedLayer:
    """A right layer of the usual contract."""
    return SimulatedLayer(usual_numerics(case.problem.dtype), partial(matmul, order=order), **others)  # pyrefly: ignore


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("words", ["bf16-norm", "fp16-norm-tp2", "bf16-sigmoid-norm-gelu-tp4", "fp32-norm-tp2",
                                   "bf16-norm-outlier"])
def test_right_layers_are_quiet(words: str, order: str) -> None:
    """Every order: no statistic above two thirds of what it may be, and 16-bit errors as large as predicted."""
    case = parse_case(CASE.replace("bf16-norm", words))
    result = output(case, shown(case, layer_of(case, order)))
    assert {one.name for one in result.statistics} == {"rms", "sign", "slots"} | (
        {"ranks"} if case.parallel.tp > 1 else set())
    for one in result.statistics:
        share = 1.0 if one.name == "rms" else 2 / 3
        assert from_number(one.value) < share * from_number(one.allowed), one
    if "fp32" not in words:
        assert 0.7 < from_number(named(result, "rms").value) < 1.1


def test_a_store_that_truncates_leans_towards_zero() -> None:
    """Each element of the output is inside its bound; all of them together are not."""
    case = parse_case(CASE)
    result = output(case, shown(case, layer_of(case, fault=StoreTruncated())))
    assert from_number(result.bound_ratio) <= 1
    assert "sign" in {one.name for one in excessive(result)}
    assert "sign of the output" in describe(result) or "root mean square" in describe(result)


def test_a_row_with_another_weight_is_named() -> None:
    """One of 64 routed rows 6 % too large, in a layer that shows nothing of it: its token and its expert."""
    case = parse_case(CASE)
    inputs, layer = build_inputs(case.problem), layer_of(case)
    ranks = layer.run(case, inputs)
    row_H = ranks[0][Stage.DOWN][2 * 7 + 1].double()  # slot 1 of token 7
    changed_TH = ranks[0][Stage.REDUCED].double()
    changed_TH[7] += 0.06 * row_H
    kept = {Stage.IDS: ranks[0][Stage.IDS], Stage.REDUCED: changed_TH.bfloat16()}
    found = named(output(case, [kept]), "slots")
    assert from_number(found.value) > from_number(found.allowed)
    assert (found.token, found.expert) == (7, int(ranks[0][Stage.IDS][7, 1]))


def test_a_lost_partial_sum_is_named() -> None:
    """The part of rank 2 of 4 of one expert's rows is 30 % too small: expert and rank."""
    case = parse_case(CASE + "-tp4")
    layer = layer_of(case)
    ranks = layer.run(case, build_inputs(case.problem))
    ids_TK = ranks[0][Stage.IDS]
    expert = int(ids_TK.flatten().mode().values)
    token_R, slot_R = (ids_TK == expert).nonzero(as_tuple=True)
    changed_TH = ranks[0][Stage.REDUCED].double()
    changed_TH[token_R] -= 0.3 * ranks[2][Stage.DOWN][2 * token_R + slot_R].double()
    kept = {Stage.IDS: ids_TK, Stage.REDUCED: changed_TH.bfloat16()}
    found = named(output(case, [dict(kept) for _ in range(4)]), "ranks")
    assert from_number(found.value) > from_number(found.allowed)
    assert (found.expert, found.rank) == (expert, 2)
    words = describe(output(case, [dict(kept) for _ in range(4)]))
    assert f"errors follow expert {expert}, most in rank 2 of tp" in words


def test_what_is_not_finite_is_left_out() -> None:
    """An infinity is judged as an element; sums are taken over the rest, and not poisoned by it."""
    case = parse_case(CASE)
    ranks = shown(case, layer_of(case))
    ranks[0][Stage.REDUCED][3, 5] = torch.inf
    result = output(case, ranks)
    assert from_number(result.ratio) == torch.inf
    assert excessive(result) == []
    assert all(from_number(one.value) > 0 for one in result.statistics)
