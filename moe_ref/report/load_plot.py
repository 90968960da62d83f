"""Ratios against the mean number of rows that an expert gets."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from moe_ref.contract.vocabulary import Pattern
from moe_ref.records.schema import CaseLine
from moe_ref.report.axes import case_axes, rows_per_expert
from moe_ref.report.facts import margin_ratio
from moe_ref.report.svg import COLOURS, OTHER, ratio_axes, ratio_line, size_axis, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORCED = (Pattern.ZIPF, Pattern.ONE_HOT, Pattern.EMPTY, Pattern.ALL_TO_ONE)
"""Patterns under which experts get far more, or fewer, rows than the mean."""
_PANELS = {False: "routing as it falls, ties: most experts get about the mean",
           True: f"forced ({', '.join(_FORCED)}): some get far more, others none"}


def plot_against_rows(lines: Iterable[CaseLine]) -> str:
    """Worst ratio against T K / E, a panel for even and one for forced loads, a series per dtype; '' if there is none.

    The ratio is that of the whole layer, or of a stage above its bound; what is exact has none. Rows are rounded to two
    digits, so that many cases make few points.
    """
    worst: dict[tuple[bool, str], dict[float, float]] = {}
    for line in lines:
        rows = rows_per_expert(line.case)
        ratio = margin_ratio(line)
        if rows is not None and ratio > 0:
            axes = case_axes(line.case)
            series = worst.setdefault((axes["pattern"] in _FORCED, axes["dtype"]), {})
            rounded = float(f"{rows:.2g}")
            series[rounded] = max(series.get(rounded, 0.0), ratio)
    kinds = sorted({is_forced for is_forced, _ in worst})

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        for axes, is_forced in zip(panels, kinds, strict=True):
            drawn = {dtype: series for (forced, dtype), series in sorted(worst.items()) if forced is is_forced}
            for dtype, series in drawn.items():
                ratio_line(axes, sorted(series.items()), dtype, COLOURS.get(dtype, OTHER))
            size_axis(axes, sorted({rows for series in drawn.values() for rows in series}),
                      "mean routed rows of an expert, T K / E")
            axes.set_title(_PANELS[is_forced])
        ratio_axes(*panels)

    return svg(draw, "loads") if worst else ""
