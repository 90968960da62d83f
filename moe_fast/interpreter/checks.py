"""Which checks are on for the launches of this thread."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from moe_ref.contract.errors import UsageValueError


@dataclass(frozen=True)
class Checks:
    """bounds: pointers stay in the arguments; races: no byte is stored twice; overflow: integers, asserts."""

    bounds: bool = True
    races: bool = True
    overflow: bool = True


_THREAD = threading.local()


def active_checks() -> Checks:
    """The checks of the innermost `checking` block of this thread, or the defaults."""
    return getattr(_THREAD, "checks", Checks())


@contextmanager
def checking(bounds: bool, races: bool, overflow: bool) -> Iterator[None]:
    """Set the checks of this thread's launches; raises UsageValueError for races without bounds."""
    if races and not bounds:
        raise UsageValueError("checking(bounds=False, races=True): races are found through the bounds check, "
                              "so races=True should come with bounds=True")
    before = active_checks()
    _THREAD.checks = Checks(bounds, races, overflow)
    try:
        yield
    finally:
        _THREAD.checks = before
