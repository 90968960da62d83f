"""Protects check B: siblings of the same contract differ as a right subject does, another contract differs more."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from moe_ref.contract.case_id import parse_case
from moe_ref.contract.vocabulary import Dtype, Format, Stage
from moe_ref.inputs.build import build_inputs
from moe_ref.numerics.summation import matmul
from moe_ref.simulated.fault import Fault
from moe_ref.simulated.faults import ActivationNotRounded, OperandsInTF32
from moe_ref.simulated.layer import SimulatedLayer
from moe_ref.simulated.subjects import usual_numerics
from moe_ref.verify.semantic import COMPARED, SIBLINGS, SemanticStage, semantic

CASE_IDS = {dtype: f"v1-T32.H128.I128.E4.K2-{dtype}-norm-tp2" for dtype in Dtype}


def found(dtype: Dtype, fault: Fault | None = None) -> dict[Stage, SemanticStage]:
    """Check B of a layer in an order that no sibling has."""
    case, numerics = parse_case(CASE_IDS[dtype]), usual_numerics(dtype)
    layer, inputs = SimulatedLayer(numerics, partial(matmul, order="shuffled")), build_inputs(case.problem)
    layer = layer if fault is None else replace(layer, fault=fault)
    return {one.stage: one for one in semantic(case, inputs, layer.run(case, inputs), numerics).stages}


def test_a_right_layer_is_a_sibling() -> None:
    """fp32 shows every rounding: at every stage it differs about as much as they do from each other."""
    stages = found(Dtype.FP32)
    assert tuple(stages) == COMPARED
    for stage in stages.values():
        assert 0.2 < stage.ratio < 5.0
        assert 0.5 * stage.sibling_share < stage.subject_share < 2.0 * stage.sibling_share
        assert stage.sibling_share > 0.1


@pytest.mark.parametrize("dtype", [Dtype.FP16, Dtype.BF16])
def test_rows_of_16_bits_hide_most_of_it(dtype: Dtype) -> None:
    """Errors of fp32 sums seldom flip a rounding; what is kept in registers before tells as much as fp32 does."""
    stages = found(dtype)
    assert 0.2 < stages[Stage.GATE_UP].ratio < 5.0
    for stage in COMPARED[1:]:
        assert stages[stage].subject_share < 0.01
        assert stages[stage].sibling_share < 0.01


@pytest.mark.parametrize(("dtype", "fault", "stage"), [
    (Dtype.FP32, OperandsInTF32(), Stage.GATE_UP), (Dtype.BF16, ActivationNotRounded(), Stage.DOWN)])
def test_another_rounding_is_no_sibling(dtype: Dtype, fault: Fault, stage: Stage) -> None:
    """The first stage that it touches tells, by far; what comes before is a sibling's still."""
    stages = found(dtype, fault)
    assert stages[stage].ratio > 50.0
    assert all(stages[before].ratio < 5.0 for before in COMPARED[:COMPARED.index(stage)])


def test_a_sibling_itself_differs_from_the_other_alone() -> None:
    """Half of what the two differ in, at every stage."""
    case, numerics = parse_case(CASE_IDS[Dtype.FP32]), usual_numerics(Dtype.FP32)
    order, reduction = SIBLINGS[0]
    inputs = build_inputs(case.problem)
    ranks = SimulatedLayer(numerics, partial(matmul, order=order), reduction).run(case, inputs)
    for stage in semantic(case, inputs, ranks, numerics).stages:
        assert stage.subject_share == stage.sibling_share / 2
        assert stage.ratio == 0.5


def test_what_nobody_differs_in() -> None:
    """One term is summed exactly: 1 where subject and siblings agree, infinite where the subject alone is off."""
    case, numerics = parse_case("v1-T5.H1.I1.E4.K2-bf16-norm-zipf"), usual_numerics(Dtype.BF16)
    inputs = build_inputs(case.problem)
    ranks = SimulatedLayer(numerics).run(case, inputs)
    assert {stage.ratio for stage in semantic(case, inputs, ranks, numerics).stages} == {1.0}
    ranks[0][Stage.REDUCED] = ranks[0][Stage.REDUCED] + 1
    assert semantic(case, inputs, ranks, numerics).stages[-1] == SemanticStage(Stage.REDUCED, 1.0, 0.0, math.inf)


def test_a_choice_of_experts_is_no_difference_where_it_is_shown() -> None:
    """Siblings follow the subject's ids and weights; hidden ones leave nothing but the output to compare."""
    case, numerics = parse_case(CASE_IDS[Dtype.FP32]), usual_numerics(Dtype.FP32)
    inputs = build_inputs(case.problem)
    layer = SimulatedLayer(numerics, partial(matmul, order="shuffled"))
    chosen = layer.run(case, inputs)[0]
    others = replace(inputs, logits_TE=-chosen[Stage.LOGITS])
    ranks = layer.run(case, others)
    assert all(stage.ratio < 5.0 for stage in semantic(case, inputs, ranks, numerics).stages)
    hidden = [{stage: tensor for stage, tensor in shown.items() if stage is not Stage.IDS} for shown in ranks]
    output, = semantic(case, inputs, hidden, numerics).stages
    assert output.stage is Stage.REDUCED
    assert output.ratio > 1e6


def test_what_is_not_finite_is_compared_by_kind() -> None:
    """A NaN where siblings have one is no difference, and no mean square."""
    case, numerics = parse_case("v1-T9.H32.I24.E4.K2-fp32-norm-zipf-nonfinite"), usual_numerics(Dtype.FP32)
    inputs = build_inputs(case.problem)
    ranks = SimulatedLayer(numerics, partial(matmul, order="shuffled")).run(case, inputs)
    assert ranks[0][Stage.REDUCED].isnan().any()
    for stage in semantic(case, inputs, ranks, numerics).stages:
        assert stage.subject_share < 1.0
        assert math.isfinite(stage.ratio)


@pytest.mark.parametrize(("case_id", "accumulate", "words"), [
    ("v1-T9.H32.I24.E4.K2-fp32-norm-sh8", Format.FP32, "not declared: a shared expert"),
    ("v1-T9.H32.I24.E4.K2-fp32-norm", Format.FP64, "accumulation in fp64 is not simulated")])
def test_what_is_not_simulated_has_a_reason(case_id: str, accumulate: Format, words: str) -> None:
    """A report, not an error: the check says nothing of the subject."""
    case = parse_case(case_id)
    numerics = replace(usual_numerics(Dtype.FP32), accumulate=accumulate)
    report = semantic(case, build_inputs(case.problem), [{Stage.REDUCED: torch.zeros(9, 32)}], numerics)
    assert (report.stages, report.reason) == ((), words)
