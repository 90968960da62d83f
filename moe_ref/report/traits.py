"""What several cases share and others rarely have."""

from collections import Counter
from collections.abc import Sequence

from moe_ref.report.axes import case_axes


def traits(cases: Sequence[str], ran: Sequence[str]) -> str:
    """'all with tp 4 and pattern empty (2 of the 2 such that ran)' of the case ids among those that ran, or ''."""
    if len(cases) < 2:
        return ""
    frequency = _count(ran)
    telling = [trait for trait, number in _count(cases).items() if number == len(cases) and frequency[trait] < len(ran)]
    chosen = sorted(telling, key=lambda trait: frequency[trait])[:2]
    if not chosen:
        return ""
    such = sum(dict(chosen).items() <= case_axes(case).items() for case in ran)
    words = " and ".join(f"{name} {value}" for name, value in chosen)
    return f"all with {words} ({len(cases)} of the {such} such that ran)"


def _count(cases: Sequence[str]) -> Counter[tuple[str, str]]:
    """How many cases have a value of an axis."""
    found: Counter[tuple[str, str]] = Counter()
    for case in cases:
        found.update(case_axes(case).items())
    return found
