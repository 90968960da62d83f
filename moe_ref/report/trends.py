"""How classes of cases went over the runs of a history: points, sparklines, and what changed between runs."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import msgspec

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Stage
from moe_ref.report.axes import axis_sort_key
from moe_ref.report.facts import stage_number
from moe_ref.report.history import WATCHED, Past, PastRatio, PastRun
from moe_ref.report.tables import NamedTable
from moe_ref.report.words import format_ratio, one_line

_BLOCKS = "▁▂▃▄▅▆▇"
_ABOVE, _ABSENT, _CHANGED = "█", "·", "|"
EVERY_STAGE = "all"


@dataclass(frozen=True)
class Trend:
    """One class at one stage; a point per run, None where it did not run."""

    group: str
    stage: str
    points: tuple[PastRatio | None, ...]

    @property
    def known(self) -> list[PastRatio]:
        """Points that are there."""
        return [point for point in self.points if point is not None]


@dataclass(frozen=True)
class Trends:
    """Runs of one implementation, tier and kind of device, oldest first. changes: number of a run -> what changed."""

    runs: tuple[PastRun, ...]
    changes: dict[int, tuple[str, ...]]
    trends: tuple[Trend, ...]


def newest_run(past: Past, implementation: str = "", tier: str = "") -> PastRun:
    """The last run of an implementation and tier, of any where none is named; UsageValueError where there is none."""
    for run in reversed(past.runs):
        if implementation in ("", run.implementation) and tier in ("", run.tier):
            return run
    known = sorted({f"{run.implementation} {run.tier}" for run in past.runs})
    raise UsageValueError(f"no run of {implementation or 'any implementation'}, tier {tier or 'any'}; "
                          f"the history holds {one_line(', '.join(known)) or 'no runs'}")


def trends_of(past: Past, like: PastRun, words: str = "", stages: Collection[str] = (Stage.OUTPUT,)) -> Trends:
    """Runs of the implementation and tier of one of them, on CPUs or on GPUs as that one, and the chosen classes.

    words: a class is chosen if it has all of them ("bf16 tp4"). stages: EVERY_STAGE stands for all. Raises
    UsageValueError, with what there is, where nothing fits.
    """
    runs = tuple(run for run in past.runs if _kind(run) == _kind(like))
    number = {run.run: place for place, run in enumerate(runs)}
    found: dict[tuple[str, str], list[PastRatio | None]] = {}
    groups: dict[str, PastRatio] = {}
    for ratio in past.ratios:
        if ratio.run in number:
            groups[ratio.group] = ratio
            if set(words.split()) <= set(ratio.group.split()) and (EVERY_STAGE in stages or ratio.stage in stages):
                nothing: list[PastRatio | None] = [None] * len(runs)
                found.setdefault((ratio.group, ratio.stage), nothing)[number[ratio.run]] = ratio
    if not found:
        raise UsageValueError(f"no class with {words or 'any words'!r} at stage {', '.join(stages)}; classes are "
                              + one_line("; ".join(sorted(groups)), 400))
    ordered = sorted(found, key=lambda key: (_class_key(groups[key[0]]), stage_number(key[1]), key))
    return Trends(runs, _changes(runs), tuple(Trend(*key, tuple(found[key])) for key in ordered))


def _kind(run: PastRun) -> tuple[str, str, bool]:
    return run.implementation, run.tier, run.device_class == "cpu"


def _class_key(ratio: PastRatio) -> tuple[object, ...]:
    return axis_sort_key(ratio.dtype), ratio.tp, ratio.ep, ratio.pattern


def _changes(runs: Sequence[PastRun]) -> dict[int, tuple[str, ...]]:
    """What each run has of WATCHED that the one before had not; words that one of them lacks say nothing."""
    found = {}
    for number, (before, now) in enumerate(pairwise(runs), 1):
        pairs = [(name, getattr(before, name), getattr(now, name)) for name in WATCHED]
        words = tuple(f"{name} {one_line(old, 60)} -> {one_line(new, 60)}" for name, old, new in pairs
                      if old and new and old != new)
        if words:
            found[number] = words
    return found


def sparkline(trend: Trend, changes: Collection[int] = ()) -> str:
    """A block per run, as high as error / allowed, full above the bound; a stroke before runs where something changed.
    """
    parts = []
    for number, point in enumerate(trend.points):
        if point is None or point.worst is None:
            sign = _ABSENT if point is None else _ABOVE
        else:
            sign = _ABOVE if point.worst > 1 else _BLOCKS[min(len(_BLOCKS) - 1, int(point.worst * len(_BLOCKS)))]
        parts.append(_CHANGED * (number in changes) + sign)
    return "".join(parts)


def run_label(run: PastRun) -> str:
    """Date, version and commit of a run."""
    return one_line(f"{run.started[:10]} {run.version}" + (f"@{run.commit_name[:7]}" if run.commit_name else ""), 60)


def trend_table(found: Trends) -> NamedTable:
    """Now, the run before, the largest ever, and the sparkline of every class."""
    rows = []
    for trend in found.trends:
        *earlier, now = trend.points
        before = next((point for point in reversed(earlier) if point is not None), None)
        worst = [ratio.worst for ratio in trend.known if ratio.worst is not None]
        rows.append((one_line(trend.group, 60), one_line(trend.stage, 30) or "no stage", words_of(now),
                     words_of(before), format_ratio(max(worst)) if worst else "", str(now.cases if now else 0),
                     str(now.failures if now else 0), sparkline(trend, found.changes)))
    newest = found.runs[-1]
    title = (f"{one_line(newest.implementation, 60)}, tier {one_line(newest.tier, 40)}: worst error / allowed in "
             f"{len(found.runs)} runs, {run_label(found.runs[0])} to {run_label(newest)}")
    return NamedTable(title, ("class", "stage", "now", "before", "most", "cases", "failed", "trend"), rows)


def words_of(ratio: PastRatio | None) -> str:
    """A point in words."""
    if ratio is None:
        return "not run"
    return "failed" if ratio.worst is None else format_ratio(ratio.worst)


def change_lines(found: Trends) -> list[str]:
    """One line per stroke of the sparklines."""
    return [f"| before run {number + 1} ({run_label(found.runs[number])}): {', '.join(words)}"
            for number, words in found.changes.items()]


def trend_document(found: Trends, past: Past) -> dict[str, object]:
    """The same as plain JSON types."""
    runs = [{**msgspec.structs.asdict(run), "changed": list(found.changes.get(number, ())),
             "verdicts": past.verdicts.get(run.run, {})} for number, run in enumerate(found.runs)]
    trends = [{"class": trend.group, "stage": trend.stage,
               **{name: [None if point is None else _plain(getattr(point, name)) for point in trend.points]
                  for name in ("worst", "cases", "failures")}} for trend in found.trends]
    return {"runs": runs, "trends": trends}


def _plain(value: float | None) -> object:
    return "inf" if value == float("inf") else value
