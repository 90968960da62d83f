"""A pairwise cover: few rows in which every possible pair of axis values occurs at least once."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

Row = dict[str, object]
Pair = tuple[tuple[str, object], tuple[str, object]]

_DRAWS = 60
"""Completions tried per row; more make the cover slightly smaller and building it slower."""


@dataclass(frozen=True)
class Cover:
    """Axes and their values; plain: rows that, with a pair put in, show whether it is possible at all."""

    axes: Mapping[str, tuple]
    plain: tuple[Row, ...]
    is_valid: Callable[[Row], bool]

    def pairs(self, row: Row) -> set[Pair]:
        """The pairs of axis values in a row."""
        return set(combinations(((name, row[name]) for name in self.axes), 2))

    @cached_property
    def possible(self) -> frozenset[Pair]:
        """Pairs that some valid row has."""
        pairs = set()
        for first, second in combinations(self.axes, 2):
            for pair in (((first, a), (second, b)) for a in self.axes[first] for b in self.axes[second]):
                if any(self.is_valid(row | dict(pair)) for row in self.plain):
                    pairs.add(pair)
        return frozenset(pairs)

    def rows(self, start: list[Row]) -> list[Row]:
        """Rows that cover, together with `start`, every possible pair; the same on every machine and version."""
        generator, rows = random.Random(17), []
        missing = self.possible.difference(*(self.pairs(row) for row in start))
        while missing:
            target = min(missing, key=repr)
            candidates = [row for row in (self._draw(generator, target) for _ in range(_DRAWS)) if self.is_valid(row)]
            candidates += [row for plain in self.plain for row in [plain | dict(target)] if self.is_valid(row)]
            best = max(candidates, key=lambda row: len(self.pairs(row) & missing))
            rows.append(best)
            missing -= self.pairs(best)
        return rows

    def _draw(self, generator: random.Random, target: Pair) -> Row:
        # random() is stable across Python versions where choice() is only so by habit.
        drawn = {name: values[int(generator.random() * len(values))] for name, values in self.axes.items()}
        return drawn | dict(target)
