"""Times beside torch and peers in one run, and how near limits they come: runs of `moe-ref bench`."""

from typing import TYPE_CHECKING

from moe_ref.report.bench import NO_EVIDENCE, bench_words, kernel_tables, limit_table, part_tables, timing_tables
from moe_ref.report.bench_plot import bench_svg
from moe_ref.report.sections.view import View, drawing, fill

if TYPE_CHECKING:
    from markupsafe import Markup


def bench_section(view: View) -> "Markup | str":
    """Times, ratios to the run's first subject, shares of its limits; "" without such a run."""
    runs = view.evidence.bench
    if not runs:
        return ""
    return fill("sections/bench.html.j2", runs=[(run, drawing(bench_svg(run))) for run in runs],
                mark="" if any(run.header.evidence for run in runs) else NO_EVIDENCE, no_evidence=NO_EVIDENCE,
                limits=limit_table, timings=timing_tables, parts=part_tables, kernels=kernel_tables, words=bench_words)
