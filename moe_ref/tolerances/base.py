"""What the structures of tolerances.yaml are made of: strict mappings, and numbers that decide something."""

import sys
from typing import Annotated

import msgspec

Text = Annotated[str, msgspec.Meta(min_length=1)]
_LARGEST = sys.float_info.max
Finite = Annotated[float, msgspec.Meta(ge=-_LARGEST, le=_LARGEST)]
Positive = Annotated[float, msgspec.Meta(gt=0.0, le=_LARGEST)]
"""Finite: a limit of infinity, or of NaN, would let everything pass."""
NotNegative = Annotated[float, msgspec.Meta(ge=0.0, le=_LARGEST)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
Bits = Annotated[int, msgspec.Meta(ge=1, le=53)]
FractionBits = Annotated[int, msgspec.Meta(ge=0, le=53)]
Probability = Annotated[float, msgspec.Meta(gt=0.0, le=1e-3)]
"""Of a false alarm; above one in a thousand a green run would be luck."""
NoMismatches = Annotated[int, msgspec.Meta(ge=0, le=0)]
"""A check for equal bits allows none; the key says so to the reader."""


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A mapping with exactly these keys."""


class Entry(Struct, frozen=True):
    """A mapping that says why its numbers are what they are, and where that is from."""

    reason: Text
    source: Text


class Range(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """[low, high], both ends included."""

    low: Finite
    high: Finite

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"[{self.low:g}, {self.high:g}], but the first should be below the second")

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high
