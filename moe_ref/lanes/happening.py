"""What happened, as a CI system tells it: GitHub Actions by its event file, Buildkite by its environment."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_ref.contract.errors import UsageValueError
from moe_ref.lanes.schema import Event, LanesFile
from moe_ref.lanes.select import Happening

_OF_GITHUB = {"push": Event.PUSH, "merge_group": Event.MERGE_QUEUE, "workflow_dispatch": Event.MANUAL}


def ci_happening(file: LanesFile, environment: Mapping[str, str]) -> Happening:
    """Of the CI system that this process runs under; raises UsageValueError where it is none that is known here."""
    if environment.get("GITHUB_ACTIONS") == "true":
        path = environment.get("GITHUB_EVENT_PATH", "")
        try:
            payload = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageValueError(f"GITHUB_EVENT_PATH {path!r}: {error}") from error
        return github_happening(file, environment.get("GITHUB_EVENT_NAME", ""), payload)
    if environment.get("BUILDKITE") == "true":
        return buildkite_happening(file, environment)
    raise UsageValueError("event ci, but neither GITHUB_ACTIONS nor BUILDKITE is true here; name the event instead")


def github_happening(file: LanesFile, name: str, payload: dict[str, Any]) -> Happening:
    """Of a GitHub event and its payload; what a pull request changes is the merge commit against its first parent."""
    if name in _OF_GITHUB:
        return Happening((_OF_GITHUB[name],))
    if name == "schedule":
        return Happening((_scheduled(file, payload.get("schedule", "")),))
    if name != "pull_request":
        raise UsageValueError(f"GitHub event {name!r}, but should be one of "
                              f"{', '.join((*_OF_GITHUB, 'schedule', 'pull_request'))}")
    pull = payload["pull_request"]
    # A head whose repository was deleted has none.
    head = (pull["head"].get("repo") or {}).get("full_name")
    labelled = file.label in [label["name"] for label in pull.get("labels", [])]
    return Happening((Event.PULL_REQUEST, Event.LABEL) if labelled else (Event.PULL_REQUEST,),
                     fork=head != payload["repository"]["full_name"], changed=changed_files("HEAD^1"))


def buildkite_happening(file: LanesFile, environment: Mapping[str, str]) -> Happening:
    """Of a Buildkite build; its schedules say which they are in MOE_EVENT."""
    if environment.get("BUILDKITE_SOURCE") == "schedule":
        event = environment.get("MOE_EVENT", "")
        if event not in (Event.NIGHTLY, Event.WEEKLY):
            raise UsageValueError(f"a scheduled build with MOE_EVENT={event!r}, but should be nightly or weekly")
        return Happening((Event(event),))
    if environment.get("BUILDKITE_MERGE_QUEUE_BASE_BRANCH"):
        return Happening((Event.MERGE_QUEUE,))
    if environment.get("BUILDKITE_PULL_REQUEST", "false") == "false":
        return Happening((Event.PUSH,))
    labelled = file.label in environment.get("BUILDKITE_PULL_REQUEST_LABELS", "").split(",")
    return Happening((Event.PULL_REQUEST, Event.LABEL) if labelled else (Event.PULL_REQUEST,),
                     fork=environment.get("BUILDKITE_PULL_REQUEST_REPO") != environment.get("BUILDKITE_REPO"))


def _scheduled(file: LanesFile, cron: str) -> Event:
    by_cron = {file.schedules.nightly: Event.NIGHTLY, file.schedules.weekly: Event.WEEKLY}
    if cron not in by_cron:
        raise UsageValueError(f"schedule {cron!r}, but should be one of {', '.join(by_cron)}")
    return by_cron[cron]


def changed_files(since: str) -> tuple[str, ...]:
    """Names of files that differ between a commit and HEAD; raises UsageValueError where git cannot say."""
    # Without --no-renames a file that left the globs would be named by its new place alone.
    done = subprocess.run(["git", "diff", "--name-only", "--no-renames", "-z", since, "HEAD", "--"],
                          capture_output=True, check=False)
    if done.returncode:
        raise UsageValueError(f"git diff {since} HEAD: {done.stderr.decode(errors='replace').strip()}")
    return tuple(name.decode(errors="surrogateescape") for name in done.stdout.split(b"\0") if name)
