"""Options that say what happened and which lanes that starts, for `lanes select` and `report --lanes`."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moe_ref.contract.errors import UsageValueError

if TYPE_CHECKING:
    from moe_ref.lanes.schema import LanesFile
    from moe_ref.lanes.select import Happening
    from moe_ref.report.lanes import LaneRow

EVENTS = ("push", "pull_request", "label", "merge_queue", "nightly", "weekly", "manual")
_EVENT_OPTIONS = [
    click.option("--event", "events", multiple=True, type=click.Choice([*EVENTS, "ci"]),
                 help="What happened, may be given several times; ci: what GitHub Actions or Buildkite says."),
    click.option("--workflow", default=None, help="Only the lanes of this generated workflow."),
    click.option("--changed", multiple=True, help="A file that the change touches; may be given several times."),
    click.option("--changed-since", default=None, metavar="COMMIT", help="All files that differ since COMMIT."),
    click.option("--fork", is_flag=True, help="The change comes from a fork."),
]
_LANES = click.option("--lanes", "lanes_path", type=click.Path(path_type=Path, dir_okay=False), default=None,
                      help="File of lanes, as ci/lanes.yaml: those that --event starts must have left a record in RUN.")


def event_options(command: Callable) -> Callable:
    """Options that say what happened: see `happening_of`."""
    for option in reversed(_EVENT_OPTIONS):
        command = option(command)
    return command


def lane_options(command: Callable) -> Callable:
    """Options of a report that answers for lanes: see `chosen_lanes`."""
    return _LANES(event_options(command))


def happening_of(file: "LanesFile", words: dict[str, Any]) -> "Happening":
    """What the options say; raises UsageValueError where they contradict each other, or no event is given."""
    from moe_ref.lanes.happening import changed_files, ci_happening
    from moe_ref.lanes.schema import Event
    from moe_ref.lanes.select import Happening

    events, changed, since = words["events"], words["changed"], words["changed_since"]
    if not events:
        raise UsageValueError(f"no --event; give one of {', '.join(EVENTS)}, or ci")
    if "ci" in events:
        if len(events) > 1 or changed or since or words["fork"]:
            raise UsageValueError("--event ci with --changed, --changed-since, --fork or another --event, but the CI "
                                  "system says all of that")
        return ci_happening(file, os.environ)
    named = (*changed, *(changed_files(since) if since else ()))
    return Happening(tuple(map(Event, events)), words["fork"], named if changed or since else None)


def chosen_lanes(words: dict[str, Any], folders: Sequence[Path]) -> tuple["LaneRow", ...]:
    """What became of every lane, by the records in the folders; none without --lanes.

    Raises UsageValueError where options of events are given without --lanes.
    """
    path = words["lanes_path"]
    if path is None:
        if given := [name for name, value in words.items() if value]:
            raise UsageValueError(f"{', '.join(given)} without --lanes, which says what an event starts")
        return ()
    from moe_ref.lanes.load import load_lanes
    from moe_ref.lanes.select import select
    from moe_ref.report.lanes import lane_rows

    file = load_lanes(path)
    return lane_rows(select(file, happening_of(file, words), words["workflow"]), folders)
