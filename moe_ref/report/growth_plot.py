"""Curves of a recorded run of `moe-ref diverge`, log-log, with the bands that are predicted for them."""

from pathlib import Path
from typing import TYPE_CHECKING

from moe_ref.contract.errors import UsageValueError
from moe_ref.records.growth import GrowthLine, GrowthRun
from moe_ref.records.schema import from_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#3b82f6", "#e08700", "#14a08c", "#b052c0", "#e5484d", "#8b8fa3", "#6d8b00", "#004f9e")
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "growth", "text.parse_math": False, "font.family": "sans-serif",
          "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
          "axes.titlesize": 9, "grid.alpha": 0.2, "legend.frameon": False}


def plot_growth(run: GrowthRun, path: Path) -> None:
    """Relative error over K into a .svg or .png file, one panel per data class; bands where the data are symmetric.

    PREDICTED curves are dashed; a hollow point is a limit, its error hidden by a 16-bit store. Equal records give equal
    SVG text. UsageValueError on another suffix or a folder that is not there.
    """
    if path.suffix not in (".svg", ".png") or not path.parent.is_dir():
        raise UsageValueError(f"plot {path}: should end in .svg or .png and lie in a folder that exists")
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.6 * len(run.header.data) + 2.4, 4.2), layout="constrained")
        panels = figure.subplots(1, len(run.header.data), sharey=True, squeeze=False)[0]
        for axes, data in zip(panels, run.header.data, strict=True):
            for number, line in enumerate(run.subjects.values()):
                _draw(axes, line, data, _COLOURS[number % len(_COLOURS)])
            lengths = run.header.lengths
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(lengths, [str(length) for length in lengths], rotation=40)
            axes.yaxis.set_major_formatter(lambda value, place: f"{value:.0e}")
            axes.minorticks_off()
            axes.set_xlabel("K, terms of a sum")
            axes.set_title(f"{data} data, {run.header.dtype} operands")
            axes.grid()
        panels[0].set_ylabel("relative error (rms)")
        handles = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw(axes: "Axes", line: GrowthLine, data: str, colour: str) -> None:
    """One curve, and its band: the errors that the band's effective bits stand for at every length."""
    points = [point for point in line.curves.get(data, []) if from_number(point.relative) > 0]
    lengths, errors = [point.terms for point in points], [from_number(point.relative) for point in points]
    predicted = line.status == "PREDICTED"
    axes.plot(lengths, errors, color=colour, linestyle="--" if predicted else "-", linewidth=1.4,
              label=f"{line.subject} ({line.status})")
    for point, error in zip(points, errors, strict=True):
        axes.plot(point.terms, error, "o", color=colour, markersize=4, fillstyle="full" if point.resolved else "none")
    if line.band and data == "unit":
        counted = [point for point in points if point.terms >= 1024]
        low, high = (from_number(bits) for bits in line.band.bits)
        least, most = ([from_number(point.one_bit) * 2.0**-bits for point in counted] for bits in (high, low))
        axes.fill_between([point.terms for point in counted], least, most, color=colour, alpha=0.12, linewidth=0)
