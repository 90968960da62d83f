"""Protects the ladder: the error of a tensor-parallel layer is what its declared roundings predict, at every degree."""

import importlib.util
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

import moe_fast
import moe_ref
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.vocabulary import Schedule, Stage
from moe_ref.inputs.build import build_inputs

CASE = parse_case("v1-T16.H128.I256.E4.K2-bf16-norm")
LOW, HIGH, SIGMAS = 0.9, 1.15, 6.0
"""2048 elements give a root mean square a standard deviation of 1.6 %; roundings of sums are not quite independent."""


@cache
def ladder() -> ModuleType:
    """The script as a module."""
    path = Path(__file__).resolve().parents[1] / "ci" / "ladder.py"
    spec = importlib.util.spec_from_file_location("ladder", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def setting() -> tuple:
    """Inputs, the unsharded truth and the prediction."""
    inputs = build_inputs(CASE.problem)
    truth_TH = moe_ref.moe(inputs.x_TH, inputs.weights, CASE.problem.spec)
    return inputs, truth_TH, ladder().Prediction(inputs, moe_fast.CAPABILITIES)


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("tp", [1, 3, 8])
def test_errors_are_those_of_the_roundings(schedule: Schedule, tp: int) -> None:
    """Measured over predicted stays near 1, and no element is far out."""
    case = replace(CASE, parallel=Parallel(tp=tp, schedule=schedule))
    rung = ladder().climb(case, *setting())
    assert LOW < rung.rms < HIGH
    assert rung.sigmas < SIGMAS
    assert rung.bounds < 1


@pytest.mark.parametrize("left_out", [Stage.ACT, Stage.DOWN, Stage.MERGED])
def test_a_rounding_that_nobody_declared_shows(left_out: Stage) -> None:
    """Without the variance of one stage the same measurement leaves the band, so the band means something."""
    inputs, truth_TH, _ = setting()
    predicted = ladder().Prediction(inputs, moe_fast.CAPABILITIES)
    storage = {stage: stored for stage, stored in predicted.numerics.storage.items() if stage is not left_out}
    predicted.stored = storage.get
    case = replace(CASE, parallel=Parallel(tp=1))
    with torch.no_grad():
        assert ladder().climb(case, inputs, truth_TH, predicted).rms > HIGH
