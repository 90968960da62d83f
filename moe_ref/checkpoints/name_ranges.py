"""Long lists of tensor names, made short without leaving one out."""

import re
from collections.abc import Iterable
from itertools import groupby

# No leading zeros, which would not be printed, and no more digits than Python turns into an integer.
_LAST_NUMBER = re.compile(r"(.*[._])(0|[1-9]\d{0,17})(\..*)", re.ASCII | re.DOTALL)


def name_ranges(names: Iterable[str]) -> list[str]:
    """All names in order, runs that differ in their last number alone as one: experts.{2-5}.w1.weight."""
    split = []
    for name in names:
        match = _LAST_NUMBER.fullmatch(name)
        split.append((match[1], match[3], int(match[2])) if match else (name, "", -1))
    listed = []
    for (head, tail), group in groupby(sorted(split), key=lambda one: one[:2]):
        # In a run of consecutive numbers, number minus position is constant.
        for _, run in groupby(enumerate(number for _, _, number in group), key=lambda one: one[1] - one[0]):
            numbers = [number for _, number in run]
            first, last = numbers[0], numbers[-1]
            middle = "" if first < 0 else f"{first}" if first == last else f"{{{first}-{last}}}"
            listed.append(f"{head}{middle}{tail}")
    return listed
