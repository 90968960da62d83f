"""Axes that tell cases which fail in one way from the others that ran."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moe_ref.report.axes import axis_sort_key, case_axes

_AXES_SHOWN = 3
_LEAST_GAIN = 0.15
"""Share of the uncertainty whether a case fails that knowing an axis must take away for the axis to be shown."""
_MOST = 0.9
"""Share of the cases that ran from which on a group is simply what ran: the few others tell nothing."""
_ABSENT = "absent"
"""Value of an axis that a case does not have."""


@dataclass(frozen=True)
class Separation:
    """values: (value of the axis, cases of the group with it, cases with it that ran), numbers by size."""

    axis: str
    values: tuple[tuple[str, int, int], ...]


class Axes:
    """How often each value of each axis ran, counted once for all groups of failures."""

    def __init__(self, ran: Iterable[str]) -> None:
        """ran: ids of the cases that ran."""
        self.num_ran, self._ran = _count(ran)

    def separating(self, cases: Sequence[str]) -> list[Separation]:
        """The axes that tell most about which cases are in the group, the most telling first.

        [] of a single case, and of nearly all that ran.
        Ranked by mutual information of axis and membership, less what chance gives to an axis with so many values:
        (number of values - 1) / (2 * number of cases), after Miller (1955).
        """
        number, inside = _count(cases)
        if not 2 <= number <= _MOST * self.num_ran:
            return []
        whole = _entropy(number, self.num_ran)
        found = []
        for axis, ran in self._ran.items():
            values = dict(ran)
            if (absent := self.num_ran - sum(ran.values())) > 0:
                values[_ABSENT] = absent
            members = Counter(inside.get(axis, {}))
            members[_ABSENT] += number - members.total()
            left = sum(total / self.num_ran * _entropy(members[value], total) for value, total in values.items())
            gain = whole - left - (len(values) - 1) / (2 * self.num_ran)
            if gain >= _LEAST_GAIN * whole:
                rows = tuple((value, members[value], values[value]) for value in sorted(values, key=axis_sort_key))
                found.append((gain, Separation(axis, rows)))
        ranked = sorted(found, key=lambda pair: -pair[0])
        return [separation for _, separation in ranked[:_AXES_SHOWN]]


def _count(cases: Iterable[str]) -> tuple[int, dict[str, Counter[str]]]:
    number, counts = 0, {}
    for case in cases:
        number += 1
        for axis, value in case_axes(case).items():
            counts.setdefault(axis, Counter())[value] += 1
    return number, counts


def _entropy(part: int, whole: int) -> float:
    """Of the question whether one of `whole` cases is one of `part`, in nats."""
    share = part / whole
    return -sum(one * math.log(one) for one in (share, 1 - share) if 0 < one < 1)
