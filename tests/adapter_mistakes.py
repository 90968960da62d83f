"""Verdicts of adapters of a library that may not be installed, and of one with a mistake in it."""

from dataclasses import replace
from typing import Any

import pytest

from moe_ref.adapters.catalogue import find
from moe_ref.adapters.experts_layer import ExpertsLayer
from moe_ref.verify.run.subjects import load_subject
from tests.in_process import judged

LAYER = "v1-T33.H128.I256.E8"


def require(*names: str) -> None:
    """Skips the module that asks, with what is missing."""
    lacking = {adapter.lacking() for name in names if (adapter := find(name)) is not None}
    if reasons := sorted(filter(None, lacking)):
        pytest.skip("; ".join(reasons), allow_module_level=True)


def verdict(name: str, case: str, **declared: Any) -> str:
    """The verdict on one case, with the stage in which a failure starts; declared: beyond what the adapter does."""
    subject = load_subject(name)
    if declared:
        subject = replace(subject, CAPABILITIES=replace(subject.CAPABILITIES, **declared))
    line = judged(subject, case)
    return " ".join(filter(None, (line.verdict, line.first_stage)))


def swapped(name: str, case: str) -> str:
    """The same of the adapter with gate and up exchanged."""
    right = load_subject(name)
    assert isinstance(right, ExpertsLayer)
    wrong = replace(right, experts=lambda call: right.experts(
        replace(call, weights=replace(call.weights, w13_EGIH=call.weights.w13_EGIH.flip(1)))))
    line = judged(wrong, case)
    return " ".join(filter(None, (line.verdict, line.first_stage)))
