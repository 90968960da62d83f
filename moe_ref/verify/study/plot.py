"""Histograms of how near right layers come to the thresholds."""

from pathlib import Path

from moe_ref.contract.errors import UsageValueError
from moe_ref.verify.study.alarms import Spread

LEAST = 1e-4
"""Smaller shares of a threshold, 0 among them, are drawn here."""
_COLUMNS, _BINS = 4, 60
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "alarms", "text.parse_math": False, "font.family": "sans-serif",
          "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
          "axes.titlesize": 9, "grid.alpha": 0.2}


def plot_spreads(spreads: list[Spread], path: Path) -> None:
    """A panel per check into a .svg or .png file: runs over value / threshold, both axes logarithmic.

    Equal spreads give equal SVG text. UsageValueError on another suffix or a folder that is not there.
    """
    if path.suffix not in (".svg", ".png") or not path.parent.is_dir():
        raise UsageValueError(f"plot {path}: should end in .svg or .png and lie in a folder that exists")
    import matplotlib
    from matplotlib.figure import Figure

    rows = -(-len(spreads) // _COLUMNS)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.4 * _COLUMNS, 2.0 * rows + 0.4), layout="constrained")
        panels = figure.subplots(rows, _COLUMNS, sharex=True, squeeze=False).flatten()
        edges = [LEAST * 10 ** (4.5 * step / _BINS) for step in range(_BINS + 1)]
        for axes, one in zip(panels, spreads, strict=False):
            axes.hist([max(LEAST, value) for value in one.values], edges, color="#3b82f6")
            axes.axvline(1.0, color="#e5484d", linewidth=1.2)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
            axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
            axes.minorticks_off()
            axes.set_title(f"{one.check}: {len(one.values)} runs, largest {one.largest:.2f}")
            axes.grid()
        for axes in panels[len(spreads):]:
            axes.set_visible(False)
        figure.supxlabel("largest value of a run over its threshold", fontsize=9)
        figure.supylabel("runs", fontsize=9)
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
