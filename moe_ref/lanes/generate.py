"""Files of CI systems made from ci/lanes.yaml and the templates beside it; jinja2 is imported late."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_ref.lanes.schema import SELF_HOSTED, Lane, LanesFile

if TYPE_CHECKING:
    from jinja2 import Environment

SETUP_MINUTES = 15
"""For what a job does beside its lane: checkout, installing, uploading."""
WORKFLOWS = Path(".github/workflows")
PIPELINE = Path(".buildkite/pipeline.yml")
ACTIONLINT = Path(".github/actionlint.yaml")
ACTIONS = {
    "checkout": "actions/checkout@11bd71901bbe5b1630ceea73d27597364c9af683 # v4.2.2",
    "setup-python": "actions/setup-python@a26af69be951a213d495a4c3e4e4022e16d87065 # v5.6.0",
    "upload": "actions/upload-artifact@ea165f8d65b6e75b540449e92b4886f43607fa02 # v4.6.2",
    "download": "actions/download-artifact@d3f86a106a0bac45b974a628896c90dbdf5c8093 # v4.3.0",
    "script": "actions/github-script@60a0d83039c74a4aee543508d2ffcb1c3799cdea # v7.0.1",
}
"""Pinned by commit, since a tag can be moved."""


def generated(file: LanesFile, path: Path) -> dict[Path, str]:
    """Every generated file, by its place in the repository, as it should be."""
    environment = _environment(path.parent / "templates")
    names = list(dict.fromkeys(lane.workflow for lane in file.lanes.values()))
    made = {}
    for name in names:
        lanes = {one: lane for one, lane in file.lanes.items() if lane.workflow == name}
        triggers = {trigger for lane in lanes.values() for trigger in lane.triggers}
        made[WORKFLOWS / f"{name}.yml"] = environment.get_template("workflow.yml.j2").render(
            workflow=name, lanes=lanes, triggers=triggers, file=file, own=name == "gpu")
    commented = [name for name in names if any(lane.workflow == name and {"pull_request", "label"} & set(lane.triggers)
                                               for lane in file.lanes.values())]
    made[WORKFLOWS / "comment.yml"] = environment.get_template("comment.yml.j2").render(workflows=commented)
    # actionlint takes a label that it does not know for a mistake.
    labels = sorted({label for lane in file.lanes.values() if SELF_HOSTED in lane.runners for label in lane.runners})
    made[ACTIONLINT] = (f"# Made from ci/lanes.yaml by `moe-ref lanes write`.\n"
                        f"self-hosted-runner: {{labels: {json.dumps(labels)}}}\n")
    made[PIPELINE] = environment.get_template("pipeline.yml.j2").render(lanes=file.lanes, file=file)
    return made


def stale(files: dict[Path, str]) -> list[str]:
    """A sentence for every file that is missing or is not as it should be."""
    faults = []
    for path, text in files.items():
        if not path.exists():
            faults.append(f"{path} is missing")
        elif path.read_text(encoding="utf-8") != text:
            faults.append(f"{path} is not what the lanes and its template give")
    return faults


def _environment(folder: Path) -> "Environment":
    """Braces are GitHub's own, so templates have << >> and <% %>; an unknown name is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(folder), undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True, keep_trailing_newline=True, variable_start_string="<<",
                              variable_end_string=">>", block_start_string="<%", block_end_string="%>",
                              comment_start_string="<#", comment_end_string="#>")
    # A YAML scalar or flow sequence: JSON is both.
    environment.filters["yaml"] = lambda value: json.dumps(value, ensure_ascii=False)
    words: dict[str, Any] = {"actions": ACTIONS, "setup_minutes": SETUP_MINUTES, "buildkite_if": _buildkite_if,
                             "queue": _queue}
    environment.globals.update(words)
    return environment


def _buildkite_if(lane: Lane, label: str) -> str:
    """When a step runs, in Buildkite's words; a change from a fork only where the lane trusts forks."""
    pull = "build.pull_request.id != null"
    labelled = f'{pull} && build.pull_request.labels includes "{label}"'
    said = {"push": 'build.pull_request.id == null && build.source != "schedule" '
                    "&& build.merge_queue.base_branch == null",
            "pull_request": pull, "label": labelled, "merge_queue": "build.merge_queue.base_branch != null",
            "nightly": 'build.source == "schedule" && build.env("MOE_EVENT") == "nightly"',
            "weekly": 'build.source == "schedule" && build.env("MOE_EVENT") == "weekly"'}
    started = " || ".join(f"({said[trigger]})" for trigger in lane.triggers)
    return started if lane.forks else f"({started}) && build.pull_request.repository.fork != true"


def _queue(lane: Lane) -> dict[str, str]:
    """Tags of the agents that may take the step."""
    if SELF_HOSTED not in lane.runners:
        return {"queue": "cpu"}
    return {"queue": "gpu", "gpus": str(lane.device.gpus)} | (
        {} if lane.device.architecture == "any" else {"architecture": lane.device.architecture})
