"""A pairwise cover: few rows in which every possible pair of axis values occurs at least once."""

import random
from functools import cache
from itertools import combinations

from moe_ref.tiers.axes import AXES, PLAIN, SHAPES, Row, row_case

Pair = tuple[tuple[str, object], tuple[str, object]]

_DRAWS = 60
"""Completions tried per row; more make the cover slightly smaller and building it slower."""


def row_pairs(row: Row) -> set[Pair]:
    """The pairs of axis values in a row."""
    return set(combinations(((name, row[name]) for name in AXES), 2))


@cache
def possible_pairs() -> frozenset[Pair]:
    """Pairs that some valid case has."""
    pairs = set()
    for first, second in combinations(AXES, 2):
        for pair in (((first, a), (second, b)) for a in AXES[first] for b in AXES[second]):
            if any(row_case(row | dict(pair)) for row in _plain_rows()):
                pairs.add(pair)
    return frozenset(pairs)


def _plain_rows() -> list[Row]:
    """Otherwise plain rows, of which one takes whatever is possible: any shape, one rank and two."""
    return [PLAIN | {"shape": shape.name, "tp": tp} for shape in SHAPES for tp in (1, 2)]


def pairwise_rows(start: list[Row]) -> list[Row]:
    """Rows that cover, together with `start`, every possible pair; the same rows on every machine and version."""
    generator, rows = random.Random(17), []
    missing = possible_pairs().difference(*(row_pairs(row) for row in start))
    while missing:
        target = min(missing, key=repr)
        candidates = [row for row in (_draw(generator, target) for _ in range(_DRAWS)) if row_case(row)]
        candidates += [row for plain in _plain_rows() for row in [plain | dict(target)] if row_case(row)]
        best = max(candidates, key=lambda row: len(row_pairs(row) & missing))
        rows.append(best)
        missing -= row_pairs(best)
    return rows


def _draw(generator: random.Random, target: Pair) -> Row:
    # random() is stable across Python versions where choice() is only so by habit.
    drawn = {name: values[int(generator.random() * len(values))] for name, values in AXES.items()}
    return drawn | dict(target)
