"""Times of a recorded run of `moe-ref bench` over the number of tokens, log-log, with the least time at its limits."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from moe_ref.contract.errors import UsageValueError
from moe_ref.records.bench import BenchRun, TimingLine
from moe_ref.records.schema import from_number
from moe_ref.report.bench import NO_EVIDENCE, groups, median, of_limit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#3b82f6", "#e08700", "#14a08c", "#b052c0", "#e5484d", "#6d8b00", "#004f9e")
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "bench", "text.parse_math": False, "font.family": "sans-serif",
          "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
          "axes.titlesize": 9, "grid.alpha": 0.2, "legend.frameon": False}
_COLUMNS = 3


def plot_bench(run: BenchRun, path: Path) -> None:
    """Median seconds over T into a .svg or .png file, a panel per model, degree and operation; quartiles are bars.

    Dotted: the least time at the limits that the run measured. Equal records give equal SVG text. UsageValueError on
    another suffix, a folder that is not there, or a record in which nothing was timed.
    """
    if path.suffix not in (".svg", ".png") or not path.parent.is_dir():
        raise UsageValueError(f"plot {path}: should end in .svg or .png and lie in a folder that exists")
    panels = [(f"{model}, tp {tp}, {operation}", timed) for model, tp, operation, lines in groups(run)
              if (timed := [line for line in lines if line.status == "TIMED"])]
    if not panels:
        raise UsageValueError(f"plot {path}: 0 shapes were timed, but should be at least 1")
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.2 * columns + 1.6, 3.4 * rows), layout="constrained")
        if not run.header.evidence:
            figure.suptitle(NO_EVIDENCE, x=0.01, ha="left")
        every = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, (title, lines) in zip(every, panels, strict=False):
            _draw(axes, run, title, lines)
        for axes in every[len(panels):]:
            axes.set_axis_off()
        handles = {label: handle for axes in every[:len(panels)]
                   for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw(axes: "Axes", run: BenchRun, title: str, lines: list[TimingLine]) -> None:
    """One panel: a curve per subject, and the least time."""
    for number, subject in enumerate(run.header.subjects):
        own = [line for line in lines if line.subject == subject]
        if not own:
            continue
        seconds = [median(line) for line in own]
        off = [[abs(one - from_number(line.seconds[place])) for one, line in zip(seconds, own, strict=True)]
               for place in (1, 2)]
        axes.errorbar([line.tokens for line in own], seconds, yerr=off, color=_COLOURS[number % len(_COLOURS)],
                      marker="o", markersize=3, linewidth=1.4, elinewidth=0.8, label=subject)
    least = {line.tokens: of_limit(run, line.flop, line.num_bytes, 1.0) for line in lines}
    axes.plot(list(least), list(least.values()), color="#8b8fa3", linestyle=":", linewidth=1.4,
              label="least at the limits")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(least), [str(tokens) for tokens in least], rotation=40)
    axes.yaxis.set_major_formatter(lambda value, place: f"{value:.0e}")
    axes.minorticks_off()
    axes.set_xlabel("T, tokens")
    axes.set_ylabel("seconds")
    axes.set_title(title)
    axes.grid()
