"""Plots of the page as inline SVG; matplotlib is imported only when a plot is drawn.

Text and axes are drawn in a marker colour that becomes `currentColor`, so they follow the page's light or
dark theme. Series colours stand out on both.
"""

import io
import math
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from moe_ref.contract.vocabulary import Stage
from moe_ref.records.schema import CaseLine, from_number
from moe_ref.report.axes import case_axes, reduction
from moe_ref.report.facts import margin_ratio, ratio_of
from moe_ref.report.ladders import ladders

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#010203"
_COLOURS = {"bf16": "#3b82f6", "fp16": "#e08700", "fp32": "#14a08c"}
_OTHER, _BAD = "#8b8fa3", "#e5484d"
_CEILING, _GROUND = 1e3, 1e-3
"""Ratios are drawn within these; inf and nan stand at the ceiling."""
_TICK_GAP = 0.08
"""Least distance of two labelled sizes, as a share of a panel's width."""
_SCALE_TICKS = (-1, -1e-2, -1e-4, 0, 1e-4, 1e-2, 1)
LADDERS_DRAWN = 40
"""Those that climb most; hundreds of lines are neither read nor light."""

_KINDS = {"hidden": ("logits, gate_up, act", "K = hidden size"),
          "intermediate": ("down, shared, merged, reduced", "K = intermediate size"),
          "output": ("the whole layer", "K = hidden + intermediate size")}

_STYLE = {"svg.fonttype": "none", "text.parse_math": False, "font.family": "sans-serif", "font.size": 9,
          "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK, "xtick.color": _INK,
          "ytick.color": _INK, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9,
          "axes.titlelocation": "left", "grid.color": _INK, "grid.alpha": 0.15, "legend.frameon": False}


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
                _line(axes, sorted(series.items()), dtype, _COLOURS.get(dtype, _OTHER))
            title, label = _KINDS[kind]
            _size_axis(axes, sorted({length for series in drawn.values() for length in series}), label)
            axes.set_title(title)
        _ratio_axes(*panels)

    return _svg(draw, "length") if worst else ""


def plot_ladders(lines: Iterable[CaseLine]) -> str:
    """Worst ratio over tp for the steepest ladders, coloured by dtype; '' if there is no ladder."""
    found = [ladder.steps for ladder in ladders(lines)[:LADDERS_DRAWN]]

    def draw(figure: "Figure") -> None:
        axes, named = figure.subplots(), set()
        for steps in found:
            dtype = case_axes(next(iter(steps.values())).case)["dtype"]
            points = [(tp, margin_ratio(line)) for tp, line in steps.items()]
            _line(axes, points, "" if dtype in named else dtype, _COLOURS.get(dtype, _OTHER))
            named.add(dtype)
        _size_axis(axes, sorted({tp for steps in found for tp in steps}), "tp")
        _ratio_axes(axes)

    return _svg(draw, "ladder") if found else ""


def plot_bias_and_scale(lines: Iterable[CaseLine]) -> str:
    """Signed bias and best-fit scale per stage, a dot per case; '' if no stage was measured."""
    dots: dict[str, list[tuple[float, float, str]]] = {}
    for line in lines:
        for stage in line.stages:
            bias, scale = from_number(stage.bias), from_number(stage.scale)
            if not stage.exact and stage.num_checked and math.isfinite(bias) and math.isfinite(scale):
                colour = _COLOURS.get(case_axes(line.case).get("dtype", ""), _OTHER)
                dots.setdefault(stage.stage, []).append((bias, scale - 1, colour))
    names = [str(stage) for stage in Stage if stage in dots]

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(1, 2, sharey=True)
        for number, (axes, label) in enumerate(zip(panels, ("bias: mean signed error / allowed",
                                                           "best-fit scale - 1"), strict=True)):
            for row, name in enumerate(names):
                axes.scatter([dot[number] for dot in dots[name]], [row] * len(dots[name]),
                             c=[dot[2] for dot in dots[name]], s=16, alpha=0.6, linewidths=0, rasterized=True)
            axes.axvline(0, color=_INK, linewidth=0.8)
            if number == 1:
                axes.set_xscale("symlog", linthresh=1e-4)
                axes.set_xticks(_SCALE_TICKS, [f"{tick:g}" for tick in _SCALE_TICKS])
                axes.minorticks_off()
            axes.set_xlabel(label)
            axes.set_yticks(range(len(names)), names)
            axes.grid(axis="y")
        panels[0].invert_yaxis()

    return _svg(draw, "bias", height=1.2 + 0.28 * len(names)) if names else ""


def _line(axes: "Axes", points: list[tuple[int, float]], label: str, colour: str) -> None:
    """A line through the points; those above the bound are red."""
    sizes = [size for size, _ in points]
    ratios = [min(max(ratio, _GROUND), _CEILING) for _, ratio in points]
    axes.plot(sizes, ratios, color=colour, label=label or None, linewidth=1.3, alpha=0.8)
    axes.scatter(sizes, ratios, s=24, zorder=3, linewidths=0,
                 c=[_BAD if ratio > 1 else colour for ratio in ratios])


def _size_axis(axes: "Axes", sizes: list[int], label: str) -> None:
    """A log axis with its ticks at measured sizes that stand far enough apart to be read."""
    shown = sizes[:1]
    for size in sizes[1:]:
        if math.log(size / shown[-1]) >= _TICK_GAP * math.log(sizes[-1] / sizes[0]):
            shown.append(size)
    axes.set_xscale("log", base=2)
    axes.set_xticks(shown, [str(size) for size in shown])
    axes.minorticks_off()
    axes.set_xlabel(label)


def _ratio_axes(*panels: "Axes") -> None:
    """Log axes of ratios that share limits, with the bound as a red line; tick labels are plain numbers."""
    low = min(0.1, *(axes.dataLim.ymin for axes in panels)) / 1.5
    high = max(2.0, *(axes.dataLim.ymax for axes in panels)) * 1.5
    decades = [10.0 ** power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    for axes in panels:
        axes.set_yscale("log")
        axes.axhline(1.0, color=_BAD, linewidth=1.2)
        axes.set_ylim(low, high)
        axes.set_yticks(decades, [f"{decade:g}" for decade in decades])
        axes.grid(axis="y")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best", fontsize=8)
    panels[0].set_ylabel("worst error / allowed")


def _svg(draw: Callable[["Figure"], None], salt: str, height: float = 3.0) -> str:
    """The figure as an <svg> element without scripts or outer resources; equal input gives equal text."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": salt}):
        figure = Figure(figsize=(12.4, height), layout="constrained")
        figure.patch.set_alpha(0)
        draw(figure)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", dpi=96, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg"):], flags=re.DOTALL)
    return text.replace(_INK, "currentColor")
