"""Mistakes in reading encoded weights are named: the scales, codes and zero points that were taken instead."""

import pytest

from moe_ref.contract.vocabulary import Verdict
from tests.in_process import judged
from tests.subjects.mistaken_codes import NibblesSwapped, SecondScaleInverted, ZerosOffByOne
from tests.subjects.mistaken_scales import RunsForGroups, ScaleOfNextBlock, ScaleOfNextExpert, ScaleOfRowBefore

SIZES = "v1-T17.H160.I136.E6.K3-bf16"

MISTAKES = {
    "the next block": (ScaleOfNextBlock(), "mxfp4", "scales of the next block of columns"),
    "the next block, act in codes": (ScaleOfNextBlock(), "fp8block", "block of columns"),
    "the row before": (ScaleOfRowBefore(), "int8-norm", "scales of the block of rows before"),
    "halves": (NibblesSwapped(), "gptq32", "the halves of a byte exchanged"),
    "zeros": (ZerosOffByOne(), "awq32", "zero points one too large"),
    "runs": (RunsForGroups(), "gptqorder32", "groups taken for runs of columns"),
    "the next expert": (ScaleOfNextExpert(), "int8", "scales of the next expert (G12)"),
    "a reciprocal": (SecondScaleInverted(), "nvfp4", "a second scale inverted"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name: str) -> None:
    """The stage is act, the first that shows; what is named explains nine tenths of its error and more."""
    subject, words, fault = MISTAKES[name]
    scheme, _, more = words.partition("-")
    line = judged(subject, f"{SIZES}-{scheme}-{more or 'norm'}")
    assert line.verdict is Verdict.MISMATCH
    assert line.first_stage == "act"
    assert line.diagnosis is not None, line.message
    assert fault in line.diagnosis.fault, line.diagnosis
