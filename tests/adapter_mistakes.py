"""Verdicts of adapters of a library that may not be installed, and of one with a mistake in it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from moe_ref.adapters.catalogue import find
from moe_ref.adapters.experts_layer import EncodedCall, ExpertsLayer
from moe_ref.verify.run.subjects import load_subject
from tests.in_process import judged

LAYER = "v1-T33.H128.I256.E8"
ENCODED = "v1-T33.H256.I512.E4.K2-bf16"


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


def changed(name: str, case: str, change: Callable[[EncodedCall], EncodedCall]) -> str:
    """The verdict of the adapter on encoded experts, its function being called with something changed."""
    right = load_subject(name)
    assert isinstance(right, ExpertsLayer)
    function = right.encoded
    assert function is not None
    line = judged(replace(right, encoded=lambda call: function(change(call))), case)
    return " ".join(filter(None, (line.verdict, line.first_stage)))


def swapped_codes(call: EncodedCall) -> EncodedCall:
    """Gate's codes with up's scales, and the other way about."""
    w13 = call.weights.w13
    return replace(call, weights=replace(call.weights, w13=replace(w13, codes=w13.codes.flip(1))))


def shifted_scales(call: EncodedCall) -> EncodedCall:
    """Scales of w2 one block of columns further on."""
    w2 = call.weights.w2
    return replace(call, weights=replace(call.weights, w2=replace(w2, scales=w2.scales.roll(1, -1))))
