"""Layers with one fault each in how encoded weights are read: every form changes codes or scales before they are
decoded."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from moe_ref.contract.encoded import Encoded, packed, unpacked
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.vocabulary import Stage
from moe_ref.contract.weights import ExpertWeights
from moe_ref.verify.decoded import DecodedWeights
from moe_ref.verify.diagnosis.known import Known
from moe_ref.verify.diagnosis.layer import Layer

Change = Callable[[Encoded, Encoded], Encoded | None]
"""From an expert's matrix and the next expert's to what is read instead; None where there is no such mistake."""


def _rolled(axis: int, by: int) -> Change:
    def change(one: Encoded, _: Encoded) -> Encoded | None:
        moved = one.scales.view(torch.uint8) if one.scales.element_size() == 1 else one.scales
        moved = moved.roll(by, axis)
        return replace(one, scales=moved.view(one.scales.dtype)) if one.scales.shape[axis] > 1 else None
    return change


def _first_group(one: Encoded, _: Encoded) -> Encoded | None:
    return replace(one, scales=one.scales[..., :1].expand_as(one.scales)) if one.scales.shape[-1] > 1 else None


def _next_expert(one: Encoded, following: Encoded) -> Encoded:
    return replace(one, scales=following.scales)


def _gates(one: Encoded, _: Encoded) -> Encoded | None:
    """Scales of w1 for both projections."""
    return replace(one, scales=one.scales[:1].expand_as(one.scales)) if one.scales.dim() == 3 else None


def _halves(one: Encoded, _: Encoded) -> Encoded | None:
    if ENCODINGS[one.scheme].codes.per_byte == 1:
        return None
    codes = unpacked(one.codes, 2 * one.codes.shape[-1])
    swapped = torch.stack([codes[..., 1::2], codes[..., 0::2]], -1).flatten(-2)
    return replace(one, codes=packed(swapped))


def _no_zeros(one: Encoded, _: Encoded) -> Encoded | None:
    return None if one.zeros is None else replace(one, zeros=torch.full_like(one.zeros, 8))


def _zeros_off_by_one(one: Encoded, _: Encoded) -> Encoded | None:
    return None if one.zeros is None else replace(one, zeros=one.zeros + 1)


def _runs(one: Encoded, _: Encoded) -> Encoded | None:
    size = ENCODINGS[one.scheme].columns
    if one.groups is None or size is None:
        return None
    run_K = torch.arange(one.num_columns, dtype=torch.int32) // size
    return replace(one, groups=run_K.expand_as(one.groups))


def _no_second(one: Encoded, _: Encoded) -> Encoded | None:
    return None if one.second_scale is None else replace(one, second_scale=torch.ones_like(one.second_scale))


def _inverse_second(one: Encoded, _: Encoded) -> Encoded | None:
    return None if one.second_scale is None else replace(one, second_scale=1 / one.second_scale)


CHANGES: dict[str, Change] = {
    "scales of the next block of columns": _rolled(-1, -1), "scales of the block of columns before": _rolled(-1, 1),
    "scales of the next block of rows": _rolled(-2, -1), "scales of the block of rows before": _rolled(-2, 1),
    "the first scale of a row in all of its blocks (G06)": _first_group,
    "scales of the next expert (G12)": _next_expert, "scales of w1 for w3 too": _gates,
    "the halves of a byte exchanged": _halves, "zero points of 8 instead of those stored": _no_zeros,
    "zero points one too large": _zeros_off_by_one, "groups taken for runs of columns": _runs,
    "a second scale left out": _no_second, "a second scale inverted": _inverse_second}


class EncodedReading(Layer):
    """One change of how a matrix is read; variants: its name."""

    first = Stage.GATE_UP
    local = "expert"
    matrix = 0

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        if not isinstance(known.inputs.weights, DecodedWeights):
            return ()
        return [name for name in CHANGES if cls.read(known, 0, name) is not None]

    @classmethod
    def read(cls, known: Known, expert: int, name: str) -> torch.Tensor | None:
        """The matrix of an expert as this mistake has it."""
        weights, count = known.inputs.weights, known.case.problem.spec.num_experts
        assert isinstance(weights, DecodedWeights)
        both = (weights.encoded_expert(e) for e in (expert, (expert + 1) % count))
        one, following = (drawn.w2 if cls.matrix else drawn.w13 for drawn in both)
        changed = CHANGES[name](one, following)
        return None if changed is None else weights.read(changed)

    def weights_of(self, expert: int) -> ExpertWeights:
        found = self.read(self.known, expert, self.variant)
        assert found is not None
        right = super().weights_of(expert)
        return right._replace(w13_GIH=found) if self.matrix == 0 else right._replace(w2_HI=found)


class W13Reading(EncodedReading):
    words = "w1 and w3 read with {}"


class W2Reading(EncodedReading):
    words = "w2 read with {}"
    first = Stage.DOWN
    matrix = 1


ENCODED_FAULTS: tuple[type[Layer], ...] = (W13Reading, W2Reading)
