"""Plots of the matrix's cases as inline SVG."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from moe_ref.contract.vocabulary import Stage
from moe_ref.records.schema import CaseLine, from_number
from moe_ref.report.axes import case_axes, reduction
from moe_ref.report.facts import margin_ratio, ratio_of
from moe_ref.report.ladders import Ladder
from moe_ref.report.svg import COLOURS, INK, OTHER, ratio_axes, ratio_line, size_axis, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SCALE_TICKS = (-1, -1e-2, -1e-4, 0, 1e-4, 1e-2, 1)
_DOTS = 2000
LADDERS_DRAWN = 40
"""Those that climb most; hundreds of lines are neither read nor light."""

_KINDS = {"hidden": ("logits, gate_up, act", "K = hidden size"),
          "intermediate": ("down, shared, merged, reduced", "K = intermediate size"),
          "output": ("the whole layer", "K = hidden + intermediate size")}


def plot_against_length(lines: Iterable[CaseLine]) -> str:
    """Worst ratio against K, a panel per kind of sum, a series per dtype; '' if nothing was measured."""
    worst: dict[tuple[str, str], dict[int, float]] = {}
    for line in lines:
        for stage in line.stages:
            found = reduction(stage.stage, line.case)
            if found and not stage.exact:
                series = worst.setdefault((found[0], case_axes(line.case)["dtype"]), {})
                series[found[1]] = max(series.get(found[1], 0.0), ratio_of(stage.ratio))
    kinds = [kind for kind in _KINDS if any(of_kind == kind for of_kind, _ in worst)]

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        for axes, kind in zip(panels, kinds, strict=True):
            drawn = {dtype: series for (of_kind, dtype), series in sorted(worst.items()) if of_kind == kind}
            for dtype, series in drawn.items():
                ratio_line(axes, sorted(series.items()), dtype, COLOURS.get(dtype, OTHER))
            title, label = _KINDS[kind]
            size_axis(axes, sorted({length for series in drawn.values() for length in series}), label)
            axes.set_title(title)
        ratio_axes(*panels)

    return svg(draw, "length") if worst else ""


def plot_ladders(found: Mapping[str, Sequence[Ladder]]) -> str:
    """Worst ratio over tp, and over ep, for the steepest ladders, coloured by dtype; '' if there is no ladder."""
    found = {axis: of_axis[:LADDERS_DRAWN] for axis, of_axis in found.items() if of_axis}

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for axes, (axis, of_axis) in zip(panels, found.items(), strict=True):
            named = set()
            for ladder in of_axis:
                dtype = case_axes(next(iter(ladder.steps.values())).case)["dtype"]
                points = [(degree, margin_ratio(line)) for degree, line in ladder.steps.items()]
                ratio_line(axes, points, "" if dtype in named else dtype, COLOURS.get(dtype, OTHER))
                named.add(dtype)
            size_axis(axes, sorted({degree for ladder in of_axis for degree in ladder.steps}), axis)
        ratio_axes(*panels)

    return svg(draw, "ladder") if found else ""


def plot_bias_and_scale(lines: Iterable[CaseLine]) -> str:
    """Signed bias and best-fit scale per stage, a dot per case; '' if no stage was measured."""
    dots: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in lines:
        colour = COLOURS.get(case_axes(line.case).get("dtype", ""), OTHER)
        for stage in line.stages:
            bias, scale = from_number(stage.bias), from_number(stage.scale)
            if not stage.exact and stage.num_checked and math.isfinite(bias) and math.isfinite(scale):
                dots.setdefault(stage.stage, {}).setdefault(colour, []).append((bias, scale - 1))
    names = [str(stage) for stage in Stage if stage in dots]

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(1, 2, sharey=True)
        for number, (axes, label) in enumerate(zip(panels, ("bias: mean signed error / allowed",
                                                           "best-fit scale - 1"), strict=True)):
            for row, name in enumerate(names):
                for colour, found in dots[name].items():
                    shown = _thinned([dot[number] for dot in found])
                    axes.scatter(shown, [row] * len(shown), color=colour, s=16, alpha=0.6, linewidths=0,
                                 rasterized=True)
            axes.axvline(0, color=INK, linewidth=0.8)
            if number == 1:
                axes.set_xscale("symlog", linthresh=1e-4)
                axes.set_xticks(_SCALE_TICKS, [f"{tick:g}" for tick in _SCALE_TICKS])
                axes.minorticks_off()
            axes.set_xlabel(label)
            axes.set_yticks(range(len(names)), names)
            axes.grid(axis="y")
        panels[0].invert_yaxis()

    return svg(draw, "bias", height=1.2 + 0.28 * len(names)) if names else ""


def _thinned(values: list[float]) -> list[float]:
    """The same dots, of those that nobody could tell apart one: ten thousand in a row take seconds to draw."""
    if len(values) <= _DOTS:
        return values
    return sorted({float(f"{value:.2e}") for value in values})
