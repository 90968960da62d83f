"""Errors for wrong use, raised before any kernel starts; `moe-ref` ends with exit code 2 on them."""


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
