"""Which lanes an event runs, and why the others are left out."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from moe_ref.contract.errors import UsageValueError
from moe_ref.lanes.schema import CHANGES, Event, Lane, LanesFile


@dataclass(frozen=True)
class Happening:
    """What happened: an event may be several, as a pull request that has the label is.

    fork: whether the change comes from somebody else's repository. changed: the files that it touches, None where that
    is not known.
    """

    events: tuple[Event, ...]
    fork: bool = False
    changed: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Choice:
    """A lane that runs, or `reason` why it does not."""

    name: str
    lane: Lane
    reason: str = ""

    @property
    def runs(self) -> bool:
        return not self.reason


def select(file: LanesFile, happening: Happening, workflow: str | None = None) -> tuple[Choice, ...]:
    """Every lane of the workflow (all of them with None), in the order of the file.

    Raises UsageValueError where no lane is of that workflow.
    """
    lanes = {name: lane for name, lane in file.lanes.items() if workflow in (None, lane.workflow)}
    if not lanes:
        known = ", ".join(dict.fromkeys(lane.workflow for lane in file.lanes.values()))
        raise UsageValueError(f"workflow {workflow!r}, but should be one of {known}")
    return tuple(Choice(name, lane, _left_out(lane, happening)) for name, lane in lanes.items())


def _left_out(lane: Lane, happening: Happening) -> str:
    """Why the lane does not run; "" where it does."""
    started = [event for event in happening.events if event in lane.triggers or event is Event.MANUAL]
    if not started:
        return f"runs on {', '.join(lane.triggers)}, and this is {', '.join(happening.events)}"
    if happening.fork and not lane.forks:
        return "the change comes from a fork, which this lane does not trust"
    if lane.paths and happening.changed is not None and all(event in CHANGES for event in started):
        if not any(matches(file, lane.paths) for file in happening.changed):
            return f"none of the {len(happening.changed)} changed files is of {', '.join(lane.paths)}"
    return ""


def matches(file: str, globs: Sequence[str]) -> bool:
    """Whether a path is of one of the globs: `*` stays in a folder, `**` does not."""
    return any(re.fullmatch(_pattern(glob), file, re.DOTALL) for glob in globs)


def _pattern(glob: str) -> str:
    words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(words.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*\*|\*|\?)", glob))
