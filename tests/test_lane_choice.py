"""Protects the choice of lanes: what happened decides which run, and a lane that is left out says why."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from moe_ref.contract.errors import UsageValueError
from moe_ref.lanes import happening as happening_module
from moe_ref.lanes.happening import buildkite_happening, changed_files, ci_happening, github_happening
from moe_ref.lanes.load import LANES
from moe_ref.lanes.schema import Event, LanesFile
from moe_ref.lanes.select import Happening, matches, select
from tests.command_line import command


@pytest.mark.parametrize(("happening", "runs", "reason"), [
    (Happening((Event.PUSH,)), ["cpu"], "runs on label, nightly, and this is push"),
    (Happening((Event.PULL_REQUEST,), fork=True), ["cpu"], "runs on label"),
    (Happening((Event.PULL_REQUEST, Event.LABEL)), ["cpu", "gpu1"], ""),
    (Happening((Event.PULL_REQUEST, Event.LABEL), fork=True), ["cpu"], "comes from a fork"),
    (Happening((Event.PULL_REQUEST, Event.LABEL), changed=("docs/ci.md",)), ["cpu"],
     "none of the 1 changed files is of moe_fast/**, tolerances.yaml"),
    (Happening((Event.PULL_REQUEST, Event.LABEL), changed=("a.md", "moe_fast/kernels/x.py")), ["cpu", "gpu1"], ""),
    (Happening((Event.NIGHTLY,), changed=("docs/ci.md",)), ["gpu1"], ""),
    (Happening((Event.MANUAL,)), ["cpu", "gpu1"], ""),
    (Happening((Event.MANUAL,), fork=True), ["cpu"], "comes from a fork"),
])
def test_a_lane_runs_on_its_events_or_says_why_not(two_lanes: LanesFile, happening: Happening, runs: list[str],
                                                   reason: str) -> None:
    """Paths leave a lane out on a pull request alone: at night everything runs."""
    choices = select(two_lanes, happening)
    assert [one.name for one in choices if one.runs] == runs
    if reason:
        assert reason in " ".join(one.reason for one in choices)


def test_lanes_of_one_workflow(two_lanes: LanesFile) -> None:
    assert [one.name for one in select(two_lanes, Happening((Event.PUSH,)), "cpu")] == ["cpu"]
    with pytest.raises(UsageValueError, match="workflow 'nightly', but should be one of cpu, gpu"):
        select(two_lanes, Happening((Event.PUSH,)), "nightly")


@pytest.mark.parametrize(("path", "glob", "is_match"), [
    ("moe_fast/kernels/a.py", "moe_fast/**", True), ("moe_fast.py", "moe_fast/**", False),
    ("moe_ref/cli/compile_commands.py", "moe_ref/cli/compile*", True), ("a/b/c.py", "a/*.py", False),
    ("a/c.py", "a/*.py", True), ("a/b/c.py", "a/**/c.py", True), ("a/c.py", "a/**/c.py", True),
    ("axb", "a.b", False), ("a\nb", "a?b", True),
])
def test_globs(path: str, glob: str, is_match: bool) -> None:
    """`*` stays in a folder, `**` does not, other signs are themselves."""
    assert matches(path, [glob]) is is_match


def pull_request(head: str | None, *labels: str) -> dict[str, Any]:
    repository = {"full_name": head} if head else None
    return {"repository": {"full_name": "our/moe"},
            "pull_request": {"head": {"repo": repository}, "labels": [{"name": label} for label in labels]}}


@pytest.mark.parametrize(("name", "payload", "events", "fork"), [
    ("push", {}, ["push"], False), ("merge_group", {}, ["merge_queue"], False),
    ("workflow_dispatch", {}, ["manual"], False), ("schedule", {"schedule": "43 4 * * 0"}, ["weekly"], False),
    ("pull_request", pull_request("our/moe"), ["pull_request"], False),
    ("pull_request", pull_request("our/moe", "docs", "gpu"), ["pull_request", "label"], False),
    ("pull_request", pull_request("stranger/moe", "gpu"), ["pull_request", "label"], True),
    # The repository of the head was deleted.
    ("pull_request", pull_request(None), ["pull_request"], True),
])
def test_events_of_github(two_lanes: LanesFile, monkeypatch: pytest.MonkeyPatch, name: str, payload: dict[str, Any],
                          events: list[str], fork: bool) -> None:
    monkeypatch.setattr(happening_module, "changed_files", lambda since: (since,))
    found = github_happening(two_lanes, name, payload)
    assert (list(found.events), found.fork) == (events, fork)
    assert found.changed == (("HEAD^1",) if name == "pull_request" else None)


def test_events_that_nobody_knows_are_refused(two_lanes: LanesFile) -> None:
    """A guess would leave lanes out."""
    with pytest.raises(UsageValueError, match="schedule '0 0 1 1 \\*', but should be one of 17 2"):
        github_happening(two_lanes, "schedule", {"schedule": "0 0 1 1 *"})
    with pytest.raises(UsageValueError, match="GitHub event 'issue_comment'"):
        github_happening(two_lanes, "issue_comment", {})
    with pytest.raises(UsageValueError, match="MOE_EVENT='', but should be nightly or weekly"):
        buildkite_happening(two_lanes, {"BUILDKITE_SOURCE": "schedule"})
    with pytest.raises(UsageValueError, match="neither GITHUB_ACTIONS nor BUILDKITE"):
        ci_happening(two_lanes, {})


@pytest.mark.parametrize(("environment", "events", "fork"), [
    ({"BUILDKITE_PULL_REQUEST": "false"}, ["push"], False),
    ({"BUILDKITE_SOURCE": "schedule", "MOE_EVENT": "nightly"}, ["nightly"], False),
    ({"BUILDKITE_MERGE_QUEUE_BASE_BRANCH": "main"}, ["merge_queue"], False),
    ({"BUILDKITE_PULL_REQUEST": "7", "BUILDKITE_PULL_REQUEST_REPO": "git@g:our/moe", "BUILDKITE_REPO": "git@g:our/moe",
      "BUILDKITE_PULL_REQUEST_LABELS": "docs,gpu"}, ["pull_request", "label"], False),
    ({"BUILDKITE_PULL_REQUEST": "7", "BUILDKITE_PULL_REQUEST_REPO": "git@g:other/moe",
      "BUILDKITE_REPO": "git@g:our/moe"}, ["pull_request"], True),
])
def test_events_of_buildkite(two_lanes: LanesFile, environment: dict[str, str], events: list[str], fork: bool) -> None:
    found = ci_happening(two_lanes, {"BUILDKITE": "true", **environment})
    assert (list(found.events), found.fork) == (events, fork)


def test_changed_files_are_asked_of_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names with blanks stay whole, and a file that moved is named by both places."""
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "old.py").write_text("text\n" * 20)
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "1"], ["mv", "old.py", "a new.py"],
                  ["commit", "-qm", "2"]):
        subprocess.run([*git, *words], check=True)
    assert set(changed_files("HEAD^1")) == {"old.py", "a new.py"}
    with pytest.raises(UsageValueError, match="git diff nothing HEAD"):
        changed_files("nothing")


def test_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    """What CI systems read: one line of JSON, in the order of the file."""
    assert command("lanes", "list") == 0
    assert "gpuN            8 GPU " in capsys.readouterr().out
    assert command("lanes", "select", "--event", "label", "--workflow", "gpu", "--changed", "a.md", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["lanes"] == []
    assert document["left_out"]["gpu1"].startswith("none of the 1 changed files")
    assert command("lanes", "select", "--event", "label", "--workflow", "gpu", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["matrix"]["include"][0]["lane"] == "gpu1"
    assert command("lanes", "run", "gpu9", "--record", "runs/none") == 2
    assert f"lane 'gpu9', but {LANES} has cpu, interpreter" in capsys.readouterr().err
