"""Every number of tolerances.yaml by its path, and which way each of them loosens what is judged."""

from collections.abc import Iterator
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

import msgspec

from moe_ref.tolerances.schema import GrowthBand, TolerancesFile


class Looser(StrEnum):
    """Which way a number makes verdicts milder; NEITHER: it decides nothing, or the way depends on others."""

    LARGER = "larger"
    SMALLER = "smaller"
    NEITHER = "neither"


LOOSER: dict[str, Looser] = {
    # Fewer bits are larger units in the last place; a larger smallest exponent, larger errors near zero; what
    # reaches the largest value may be infinite, so a smaller one excuses more.
    "formats.*.significand_bits": Looser.SMALLER,
    "formats.*.min_exponent": Looser.LARGER,
    "formats.*.max": Looser.SMALLER,
    "hardware.*.factor": Looser.LARGER,
    "hardware.*.truncates": Looser.LARGER,
    # More products per step are fewer cuts, of more addends each.
    "hardware.*products_per_step": Looser.NEITHER,
    "hardware.*kept_bits": Looser.SMALLER,
    "hardware.*significand_bits": Looser.SMALLER,
    "hardware.*.tf32_operands.truncate": Looser.LARGER,
    "hardware.*.tf32_operands.nearest": Looser.SMALLER,
    "evaluations.*.units": Looser.LARGER,
    "limits.ratio.max": Looser.LARGER,
    "checks.*.mismatches": Looser.LARGER,
    "checks.*.sigmas_factor": Looser.LARGER,
    # tau(n, alpha) is the quantile that the worst of n exceeds with probability alpha: it grows as alpha falls.
    "checks.*.alpha": Looser.SMALLER,
    "checks.output.rms_base": Looser.LARGER,
    "checks.output.filters.*": Looser.SMALLER,
    "checks.semantic.gate": Looser.SMALLER,
    "power_guard.*.factor": Looser.SMALLER,
    "power_guard.floors.*.floor": Looser.SMALLER,
    # They name a class of growth, and none is milder than another.
    "growth.rules.*": Looser.NEITHER,
    "growth.drift.*": Looser.LARGER,
    "growth.bands.*.low": Looser.SMALLER,
    "growth.bands.*.high": Looser.LARGER,
    # For comparison only: no verdict depends on them.
    "published.*": Looser.NEITHER,
}
"""Patterns of paths; the first that matches counts, and a path without one fails a test."""

_ALIGNED = "*kept_bits"
_BANDS = "growth.bands.*"
_NOT_NUMBERS = ("schema", "contracts")
"""Contracts stand in each case's numerics."""
_WORDS_THAT_COUNT = ("hardware.*.tf32_operands", "checks.output.filters")


def numbers_of(file: TolerancesFile) -> dict[str, float]:
    """Path -> number; a switch is 1 or 0, and of a word that decides something the path ends in it and holds 1.

    The path of a band of growth holds its subject, dtype and hardware classes. Without reasons and sources, and without
    contracts, which a record holds case by case.
    """
    found: dict[str, float] = {}
    for name in TolerancesFile.__struct_fields__:
        if name not in _NOT_NUMBERS:
            found |= _numbers(name, getattr(file, name))
    return found


def _numbers(path: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, bool | int | float):
        yield path, float(value)
    elif isinstance(value, str):
        if any(fnmatchcase(path, pattern) for pattern in _WORDS_THAT_COUNT):
            yield f"{path}.{value}", 1.0
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(f"{path}.{key}", inner)
    elif isinstance(value, tuple):
        for inner in value:
            yield from _numbers(f"{path}.{_band(inner)}" if isinstance(inner, GrowthBand) else path, inner)
    elif isinstance(value, msgspec.Struct):
        left_out = ("subject", "dtype", "hardware") if isinstance(value, GrowthBand) else ()
        for name in value.__struct_fields__:
            if name not in left_out:
                yield from _numbers(f"{path}.{name}", getattr(value, name))


def _band(band: GrowthBand) -> str:
    return f"{band.subject} {band.dtype} on {' '.join(band.hardware)}"


def looser_way(path: str) -> Looser | None:
    """Which way the number at a path loosens; None for a path that no version up to this one has."""
    return next((way for pattern, way in LOOSER.items() if fnmatchcase(path, pattern)), None)


def loosens(path: str, before: float | None, now: float | None) -> bool | None:
    """Whether a change makes verdicts milder; False: stricter; None: neither, or nobody can say.

    None as a number: the path is not there. That is looser for a band of growth, which judges nothing any more, and for
    a word that demands something (a filter of the output), which counts as 0.
    """
    way = looser_way(path)
    if before is None or now is None:
        if fnmatchcase(path, _BANDS):
            return now is None
        if not any(fnmatchcase(path, f"{pattern}.*") for pattern in _WORDS_THAT_COUNT):
            return None
    first, second = (_size(path, value) for value in (before, now))
    if way in (None, Looser.NEITHER) or not (first < second or second < first):
        return None
    return (second > first) == (way is Looser.LARGER)


def _size(path: str, value: float | None) -> float:
    """The number as it is compared: addends that are not aligned (0 bits kept) lose nothing."""
    return float("inf") if not value and fnmatchcase(path, _ALIGNED) else value or 0.0
