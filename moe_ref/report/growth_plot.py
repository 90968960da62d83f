"""Curves of a recorded run of `moe-ref diverge`, log-log, with the bands that are predicted for them."""

from pathlib import Path
from typing import TYPE_CHECKING

from moe_ref.contract.errors import UsageValueError
from moe_ref.records.growth import GrowthLine, GrowthRun, PointResult
from moe_ref.records.schema import from_number
from moe_ref.report.svg import SERIES, save_plot, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEIGHT = 4.2
_MOST_BITS = 100
_LEAST, _MOST = 1e-30, 1e30
"""Of relative errors that are drawn; others are no numbers of a run."""


def plot_growth(run: GrowthRun, path: Path) -> None:
    """Relative error over K into a .svg or .png file, one panel per data class; bands where the data are symmetric.

    PREDICTED curves are dashed; a hollow point is a limit, its error hidden by a 16-bit store. Equal records give equal
    SVG text. UsageValueError on another suffix, a folder that is not there, or a record without an error above 0.
    """
    if not _panels(run):
        raise UsageValueError(f"plot {path}: 0 points have an error above 0, but should be at least 1")
    save_plot(lambda figure: _figure(figure, run), "growth", (5.6 * len(_panels(run)) + 2.4, _HEIGHT), path)


def growth_svg(run: GrowthRun) -> str:
    """The same as an <svg> element of a page; "" where no error above 0 was recorded."""
    if not _panels(run):
        return ""
    return svg(lambda figure: _figure(figure, run), f"growth {run.header.run}", _HEIGHT)


def _drawn(line: GrowthLine, data: str) -> list[PointResult]:
    """Points that a log axis holds."""
    return [point for point in line.curves.get(data, [])
            if point.terms and _LEAST < from_number(point.relative) < _MOST]


def _panels(run: GrowthRun) -> list[str]:
    """Data classes with a point."""
    return [data for data in run.header.data if any(_drawn(line, data) for line in run.subjects.values())]


def _figure(figure: "Figure", run: GrowthRun) -> None:
    shown = _panels(run)
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, data in zip(panels, shown, strict=True):
        for number, line in enumerate(run.subjects.values()):
            _draw(axes, line, data, SERIES[number % len(SERIES)])
        lengths = sorted({point.terms for line in run.subjects.values() for point in _drawn(line, data)})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [str(length) for length in lengths], rotation=40)
        axes.yaxis.set_major_formatter(lambda value, place: f"{value:.0e}")
        axes.minorticks_off()
        axes.set_xlabel("K, terms of a sum")
        axes.set_title(f"{data} data, {run.header.dtype} operands")
        axes.grid()
    panels[0].set_ylabel("relative error (rms)")
    handles = {label: handle for axes in panels
               for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)


def _draw(axes: "Axes", line: GrowthLine, data: str, colour: str) -> None:
    """One curve, and its band: the errors that the band's effective bits stand for at every length."""
    points = _drawn(line, data)
    lengths, errors = [point.terms for point in points], [from_number(point.relative) for point in points]
    predicted = line.status == "PREDICTED"
    axes.plot(lengths, errors, color=colour, linestyle="--" if predicted else "-", linewidth=1.4,
              label=f"{line.subject} ({line.status})")
    for point, error in zip(points, errors, strict=True):
        axes.plot(point.terms, error, "o", color=colour, markersize=4, fillstyle="full" if point.resolved else "none")
    if line.band and data == "unit":
        counted = [point for point in points if point.terms >= 1024]
        # No format has so many bits; beyond them a power of two is no float.
        low, high = (min(max(from_number(bits), -_MOST_BITS), _MOST_BITS) for bits in line.band.bits)
        least, most = ([from_number(point.one_bit) * 2.0**-bits for point in counted] for bits in (high, low))
        axes.fill_between([point.terms for point in counted], least, most, color=colour, alpha=0.12, linewidth=0)
