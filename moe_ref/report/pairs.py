"""Which values of two axes were tested together, which only unsupported, which never; linear in the cases."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from moe_ref.contract.vocabulary import Data, Direction, Dtype, Hosting, Pattern, Schedule, Storage, Tokens, Verdict
from moe_ref.records.schema import CaseLine
from moe_ref.report.axes import axis_sort_key, case_axes
from moe_ref.report.facts import is_executed
from moe_ref.report.possible import Examples

PAIRED: dict[str, Sequence[str]] = {
    "dtype": tuple(Dtype), "direction": tuple(Direction), "tp": (), "ep": (), "split": ("even", "uneven"),
    "schedule": tuple(Schedule), "tokens on": tuple(Tokens), "hosting": tuple(Hosting), "storage": tuple(Storage),
    "pattern": tuple(Pattern), "data": tuple(Data), "activation": (), "score": (), "shared expert": (),
    "residual": ("no", "yes"), "tokens": ()}
"""Axes of the grid, and the values that stand in it even where no case has them."""

_TOKEN_CLASSES = ((0, "0"), (1, "1"), (15, "2 to 15"), (63, "16 to 63"), (255, "64 to 255"))
_MORE_TOKENS = "256 or more"
_MOST_VALUES = 12
"""Of one axis; those with the fewest cases are left out of the grid."""

Value = tuple[str, str]
"""(axis, value)."""


class Together(StrEnum):
    """Whether a case that has both values was executed; excluded: the contract refuses every such case."""

    TESTED = "tested"
    UNSUPPORTED = "unsupported"
    NEVER = "never"
    EXCLUDED = "excluded"


@dataclass(frozen=True)
class Pair:
    """Two values of different axes, and how many executed cases have both."""

    first: Value
    second: Value
    together: Together
    executed: int


@dataclass(frozen=True)
class PairGrid:
    """values: by axis, in order. executed: cases by value. pairs: by both values, the earlier axis first."""

    values: dict[str, tuple[str, ...]]
    executed: dict[Value, int]
    pairs: dict[tuple[Value, Value], Pair]

    def never(self) -> list[Pair]:
        """Pairs of values that were both tested, but never together, those of the commonest values first."""
        found = [pair for pair in self.pairs.values() if pair.together in (Together.NEVER, Together.UNSUPPORTED)
                 and self.executed[pair.first] and self.executed[pair.second]]
        return sorted(found, key=lambda pair: (pair.together, -self.executed[pair.first] * self.executed[pair.second],
                                               pair.first, pair.second))

    def untested(self) -> list[Value]:
        """Values of which no case was executed."""
        return [value for value, count in self.executed.items() if not count]

    def count(self, together: Together) -> int:
        return sum(pair.together is together for pair in self.pairs.values())


def pair_grid(lines: Iterable[CaseLine]) -> PairGrid:
    """The grid of all cases whose id this version reads; a case that did not run and is supported counts as never."""
    rows: Counter[tuple[tuple[str, ...], Together]] = Counter()
    examples = Examples()
    for line in lines:
        axes = case_axes(line.case)
        if "dtype" not in axes:
            continue
        row = tuple(_token_class(axes[axis]) if axis == "tokens" else axes[axis] for axis in PAIRED)
        rows[row, _alone(line)] += 1
        examples.add(line.case, zip(PAIRED, row, strict=True))
    values = _values(rows)
    order = [(axis, value) for axis, of_axis in values.items() for value in of_axis]
    tested, unsupported = (_counts(rows, order, together) for together in (Together.TESTED, Together.UNSUPPORTED))
    executed = {value: int(tested[place, place]) for place, value in enumerate(order)}
    pairs = {}
    for second, b in enumerate(order):
        for first, a in enumerate(order[:second]):
            if a[0] != b[0]:
                number = int(tested[first, second])
                together = (Together.TESTED if number else Together.UNSUPPORTED if unsupported[first, second] else
                            Together.NEVER if examples.may_meet(a, b) else Together.EXCLUDED)
                pairs[a, b] = Pair(a, b, together, number)
    return PairGrid(values, executed, pairs)


def _alone(line: CaseLine) -> Together:
    """What one case makes of all of its pairs."""
    if is_executed(line):
        return Together.TESTED
    return Together.UNSUPPORTED if line.verdict == Verdict.UNSUPPORTED else Together.NEVER


def _token_class(text: str) -> str:
    return next((words for most, words in _TOKEN_CLASSES if int(text) <= most), _MORE_TOKENS)


def _values(rows: Counter[tuple[tuple[str, ...], Together]]) -> dict[str, tuple[str, ...]]:
    """The known values of every axis, in their order, then others that cases have."""
    values = {}
    for place, (axis, known) in enumerate(PAIRED.items()):
        counts: Counter[str] = Counter()
        for (row, _), number in rows.items():
            counts[row[place]] += number
        kept = [value for value, _ in counts.most_common(_MOST_VALUES) if value not in known]
        classes = [words for _, words in _TOKEN_CLASSES]
        key = classes.index if axis == "tokens" else axis_sort_key
        last = [_MORE_TOKENS] * (_MORE_TOKENS in kept)
        kept = sorted((value for value in kept if value not in last), key=key)
        values[axis] = tuple(map(str, (*known, *kept, *last)))
    return values


def _counts(rows: Counter[tuple[tuple[str, ...], Together]], order: list[Value], together: Together) -> np.ndarray:
    """Cases by value and value, on the diagonal by value."""
    place = {value: number for number, value in enumerate(order)}
    chosen = [(row, number) for (row, of), number in rows.items() if of is together]
    has = np.zeros((len(chosen), len(order)), dtype=np.float32)
    for number, (row, _) in enumerate(chosen):
        has[number, [place[value] for value in zip(PAIRED, row, strict=True) if value in place]] = 1
    return has.T @ (has * np.array([number for _, number in chosen], dtype=np.float32).reshape(-1, 1))
