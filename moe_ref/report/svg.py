"""How every plot looks, inline or in a file, and the axes they share; matplotlib is imported only when one is drawn.

Inline, text and axes are drawn in a marker colour that becomes `currentColor`, so they follow the page's light or
dark theme. Series colours stand out on both.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_ref.contract.errors import UsageValueError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"
COLOURS = {"bf16": "#3b82f6", "fp16": "#e08700", "fp32": "#14a08c"}
OTHER, BAD = "#8b8fa3", "#e5484d"
SERIES = ("#3b82f6", "#e08700", "#14a08c", "#b052c0", "#e5484d", "#8b8fa3", "#6d8b00", "#2f6fb0")
"""Colours of series that are no dtypes, in order."""
_CEILING, _GROUND = 1e3, 1e-3
"""Ratios are drawn within these; inf and nan stand at the ceiling."""
_TICK_GAP = 0.08
"""Least distance of two labelled sizes, as a share of a panel's width."""

_STYLE = {"svg.fonttype": "none", "text.parse_math": False, "font.family": "sans-serif", "font.size": 9,
          "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
          "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9,
          "axes.titlelocation": "left", "grid.color": INK, "grid.alpha": 0.15, "legend.frameon": False}


def ratio_line(axes: "Axes", points: Sequence[tuple[float, float]], label: str, colour: str) -> None:
    """A line through the points; those above the bound are red."""
    sizes = [size for size, _ in points]
    ratios = [min(max(ratio, _GROUND), _CEILING) for _, ratio in points]
    axes.plot(sizes, ratios, color=colour, label=label or None, linewidth=1.3, alpha=0.8)
    axes.scatter(sizes, ratios, s=24, zorder=3, linewidths=0,
                 c=[BAD if ratio > 1 else colour for ratio in ratios])


def size_axis(axes: "Axes", sizes: Sequence[float], label: str) -> None:
    """A log axis with its ticks at measured sizes that stand far enough apart to be read."""
    shown = list(sizes[:1])
    for size in sizes[1:]:
        if math.log(size / shown[-1]) >= _TICK_GAP * math.log(sizes[-1] / sizes[0]):
            shown.append(size)
    axes.set_xscale("log", base=2)
    axes.set_xticks(shown, [f"{size:.3g}" if size % 1 else f"{size:.0f}" for size in shown])
    axes.minorticks_off()
    axes.set_xlabel(label)


def ratio_axes(*panels: "Axes") -> None:
    """Log axes of ratios that share limits, with the bound as a red line; tick labels are plain numbers."""
    low = min(0.1, *(axes.dataLim.ymin for axes in panels)) / 1.5
    high = max(2.0, *(axes.dataLim.ymax for axes in panels)) * 1.5
    decades = [10.0 ** power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    for axes in panels:
        axes.set_yscale("log")
        axes.axhline(1.0, color=BAD, linewidth=1.2)
        axes.set_ylim(low, high)
        axes.set_yticks(decades, [f"{decade:g}" for decade in decades])
        axes.grid(axis="y")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best", fontsize=8)
    panels[0].set_ylabel("worst error / allowed")


def svg(draw: Callable[["Figure"], None], salt: str, height: float = 3.0) -> str:
    """The figure as an <svg> element without scripts or outer resources; equal input gives equal text.

    salt: apart for every plot of a page, since the ids of its parts are made from it.
    """
    buffer = io.StringIO()
    _save(draw, salt, (12.4, height), buffer, "svg", is_clear=True)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg"):], flags=re.DOTALL)
    # Equal images of two panels have equal ids, and nothing refers to them.
    text = re.sub(r' id="image\w+"', "", text)
    return text.replace(INK, "currentColor")


def save_plot(draw: Callable[["Figure"], None], salt: str, size: tuple[float, float], path: Path) -> None:
    """The figure as a .svg or .png file, size in inches; UsageValueError for another suffix, or a folder that is not
    there.
    """
    if path.suffix not in (".svg", ".png") or not path.parent.is_dir():
        raise UsageValueError(f"plot {path}: should end in .svg or .png and lie in a folder that exists")
    _save(draw, salt, size, path, path.suffix[1:], is_clear=False)


def _save(draw: Callable[["Figure"], None], salt: str, size: tuple[float, float], to: io.StringIO | Path, kind: str,
          *, is_clear: bool) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": salt}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        for patch in (figure.patch, *(axes.patch for axes in figure.axes)) if is_clear else ():
            patch.set_alpha(0)
        figure.savefig(to, format=kind, dpi=96 if is_clear else 120,
                       metadata={"Date": None, "Creator": None} if kind == "svg" else None)
