"""What ci/lanes.yaml holds, as frozen structures."""

import re
from enum import StrEnum
from typing import Annotated, Literal

import msgspec

from moe_ref.tolerances.base import Struct, Text


class Event(StrEnum):
    """What starts lanes; `label`: the label of the file on a pull request; `manual` starts all of a workflow."""

    PUSH = "push"
    PULL_REQUEST = "pull_request"
    LABEL = "label"
    MERGE_QUEUE = "merge_queue"
    NIGHTLY = "nightly"
    WEEKLY = "weekly"
    MANUAL = "manual"


Trigger = Literal["push", "pull_request", "label", "merge_queue", "nightly", "weekly"]
Workflow = Literal["cpu", "gpu", "nightly"]
"""Which generated workflow a lane is a job of."""
Counted = Literal["tests", "cases", "combinations", "layers", "mutants", "curves"]
"""What a lane executes; moe_ref/lanes/count.py reads how many from the lane's folder."""
Line = Annotated[str, msgspec.Meta(pattern=r"^[^\s][^\r\n]*\Z")]
"""Text that stands in a comment of a generated file, or is split into words."""
SELF_HOSTED = "self-hosted"
CHANGES = (Event.PULL_REQUEST, Event.LABEL)
"""Events in which `paths` leave a lane out: only there it is known what a change touches."""


class Counts(Struct, frozen=True):
    """What is counted, and the fewest that must execute."""

    what: Counted
    minimum: Annotated[int, msgspec.Meta(ge=1, le=1 << 30)]


class Device(Struct, frozen=True):
    """What must be there: that many GPUs of that architecture ("any" of them), and programs on the search path."""

    gpus: Annotated[int, msgspec.Meta(ge=0, le=1024)]
    architecture: Annotated[str, msgspec.Meta(pattern=r"^(any|sm_\d{2,3}|gfx[0-9a-f]{3,4})\Z")]
    programs: tuple[Text, ...]


class Lane(Struct, frozen=True):
    """One lane.

    command: split into words as a shell would, but no shell runs; `moe-ref` and {python} are those of this interpreter,
    {record} is the lane's folder, {minimum} the number of counts. minutes: after them the command is ended. paths:
    globs (`**` also over folders), none: any change. runners: labels that a runner must have. forks: whether a change
    from a fork may run it. baseline: folder that a lane of cases is compared with, "" where it is not.
    """

    purpose: Line
    command: Line
    counts: Counts
    device: Device
    minutes: Annotated[int, msgspec.Meta(ge=1, le=1440)]
    workflow: Workflow
    triggers: tuple[Trigger, ...]
    paths: tuple[Text, ...]
    runners: Annotated[tuple[Text, ...], msgspec.Meta(min_length=1)]
    forks: bool
    baseline: str
    keep_days: Annotated[int, msgspec.Meta(ge=1, le=90)]


class Schedules(Struct, frozen=True):
    """Cron lines of the timed triggers; they must differ, since a run knows only its line."""

    nightly: Text
    weekly: Text


class LanesFile(Struct, frozen=True):
    """The whole file; schema 1. label: on a pull request, a maintainer's word that its lanes may start."""

    schema: Literal[1]
    label: Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9-]*\Z")]
    schedules: Schedules
    lanes: dict[str, Lane]

    def faults(self) -> list[str]:
        """What each key allows by itself, but not together."""
        same = self.schedules.nightly == self.schedules.weekly
        faults = [f"schedules: nightly and weekly are both {self.schedules.nightly!r}, but should differ"] * same
        faults += ["lanes: 0 of them, but should be at least 1"] * (not self.lanes)
        return faults + [f"lanes.{name}: {fault}" for name, lane in self.lanes.items()
                         for fault in _lane_faults(name, lane)]


def _lane_faults(name: str, lane: Lane) -> list[str]:
    faults = []
    if not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9]*(-[a-zA-Z0-9]+)*", name, re.ASCII):
        faults.append("a name should be letters and digits with hyphens between: it names jobs and folders")
    if not lane.triggers:
        faults.append("no trigger, so it would never run")
    own = SELF_HOSTED in lane.runners
    if lane.forks and (own or lane.device.gpus):
        faults.append("trusts forks, but runs on a machine of one's own: a stranger's change would run there")
    untrusted = [trigger for trigger in lane.triggers if trigger in ("push", "pull_request")]
    if untrusted and (own or lane.device.gpus):
        faults.append(f"triggers {', '.join(untrusted)} on a machine of one's own, but should be started by a label, "
                      "the merge queue or the clock")
    if (lane.workflow == "gpu") != own:
        faults.append(f"workflow {lane.workflow} on runners {', '.join(lane.runners)}, but workflow gpu and "
                      f"{SELF_HOSTED} should go together")
    if "{record}" not in lane.command:
        faults.append("command without {record}, but what it executed is counted there")
    return faults
