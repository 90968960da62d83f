"""Which values of two axes met in a case that ran, and which never did."""

from typing import TYPE_CHECKING

from moe_ref.report.facts import count_executed
from moe_ref.report.matrix import LEVELS
from moe_ref.report.pairs import PairGrid, Together, Value, pair_grid
from moe_ref.report.sections.view import View, fill

if TYPE_CHECKING:
    from markupsafe import Markup

_LEAST_CASES = 24
"""Executed; of fewer nearly all pairs are missing, and a grid would say nothing else."""
_LISTED = 30


def pair_section(view: View) -> "Markup | str":
    """A triangle of small cells, and the pairs that most call for a case; "" where too few cases ran."""
    if count_executed(view.lines) < _LEAST_CASES:
        return ""
    grid = pair_grid(view.lines)
    axes = list(grid.values)
    return fill("sections/pairs.html.j2", grid=grid, rows=[(axis, axes[:number]) for number, axis in enumerate(axes)
                                                           if number], columns=axes[:-1],
                counts={str(together): grid.count(together) for together in Together}, never=grid.never(),
                untested=grid.untested(), listed=_LISTED, shade=lambda a, b: _shade(grid, a, b))


def _shade(grid: PairGrid, first: Value, second: Value) -> str:
    """Of a tested pair the level of its count, by factors of two; of others their word."""
    pair = grid.pairs[first, second]
    return f"level{min(pair.executed.bit_length(), LEVELS) - 1}" if pair.executed else pair.together
