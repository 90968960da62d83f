"""Failures by the stage in which they start, so that one defect is one group however many cases it breaks."""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from moe_ref.records.schema import CaseLine
from moe_ref.report.axes import size_of
from moe_ref.report.facts import is_executed, is_red, stage_number
from moe_ref.report.separation import Axes, Separation

_NUMBER = re.compile(r"\b\d+\b")


@dataclass(frozen=True)
class FailureGroup:
    """name: a stage, or the verdict where no stage failed. lines: new failures first, then the smallest case first.

    num_ran: cases of the run that really ran. num_new: of the lines, 0 without a baseline. faults: (what explains a
    case, number of cases), most frequent first; not every case has one. besides: what most of them say beside their
    stage, sizes left out, as a missing collective, and how many do; ("", 0) where none does. separations: what tells
    these cases from the others that ran.
    """

    name: str
    is_stage: bool
    lines: tuple[CaseLine, ...]
    num_ran: int
    num_new: int
    faults: tuple[tuple[str, int], ...]
    besides: tuple[str, int]
    separations: tuple[Separation, ...]


def failure_groups(lines: Sequence[CaseLine], new: Collection[str] = ()) -> tuple[FailureGroup, ...]:
    """All red lines: groups with new failures first, then the largest, as the head line names it."""
    members: dict[tuple[str, bool], list[CaseLine]] = {}
    for line in lines:
        if is_red(line):
            members.setdefault((line.first_stage or line.verdict, bool(line.first_stage)), []).append(line)
    if not members:
        return ()
    axes = Axes(line.case for line in lines if is_executed(line))
    groups = [_group(name, is_stage, found, new, axes) for (name, is_stage), found in members.items()]
    return tuple(sorted(groups, key=lambda group: (not group.num_new, -len(group.lines), stage_number(group.name))))


def _group(name: str, is_stage: bool, lines: list[CaseLine], new: Collection[str], axes: Axes) -> FailureGroup:
    ordered = tuple(sorted(lines, key=lambda line: (line.case not in new, size_of(line.case), line.case)))
    faults = Counter(line.diagnosis.fault for line in lines if line.diagnosis)
    said = Counter(_NUMBER.sub("#", words) for line in lines if (words := line.reason.partition("\n")[2]))
    return FailureGroup(name, is_stage, ordered, axes.num_ran, sum(line.case in new for line in lines),
                        tuple(sorted(faults.items(), key=lambda item: (-item[1], item[0]))),
                        said.most_common(1)[0] if said else ("", 0),
                        tuple(axes.separating([line.case for line in lines])))
