"""The HTML page: one file, no scripts, no outer resources, light and dark; jinja2 is imported late."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from moe_ref.contract.vocabulary import Verdict
from moe_ref.records.schema import CaseLine, StageResult, from_number
from moe_ref.records.store import Run
from moe_ref.report.axes import case_axes
from moe_ref.report.compare import Comparison
from moe_ref.report.coverage import Coverage, axis_pairs_covered, coverage
from moe_ref.report.facts import (
    case_lines,
    culprit,
    failures,
    margin_stage,
    ratio_of,
    reasons,
    stage_number,
    worst_ratio,
    worst_stage,
)
from moe_ref.report.ladders import ladders
from moe_ref.report.matrix import LEVELS, colour_of, matrix
from moe_ref.report.plots import LADDERS_DRAWN, plot_against_length, plot_bias_and_scale, plot_ladders
from moe_ref.report.words import excess, first_line, format_ratio, replay, where, worst_element

_LADDERS_LISTED = 12
_VERDICT_ORDER = (Verdict.MISMATCH, Verdict.STRUCT, Verdict.CRASH, Verdict.HANG, Verdict.NONDETERMINISTIC,
                  Verdict.UNEXPECTED_PASS, Verdict.HARNESS_ERROR, Verdict.KNOWN_FAILURE, Verdict.PASS,
                  Verdict.UNSUPPORTED, Verdict.NOT_RUN)
_REASONED = (Verdict.UNSUPPORTED, Verdict.NOT_RUN, Verdict.HARNESS_ERROR, Verdict.KNOWN_FAILURE)


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


def page(run: Run, head: Sequence[str], comparison: Comparison | None = None) -> str:
    """The page as HTML; everything from records is escaped, a missing part says that it is missing."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True)
    source = files("moe_ref.report").joinpath("templates/page.html.j2").read_text(encoding="utf-8")
    cases = case_lines(run)
    lines = list(cases.values())
    anchors = {case: f"case-{number}" for number, case in enumerate(cases)}
    stages, rows = matrix(lines)
    plots = {"length": plot_against_length(lines), "ladder": plot_ladders(lines),
             "bias": plot_bias_and_scale(lines)}
    new = set(comparison.new_failures) if comparison else set()
    idle = [(verdict, reasons(lines, verdict)) for verdict in _REASONED]
    return environment.from_string(source).render(
        head=head, run=run, comparison=comparison, anchors=anchors, stages=stages, rows=rows, new=new,
        levels=range(LEVELS), pairs=axis_pairs_covered(run), failures=failures(lines), groups=_groups(lines),
        ladders=ladders(lines), shown=(_LADDERS_LISTED, LADDERS_DRAWN), spreads=_spreads(lines),
        coverage=_by_axis(lines), reasons=idle, plots={name: Markup(svg) for name, svg in plots.items()},
        culprit=culprit, worst_stage=worst_stage, margin_stage=margin_stage, excess=excess, where=where,
        worst_element=worst_element, replay=replay, first_line=first_line, format_ratio=format_ratio,
        colour_of=colour_of, tiles=tiles)


def tiles(stage: StageResult) -> list[bool]:
    """True per 64-column tile that holds an element above its bound; [] if the record names none."""
    bad = set(stage.bad_tiles)
    return [tile in bad for tile in range(stage.num_tiles)] if bad else []


def _by_axis(lines: list[CaseLine]) -> dict[str, list[Coverage]]:
    found: dict[str, list[Coverage]] = {}
    for entry in coverage(lines):
        found.setdefault(entry.axis, []).append(entry)
    return found


def _groups(lines: list[CaseLine]) -> list[tuple[Verdict, list[CaseLine]]]:
    """The full table: red verdicts first, inside a verdict the largest ratio first."""
    found = [(verdict, sorted((line for line in lines if line.verdict == verdict), key=lambda line:
                              (-worst_ratio(line), line.case))) for verdict in _VERDICT_ORDER]
    return [(verdict, members) for verdict, members in found if members]


def _spreads(lines: list[CaseLine]) -> list[StageSpread]:
    """One entry per stage and dtype, in data order; exact stages have neither bias nor scale."""
    found: dict[tuple[str, str], list[tuple[float, float, str]]] = {}
    for line in lines:
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
