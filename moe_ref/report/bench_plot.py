"""Times of a recorded run of `moe-ref bench` over the number of tokens, log-log, with the least time at its limits."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from moe_ref.contract.errors import UsageValueError
from moe_ref.records.bench import BenchRun, TimingLine
from moe_ref.records.schema import from_number
from moe_ref.report.bench import NO_EVIDENCE, groups, median, of_limit
from moe_ref.report.svg import OTHER, SERIES, save_plot, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
_ROW = 3.4
"""Height of a row of panels."""

_MOST_SECONDS = 1e9
"""A log axis holds neither 0 nor infinity; no run is so long."""

Panels = list[tuple[str, list[TimingLine]]]


def plot_bench(run: BenchRun, path: Path) -> None:
    """Median seconds over T into a .svg or .png file, a panel per model, degree and operation; quartiles are bars.

    Dotted: the least time at the limits that the run measured. Equal records give equal SVG text. UsageValueError on
    another suffix, a folder that is not there, or a record in which nothing was timed.
    """
    panels = _panels(run)
    if not panels:
        raise UsageValueError(f"plot {path}: 0 shapes were timed, but should be at least 1")
    save_plot(lambda figure: _figure(figure, run, panels), "bench",
              (4.2 * min(_COLUMNS, len(panels)) + 1.6, _ROW * _num_rows(panels)), path)


def bench_svg(run: BenchRun) -> str:
    """The same as an <svg> element of a page; "" where nothing was timed."""
    panels = _panels(run)
    if not panels:
        return ""
    return svg(lambda figure: _figure(figure, run, panels), f"bench {run.header.run}", _ROW * _num_rows(panels))


def _panels(run: BenchRun) -> Panels:
    return [(f"{model}, tp {tp}, {operation}", timed) for model, tp, operation, lines in groups(run)
            if (timed := [line for line in lines if line.status == "TIMED" and 0 < median(line) < _MOST_SECONDS])]


def _num_rows(panels: Panels) -> int:
    return math.ceil(len(panels) / _COLUMNS)


def _figure(figure: "Figure", run: BenchRun, panels: Panels) -> None:
    if not run.header.evidence:
        figure.suptitle(NO_EVIDENCE, x=0.01, ha="left")
    every = figure.subplots(_num_rows(panels), min(_COLUMNS, len(panels)), squeeze=False).flatten()
    for axes, (title, lines) in zip(every, panels, strict=False):
        _draw(axes, run, title, lines)
    for axes in every[len(panels):]:
        axes.set_axis_off()
    handles = {label: handle for axes in every[:len(panels)]
               for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)


def _draw(axes: "Axes", run: BenchRun, title: str, lines: list[TimingLine]) -> None:
    """One panel: a curve per subject, and the least time."""
    for number, subject in enumerate(run.header.subjects):
        own = [line for line in lines if line.subject == subject]
        if not own:
            continue
        seconds = [median(line) for line in own]
        off = [[abs(one - from_number(line.seconds[place])) for one, line in zip(seconds, own, strict=True)]
               for place in (1, 2)]
        axes.errorbar([line.tokens for line in own], seconds, yerr=off, color=SERIES[number % len(SERIES)],
                      marker="o", markersize=3, linewidth=1.4, elinewidth=0.8, label=subject)
    least = {line.tokens: of_limit(run, line.flop, line.num_bytes, 1.0) for line in lines}
    axes.plot(list(least), list(least.values()), color=OTHER, linestyle=":", linewidth=1.4,
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
