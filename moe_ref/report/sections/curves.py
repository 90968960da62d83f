"""Ratios against the length of sums and tokens per expert, ladders, bias and scale: plots of the matrix's cases."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_ref.records.schema import from_number
from moe_ref.report.axes import case_axes
from moe_ref.report.facts import ratio_of, stage_number
from moe_ref.report.ladders import AXES, ladders
from moe_ref.report.load_plot import plot_against_rows
from moe_ref.report.plots import LADDERS_DRAWN, plot_against_length, plot_bias_and_scale, plot_ladders
from moe_ref.report.sections.view import View, drawing, fill

if TYPE_CHECKING:
    from markupsafe import Markup

_LADDERS_LISTED = 12


@dataclass(frozen=True)
class StageSpread:
    """Bias and scale of one stage and dtype over all cases: extremes, with the case of the largest bias."""

    stage: str
    dtype: str
    num_cases: int
    mean_bias: float
    worst_bias: float
    worst_case: str
    least_scale: float
    most_scale: float


def length_section(view: View) -> "Markup":
    """The largest ratio at each K, and at each mean number of tokens that an expert gets."""
    return fill("sections/length.html.j2", plot=drawing(plot_against_length(view.lines)),
                loads=drawing(plot_against_rows(view.lines)))


def ladder_section(view: View) -> "Markup":
    """One case at growing tp, and at growing ep."""
    found = {axis: ladders(view.lines, axis) for axis in AXES}
    return fill("sections/ladder.html.j2", plot=drawing(plot_ladders(found)), found=found, shown=_LADDERS_LISTED,
                drawn=LADDERS_DRAWN, anchors=view.anchors)


def bias_section(view: View) -> "Markup":
    """Signed error and best-fit scale per stage."""
    return fill("sections/bias.html.j2", plot=drawing(plot_bias_and_scale(view.lines)), spreads=_spreads(view),
                anchors=view.anchors)


def _spreads(view: View) -> list[StageSpread]:
    """One entry per stage and dtype, in data order; exact stages have neither bias nor scale."""
    found: dict[tuple[str, str], list[tuple[float, float, str]]] = {}
    for line in view.lines:
        for stage in line.stages:
            if not stage.exact and stage.num_checked:
                key = (stage.stage, case_axes(line.case).get("dtype", "?"))
                numbers = from_number(stage.bias), from_number(stage.scale)
                found.setdefault(key, []).append((*numbers, line.case))
    spreads = []
    for (stage, dtype), values in sorted(found.items(), key=lambda item: (stage_number(item[0][0]), item[0])):
        worst = max(values, key=lambda value: ratio_of(abs(value[0])))
        spreads.append(StageSpread(stage, dtype, len(values), sum(value[0] for value in values) / len(values),
                                   worst[0], worst[2], min(value[1] for value in values),
                                   max(value[1] for value in values)))
    return spreads
