"""Errors for wrong use, raised before any kernel starts; `moe-ref` ends with exit code 2 on them."""

import math
from types import UnionType
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


def is_number(value: object) -> bool:
    """A finite int or float, no bool, that fits into a double."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def shown(value: object) -> str:
    """repr; of an integer beyond a double its length, since Python refuses to write more than 4300 digits."""
    long = isinstance(value, int) and value.bit_length() > 1024
    return f"an integer of {value.bit_length()} bits" if long else repr(value)  # type: ignore[union-attr]


def size_faults(least: int, **sizes: object) -> list[str]:
    """One fault for each that is no integer of at least `least`, or too large for a dimension of a tensor."""
    faults = []
    for name, value in sizes.items():
        if not is_integer(value) or value < least:  # type: ignore[operator]
            faults.append(f"{name}={shown(value)}, but should be an integer of at least {least}")
        elif value >= 2**63:  # type: ignore[operator]
            faults.append(f"{name}={shown(value)}, but should be below 2^63 = {2**63}")
    return faults


def positive_faults(**sizes: object) -> list[str]:
    """One fault for each that is no integer of at least 1 and below 2^63."""
    return size_faults(1, **sizes)


def flag_faults(**flags: object) -> list[str]:
    """One fault for each that is neither True nor False."""
    return [f"{name}={shown(value)}, but should be True or False"
            for name, value in flags.items() if not isinstance(value, bool)]


def kind_faults(name: str, value: object, kind: type | UnionType, words: str) -> list[str]:
    """A fault unless `value` is a `kind`, which the message calls by `words`, as "a Router or None"."""
    return [] if isinstance(value, kind) else [f"{name}={shown(value)}, but should be {words}"]


def one_of_faults(name: str, value: object, choices: object, *others: str) -> list[str]:
    """A fault unless `value` is one of the strings of the Literal `choices`; `others` are named beside them."""
    allowed = get_args(choices)
    if isinstance(value, str) and value in allowed:
        return []
    return [f"{name}={shown(value)}, but should be one of {', '.join((*allowed, *others))}"]


def number_faults(name: str, value: object, least: float | None = None, above: float | None = None) -> list[str]:
    """A fault unless `value` is_number, at least `least` or greater than `above` where they are given."""
    if (is_number(value) and (least is None or value >= least)  # type: ignore[operator]
            and (above is None or value > above)):  # type: ignore[operator]
        return []
    if above is not None:
        return [f"{name}={shown(value)}, but should be finite and above {above:g}"]
    return [f"{name}={shown(value)}, but should be finite" + ("" if least is None else f" and at least {least:g}")]
