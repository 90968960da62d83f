"""Statistics of a whole layer: quiet on right layers seen from outside; each names the mistake that it is made for."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from moe_ref.contract.case import Case
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.vocabulary import Format, Stage
from moe_ref.inputs.build import build_inputs
from moe_ref.numerics import tensor_core
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
from moe_ref.verify.study.data import StudyData, study_inputs
from tests.in_process import judged
from tests.subjects.base import ROUND_EACH_STAGE, TorchMoE
from tests.subjects.whole import WholeSpec

CASE = "v1-T32.H160.I96.E4.K2-bf16-norm"


def shown(case: Case, layer: SimulatedLayer) -> list[RankTensors]:
    """Ids, so that a choice near the cut is followed, and the output."""
    ranks = layer.run(case, build_inputs(case.problem))
    return [{stage: tensors[stage] for stage in (Stage.IDS, Stage.REDUCED)} for tensors in ranks]


def output(case: Case, ranks: list[RankTensors]) -> StageResult:
    """The result of the stage `output`, as the harness measures it."""
    dtype = case.problem.dtype
    numerics = usual_numerics(dtype)
    declared = replace(capabilities("black box", {dtype: numerics}), stages=(Stage.IDS,))
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


@pytest.mark.sampled(every=8)
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
    assert from_number(named(result, "rms").value) > 0
    assert from_number(named(result, "slots").value) > 0


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize(("text", "name", "products"), [
    ("v1-T256.H256.I64.E4.K2-fp32-norm", "sm90", "tf32"), ("v1-T32.H64.I256.E4.K2-fp32-norm", "sm90", "tf32x3"),
    ("v1-T16.H512.I1024.E2.K1-fp16", "sm80", "exact")])
@pytest.mark.parametrize("data", [StudyData.UNIT, StudyData.POSITIVE])
def test_losses_that_agree_in_sign_are_expected_of_hardware_that_cuts(data: StudyData, text: str, name: str,
                                                                      products: str) -> None:
    """Sums and operands cut off lean towards zero in every element, so that as many as there are add up: no mistake."""
    case, hardware = parse_case(text), load_tolerances().file.hardware[name]
    dtype, stored = case.problem.dtype, Format.TF32 if products != "exact" else Format(case.problem.dtype.value)
    core = tensor_core.tensor_core(hardware, stored)
    matmul = {"exact": partial(tensor_core.matmul, core=core),
              "tf32": partial(tensor_core.tf32_matmul, core=core, operands=hardware.tf32_operands),
              "tf32x3": partial(tensor_core.tf32x3_matmul, core=core, operands=hardware.tf32_operands)}[products]
    numerics = replace(usual_numerics(dtype), products=products)
    inputs = study_inputs(case.problem, data)
    ranks = SimulatedLayer(numerics, matmul).run(case, inputs)
    declared = replace(capabilities("cut", {dtype: numerics}), stages=(Stage.IDS,))
    kept = [{stage: tensors[stage] for stage in (Stage.IDS, Stage.REDUCED)} for tensors in ranks]
    model = RoundingModel.of(load_tolerances(), name, numerics, dtype)
    result = next(one for one in measure(case, inputs, kept, declared, model).stages if one.stage == Stage.OUTPUT)
    assert excessive(result) == []
    assert from_number(result.ratio) < 1


def test_errors_of_a_shared_expert_belong_to_the_sign_statistic() -> None:
    """Its activations err alike in all columns, as routed ones do: over 20 seeds the statistic has a deviation of 1."""
    found = [judged(TorchMoE(), f"v1-T16.H512.I64.E4.K2-bf16-norm-sh64-s{seed}", runs=1) for seed in range(1, 21)]
    results = [next(stage for stage in line.stages if stage.stage == Stage.OUTPUT) for line in found]
    signs = torch.tensor([from_number(named(result, "sign").value) for result in results])
    assert float(signs.square().mean().sqrt()) < 1.4


class NarrowWeights(WholeSpec):
    """The whole specification, right, with routing weights in bf16: columns of a row share the error of its weight."""

    stored = {**ROUND_EACH_STAGE, Stage.WEIGHTS: Format.BF16}


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize(("subject", "text"), [
    (WholeSpec(), "v1-T64.H256.I64.E4.K2-bf16-norm-limit0.3-limitafter"),
    (WholeSpec(), "v1-T16.H512.I64.E4.K2-bf16-norm-res"),
    (NarrowWeights(), "v1-T16.H128.I64.E4.K1-fp32-weightinput"),
    (NarrowWeights(), "v1-T16.H256.I32-fp32-sh256-shgate"),
    (NarrowWeights(), "v1-T16.H512.I32.E2.K1-bf16-sigmoid-zero8"),
    (NarrowWeights(), "v1-T32.H512.I32.E2.K2-fp32-norm-zero8"),
], ids=["at a limit", "residual", "weighted tokens", "gated shared expert", "identity experts", "and routed ones"])
def test_errors_that_columns_share_do_not_accuse(subject: WholeSpec, text: str) -> None:
    """Equal activations round alike, a weight's error is all its row's, and what is small is lost beside the large."""
    for seed in range(5, 9):
        line = judged(subject, f"{text}-s{seed}", runs=1)
        result = next(stage for stage in line.stages if stage.stage == Stage.OUTPUT)
        assert line.verdict == "pass", line.message
        assert all(from_number(one.value) < 0.9 * from_number(one.allowed) for one in result.statistics)
