"""A trend as a small inline drawing: points over runs, the bound, strokes where something changed."""

import math
from html import escape
from itertools import pairwise

from moe_ref.report.trends import Trend, Trends, run_label, words_of

_WIDTH, _HEIGHT, _EDGE = 260, 36, 6
_LOW, _HIGH = 0.05, 5.0
"""Ratios are drawn within these, on a log scale."""
_BAD = "#e5484d"


def trend_chart(trend: Trend, found: Trends) -> str:
    """An <svg> as wide for every class, so that strokes stand below each other; each point says its run and ratio."""
    parts = [_line(_EDGE, _height(1.0), _WIDTH - _EDGE, _height(1.0), f'stroke="{_BAD}"')]
    for number in found.changes:
        middle = (_place(number - 1, found) + _place(number, found)) / 2
        parts.append(_line(middle, 0, middle, _HEIGHT, 'stroke="currentColor" stroke-dasharray="2 2"'))
    drawn = [(number, point) for number, point in enumerate(trend.points) if point is not None]
    ends = [(number, point.worst) for number, point in drawn if point.worst is not None]
    for (number, start), (other, stop) in pairwise(ends):
        parts.append(_line(_place(number, found), _height(start), _place(other, found), _height(stop),
                           'stroke="currentColor" stroke-opacity="0.5"'))
    for number, point in drawn:
        above = point.worst is None or point.worst > 1
        words = f"{run_label(found.runs[number])}: {words_of(point)}, {point.failures} failed"
        parts.append(f'<circle cx="{_place(number, found):.1f}" cy="{_height(point.worst):.1f}" r="2.6" '
                     f'fill="{_BAD if above else "currentColor"}"><title>{escape(words)}</title></circle>')
    words = f"{trend.group} {trend.stage}: {', '.join(words_of(point) for point in trend.points)}"
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
            f'aria-label="{escape(words)}" style="width:{_WIDTH}px;max-width:none">{"".join(parts)}</svg>')


def _place(number: int, found: Trends) -> float:
    return _EDGE + (_WIDTH - 2 * _EDGE) * (number / max(1, len(found.runs) - 1))


def _height(ratio: float | None) -> float:
    """A failure without a ratio stands at the top."""
    held = _HIGH if ratio is None else min(max(ratio, _LOW), _HIGH)
    return 3 + (_HEIGHT - 6) * (1 - math.log(held / _LOW) / math.log(_HIGH / _LOW))


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke-width="1" {style}/>'
