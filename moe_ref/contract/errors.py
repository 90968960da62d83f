"""Errors for wrong use, raised before any kernel starts; `moe-ref` ends with exit code 2 on them."""

import math
from typing import get_args


class UsageError(Exception):
    """Mixin that tells wrong use apart from a crash inside an implementation."""


class UsageValueError(UsageError, ValueError):
    """A value, shape or size is not what it should be; the message holds both numbers."""


class UsageTypeError(UsageError, TypeError):
    """A type or dtype is not what it should be; the message holds both."""


def is_integer(value: object) -> bool:
    """An int that is no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def raise_faults(subject: str, faults: list[str]) -> None:
    """Raise UsageValueError that lists every fault of `subject` at once; do nothing without faults."""
    if faults:
        raise UsageValueError(f"{subject}: " + "; ".join(faults))


def positive_faults(**sizes: object) -> list[str]:
    """One fault for each that is no integer of at least 1."""
    return [f"{name}={value!r}, but should be an integer of at least 1"
            for name, value in sizes.items() if not is_integer(value) or value < 1]  # type: ignore[operator]


def one_of_faults(name: str, value: object, choices: object, *others: str) -> list[str]:
    """A fault unless `value` is one of the Literal `choices`; `others` are named beside them."""
    allowed = get_args(choices)
    return [] if value in allowed else [f"{name}={value!r}, but should be one of {', '.join((*allowed, *others))}"]


def number_faults(name: str, value: object, least: float | None = None, above: float | None = None) -> list[str]:
    """A fault unless `value` is a finite number, at least `least` or greater than `above` where they are given."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if number and (least is None or value >= least) and (above is None or value > above):  # type: ignore[operator]
        return []
    if above is not None:
        return [f"{name}={value!r}, but should be finite and above {above:g}"]
    return [f"{name}={value!r}, but should be finite" + ("" if least is None else f" and at least {least:g}")]
