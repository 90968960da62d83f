"""What a run says, read off its records: one line per chosen case, counts, the worst stage, failures."""

from collections import Counter
from collections.abc import Iterable

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import EXECUTED_VERDICTS, RED_VERDICTS, Stage, Verdict
from moe_ref.records.schema import CaseLine, Number, StageResult, from_number
from moe_ref.records.store import Run

_VERDICTS = frozenset(map(str, Verdict))
_STAGE_ORDER = {str(stage): number for number, stage in enumerate(Stage)}


def case_lines(run: Run) -> dict[str, CaseLine]:
    """One line per case: the chosen in their order, then any others that were recorded.

    A chosen case without a line gets one that says `not_run`, so that nothing chosen can drop out of a
    report. Raises UsageValueError on a verdict outside the vocabulary.
    """
    reason = "no line was recorded" if run.end else "the run was cut short before it"
    lines = {case: run.cases.get(case) or _not_run(run, case, reason) for case in run.header.cases}
    lines |= run.cases
    for line in lines.values():
        if line.verdict not in _VERDICTS:
            raise UsageValueError(f"case {line.case}: verdict {line.verdict!r}, but should be one of "
                                  + ", ".join(Verdict))
    return lines


def _not_run(run: Run, case: str, reason: str) -> CaseLine:
    return CaseLine(run=run.header.run, case=case, purpose="", implementation=run.header.implementation,
                    ranks="", device="", verdict=Verdict.NOT_RUN, reason=reason)


def is_red(line: CaseLine) -> bool:
    """Whether the line accuses the implementation."""
    return line.verdict in RED_VERDICTS


def is_executed(line: CaseLine) -> bool:
    """Whether the case really ran."""
    return line.verdict in EXECUTED_VERDICTS


def count_executed(lines: Iterable[CaseLine]) -> int:
    """How many of the lines are of cases that really ran."""
    return sum(is_executed(line) for line in lines)


def ratio_of(value: Number) -> float:
    """A recorded ratio for comparing; nan (an error that could not be measured) is worse than any number."""
    number = from_number(value)
    return float("inf") if number != number else number


def stage_number(stage: str) -> int:
    """Place of a stage in data order; stages outside the vocabulary come last."""
    return _STAGE_ORDER.get(stage, len(_STAGE_ORDER))


def worst_stage(line: CaseLine) -> StageResult | None:
    """The stage closest to (or furthest above) its bound; None if no stage was compared."""
    return max(line.stages, key=lambda stage: ratio_of(stage.ratio), default=None)


def worst_ratio(line: CaseLine) -> float:
    """The ratio of the worst stage; 0 if no stage was compared."""
    stage = worst_stage(line)
    return ratio_of(stage.ratio) if stage else 0.0


def margin_stage(line: CaseLine) -> StageResult | None:
    """The stage whose ratio tells how much room a case has left: one above its bound, else the whole layer's.

    A stage that is rounded when it is stored may use up all of its bound by that one rounding, so the worst
    stage of a correct kernel stands near 1; `output`, where it was judged, has no such floor.
    """
    worst = worst_stage(line)
    if worst is None or ratio_of(worst.ratio) > 1:
        return worst
    return next((stage for stage in line.stages if stage.stage == Stage.OUTPUT), worst)


def margin_ratio(line: CaseLine) -> float:
    """The ratio of that stage; 0 if no stage was compared."""
    stage = margin_stage(line)
    return ratio_of(stage.ratio) if stage else 0.0


def nearest_pass(lines: Iterable[CaseLine]) -> CaseLine | None:
    """The passing case with the least room left; None if none was measured."""
    passing = [line for line in lines if line.verdict == Verdict.PASS and line.stages]
    return max(passing, key=margin_ratio, default=None)


def culprit(line: CaseLine) -> StageResult | None:
    """The first failing stage in data order; without one the worst."""
    named = [stage for stage in line.stages if stage.stage == line.first_stage]
    return named[0] if named else worst_stage(line)


def failures(lines: Iterable[CaseLine]) -> list[CaseLine]:
    """Red lines, earliest stage first, within a stage the largest ratio first."""
    def key(line: CaseLine) -> tuple[int, float, str]:
        stage = culprit(line)
        return stage_number(line.first_stage or ""), -(ratio_of(stage.ratio) if stage else 0.0), line.case

    return sorted((line for line in lines if is_red(line)), key=key)


def reasons(lines: Iterable[CaseLine], verdict: Verdict) -> list[tuple[str, int]]:
    """(first line of the reason, number of cases) of one verdict, most frequent first."""
    found = Counter(line.reason.partition("\n")[0] or "no reason recorded"
                    for line in lines if line.verdict == verdict)
    return sorted(found.items(), key=lambda item: (-item[1], item[0]))
