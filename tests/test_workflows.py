"""Protects CI systems: generated files are those of the lanes; no stranger's change reaches secret or machine."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from importlib.machinery import SourceFileLoader
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ruamel.yaml import YAML

from moe_ref.lanes.generate import PIPELINE, SETUP_MINUTES, WORKFLOWS, generated, stale
from moe_ref.lanes.load import LANES, load_lanes
from moe_ref.lanes.schema import SELF_HOSTED, Event
from moe_ref.lanes.select import Happening, select
from tests.command_line import command

ROOT = Path(__file__).resolve().parents[1]
FILE = load_lanes(ROOT / LANES)
NAMES = ("cpu", "gpu", "nightly")
PINNED = re.compile(r"[\w-]+/[\w-]+@[0-9a-f]{40}")
UNTRUSTED = re.compile(r"\$\{\{")
SAME_REPOSITORY = "github.event.pull_request.head.repo.full_name == github.repository"
LABELLED = f"contains(github.event.pull_request.labels.*.name, '{FILE.label}')"


def read(path: Path) -> dict[str, Any]:
    """YAML 1.2, in which `on` is a word."""
    return YAML(typ="safe", pure=True).load((ROOT / path).read_text())


def workflow(name: str) -> dict[str, Any]:
    return read(WORKFLOWS / f"{name}.yml")


def step_faults(steps: list[dict[str, Any]]) -> list[str]:
    """What a step may not do, whatever the job: run text from outside, run what can be moved, keep credentials."""
    faults = [f"${{{{ in a script: {step['run']}" for step in steps if UNTRUSTED.search(step.get("run", ""))]
    for step in steps:
        if uses := step.get("uses"):
            faults += [f"{uses} is not pinned"] * (not PINNED.fullmatch(uses))
            of_action = UNTRUSTED.search(step.get("with", {}).get("script", ""))
            faults += [f"${{{{ in the script of {uses}"] * bool(of_action)
            if uses.startswith("actions/checkout") and step.get("with", {}).get("persist-credentials") is not False:
                faults.append("credentials are kept")
    return faults


def job_faults(job: dict[str, Any]) -> list[str]:
    """What makes a job of a pull request unsafe, or lets it hide what it found."""
    faults = step_faults(job["steps"])
    faults += [] if 0 < job.get("timeout-minutes", 0) <= 200 else ["no limit in minutes"]
    faults += [] if job.get("permissions") == {"contents": "read"} else ["may do more than read"]
    uploads = [step for step in job["steps"] if "upload-artifact" in step.get("uses", "")]
    faults += ["an artefact of a failing job is not uploaded"] * any(one.get("if") != "always()" for one in uploads)
    if SELF_HOSTED in job["runs-on"]:
        condition = job.get("if", "")
        guard = f"(github.event_name != 'pull_request' || ({SAME_REPOSITORY} && {LABELLED}))"
        faults += [] if condition.endswith(f" && {guard}") else ["a stranger's change reaches a machine of one's own"]
        faults += [] if "ephemeral" in job["runs-on"] else ["the machine outlives the job"]
    return faults


def workflow_faults(document: dict[str, Any]) -> list[str]:
    text = json.dumps(document)
    faults = [f"{word} in it" for word in ("secrets", "pull_request_target", "write-all") if word in text]
    faults += [] if document.get("permissions") == {"contents": "read"} else ["its token may do more than read"]
    faults += [] if document.get("concurrency", {}).get("cancel-in-progress") is True else ["older runs go on"]
    return faults + [f"{name}: {fault}" for name, job in document["jobs"].items() for fault in job_faults(job)]


def test_generated_files_are_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    """What is edited by hand, or not written anew, is named."""
    files = generated(FILE, ROOT / LANES)
    monkeypatch.chdir(ROOT)
    assert stale(files) == []
    monkeypatch.chdir(tmp_path)
    lanes = ("--lanes", str(ROOT / LANES))
    assert command("lanes", "check", *lanes) == 1
    assert ".buildkite/pipeline.yml is missing; `moe-ref lanes write` makes it" in capsys.readouterr().out
    assert command("lanes", "write", *lanes) == 0
    assert command("lanes", "check", *lanes) == 0
    (tmp_path / PIPELINE).write_text("steps: []\n")
    assert command("lanes", "check", *lanes) == 1
    assert "pipeline.yml is not what the lanes" in capsys.readouterr().out


def test_no_other_workflow_stands_beside_them() -> None:
    """One that is written by hand would not be held to what follows."""
    assert {path.name for path in (ROOT / WORKFLOWS).iterdir()} == {f"{name}.yml" for name in (*NAMES, "comment")}


@pytest.mark.parametrize("name", NAMES)
def test_workflows_are_safe(name: str) -> None:
    assert workflow_faults(workflow(name)) == []


def _job(document: dict[str, Any]) -> dict[str, Any]:
    return document["jobs"]["gpu1"]


@pytest.mark.parametrize(("change", "fault"), [
    (lambda one: _job(one).pop("timeout-minutes"), "gpu1: no limit in minutes"),
    (lambda one: _job(one)["permissions"].update({"pull-requests": "write"}), "gpu1: may do more than read"),
    (lambda one: _job(one).update({"if": "true"}), "gpu1: a stranger's change reaches a machine of one's own"),
    (lambda one: _job(one).update({"if": f"true || ({LABELLED})"}), "gpu1: a stranger's change reaches"),
    (lambda one: _job(one)["runs-on"].remove("ephemeral"), "gpu1: the machine outlives the job"),
    (lambda one: _job(one)["steps"][0].update({"uses": "actions/checkout@v4"}), "actions/checkout@v4 is not pinned"),
    (lambda one: _job(one)["steps"][0].pop("with"), "gpu1: credentials are kept"),
    (lambda one: _job(one)["steps"][1].update({"run": "echo ${{ github.head_ref }}"}), "in a script"),
    (lambda one: _job(one)["steps"][-1].pop("if"), "an artefact of a failing job is not uploaded"),
    (lambda one: _job(one).update({"env": {"KEY": "${{ secrets.KEY }}"}}), "secrets in it"),
    (lambda one: one["on"].update({"pull_request_target": {}}), "pull_request_target in it"),
    (lambda one: one.pop("permissions"), "its token may do more than read"),
    (lambda one: one.pop("concurrency"), "older runs go on"),
])
def test_an_unsafe_workflow_is_seen(change: Callable[[dict[str, Any]], object], fault: str) -> None:
    """The test above can fail: each property, taken away, is called by its name."""
    document = deepcopy(workflow("gpu"))
    change(document)
    assert fault in "; ".join(workflow_faults(document))


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_runs_its_lanes(name: str) -> None:
    """A job for each, on its runners, for its minutes, with its folder uploaded; the report waits for all of them."""
    jobs = workflow(name)["jobs"]
    lanes = {one: lane for one, lane in FILE.lanes.items() if lane.workflow == name}
    assert list(jobs) == ["select", *lanes, "report"]
    for one, lane in lanes.items():
        runners = list(lane.runners)
        assert jobs[one]["runs-on"] == (runners if len(runners) > 1 else runners[0])
        assert jobs[one]["timeout-minutes"] == lane.minutes + SETUP_MINUTES
        assert f"contains(fromJSON(needs.select.outputs.lanes), '{one}')" in jobs[one]["if"]
        assert [step["run"] for step in jobs[one]["steps"] if "run" in step] == [f"bash ci/lane {one} runs/{one}"]
        assert jobs[one]["steps"][-1]["with"]["path"] == f"runs/{one}"
    assert jobs["report"]["needs"] == ["select", *lanes]
    assert "!cancelled()" in jobs["report"]["if"]
    assert f"bash ci/report {name}" in [step.get("run") for step in jobs["report"]["steps"]]


@pytest.mark.parametrize(("name", "events"), [
    ("cpu", {"push", "pull_request", "merge_group", "workflow_dispatch"}),
    ("gpu", {"pull_request", "merge_group", "schedule", "workflow_dispatch"}),
    ("nightly", {"schedule", "workflow_dispatch"}),
])
def test_a_workflow_starts_on_the_events_of_its_lanes(name: str, events: set[str]) -> None:
    """A GPU never on a push; `labeled` where a label starts lanes, and only there."""
    started = workflow(name)["on"]
    assert started.keys() == events
    types = started.get("pull_request", {}).get("types", [])
    assert ("labeled" in types) == (name == "gpu")
    crons = [one["cron"] for one in started.get("schedule", [])]
    assert set(crons) <= {FILE.schedules.nightly, FILE.schedules.weekly}


def test_another_label_neither_starts_nor_ends_gpu_lanes() -> None:
    """A run in progress must not be cancelled because somebody puts `documentation` on its pull request."""
    document = workflow("gpu")
    other = f"github.event.action != 'labeled' || github.event.label.name == '{FILE.label}'"
    assert other in document["jobs"]["select"]["if"]
    assert other in document["concurrency"]["group"]


def test_the_comment_runs_no_code_of_a_pull_request() -> None:
    """It may write, so: no checkout, no script of the repository, no rights that it does not need."""
    document = workflow("comment")
    assert document["permissions"] == {}
    assert document["on"] == {"workflow_run": {"workflows": ["cpu", "gpu"], "types": ["completed"]}}
    [job] = document["jobs"].values()
    assert job["permissions"] == {"actions": "read", "pull-requests": "write"}
    assert job["if"] == "github.event.workflow_run.event == 'pull_request'"
    assert job["timeout-minutes"] <= 10
    assert step_faults(job["steps"]) == []
    assert [step["uses"].partition("@")[0] for step in job["steps"]] == ["actions/download-artifact",
                                                                        "actions/github-script"]
    assert not any("run" in step for step in job["steps"])


# The objects that actions/github-script hands to a script, as far as this one uses them; each call is written down.
MOCKS = """
const calls = [];
const given = JSON.parse(process.env.GIVEN);
const core = { notice: (text) => calls.push(['notice', text]), setFailed: (text) => calls.push(['failed', text]) };
const context = { repo: { owner: 'our', repo: 'moe' }, payload: { workflow_run: given.run } };
const note = (name, answer) => async (options) => { calls.push([name, options]); return answer; };
const github = {
  paginate: async (method, options) => { calls.push(['comments', options]); return given.comments; },
  rest: { pulls: { list: note('pulls', { data: given.pulls }) },
          issues: { listComments: null, createComment: note('create'), updateComment: note('update') } } };
(async () => { SCRIPT
})().then(() => console.log(JSON.stringify(calls)));
"""
RUN = {"id": 5, "workflow_id": 9, "name": "cpu", "conclusion": "failure", "html_url": "https://x/5", "head_sha": "abc",
       "head_branch": "b", "head_repository": {"owner": {"login": "stranger"}}}
PULL = {"number": 7, "head": {"sha": "abc"}}
MARK = "<!-- moe-ref report of workflow 9 -->"
BOT = {"login": "github-actions[bot]"}


def commented(tmp_path: Path, summary: str | None, **changes: Any) -> dict[str, Any]:
    """What the script of the workflow does with a summary: the calls that it makes, by name."""
    [job] = workflow("comment")["jobs"].values()
    (tmp_path / "script.js").write_text(MOCKS.replace("SCRIPT", job["steps"][-1]["with"]["script"]))
    if summary is not None:
        (tmp_path / "summary.md").write_text(summary)
    given = {"run": RUN, "pulls": [PULL], "comments": []} | changes
    done = subprocess.run(["node", str(tmp_path / "script.js")], capture_output=True, text=True, check=True,
                          env=os.environ | {"FOLDER": str(tmp_path), "GIVEN": json.dumps(given)})
    return dict(json.loads(done.stdout))


needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="no node here, and the script is JavaScript")


@needs_node
def test_a_summary_is_posted_and_then_updated(tmp_path: Path) -> None:
    """On the open pull request whose head was run; nobody is called by a name in a record."""
    calls = commented(tmp_path, "FAIL  by @maintainers and a@b\n")
    assert calls["pulls"]["head"] == "stranger:b"
    assert calls["create"]["issue_number"] == 7
    assert calls["create"]["body"].startswith(f"{MARK}\n[cpu, failure](https://x/5) at abc\n\nFAIL")
    assert "@maintainers" not in calls["create"]["body"]
    earlier = [{"id": 1, "user": {"login": "somebody"}, "body": f"{MARK} forged"},
               {"id": 2, "user": BOT, "body": "other"}, {"id": 3, "user": BOT, "body": f"{MARK}\nold"}]
    calls = commented(tmp_path, "PASS\n", comments=earlier)
    assert calls["update"]["comment_id"] == 3
    assert "create" not in calls


@needs_node
def test_a_long_summary_is_cut_with_a_word(tmp_path: Path) -> None:
    """GitHub refuses more than 65,536 characters; a block that is cut open is closed."""
    calls = commented(tmp_path, "```text\n" + "line of some length\n" * 20_000)
    body = calls["create"]["body"]
    assert len(body) < 65_536
    assert body.endswith("\n```\n\nCut here; the whole summary is in the run.")


@needs_node
@pytest.mark.parametrize(("summary", "changes", "said"), [
    pytest.param(None, {}, "run 5 left no summary", id="no artefact"),
    pytest.param("x" * (1 << 20) + "x", {}, "summary.md has 1048577 bytes", id="too large"),
    pytest.param("PASS", {"pulls": [{"number": 8, "head": {"sha": "other"}}]}, "no open pull request has abc",
                 id="another commit"),
    pytest.param("PASS", {"run": RUN | {"head_repository": None}}, "no open pull request has abc",
                 id="the fork was deleted"),
])
def test_nothing_is_posted_where_it_is_not_clear_what_and_where(tmp_path: Path, summary: str | None,
                                                                changes: dict[str, Any], said: str) -> None:
    calls = commented(tmp_path, summary, **changes)
    assert said in calls.get("notice", calls.get("failed"))
    assert not {"create", "update"} & calls.keys()


def test_the_pipeline_of_buildkite_has_every_lane() -> None:
    """With its agents, minutes, artefacts and condition; nothing may fail softly."""
    *steps, wait, report = read(PIPELINE)["steps"]
    assert [step["key"] for step in steps] == list(FILE.lanes)
    assert wait == {"wait": None, "continue_on_failure": True}
    for step, lane in zip(steps, FILE.lanes.values(), strict=True):
        assert step["command"] == f"bash ci/lane {step['key']} runs/{step['key']}"
        assert step["timeout_in_minutes"] == lane.minutes + SETUP_MINUTES
        assert step["artifact_paths"] == f"runs/{step['key']}/**/*"
        assert step["agents"]["queue"] == ("gpu" if lane.device.gpus else "cpu")
        assert ("build.pull_request.repository.fork != true" in step["if"]) != lane.forks
        assert (f'labels includes "{FILE.label}"' in step["if"]) == ("label" in lane.triggers)
        assert ('build.env("MOE_EVENT") == "weekly"' in step["if"]) == ("weekly" in lane.triggers)
        assert step["soft_fail"] is False
    assert report["soft_fail"] is False
    assert "buildkite-agent annotate" in report["command"]
    assert 'exit "$$code"' in report["command"]


def test_the_scripts_run_lanes_that_exist() -> None:
    """.ci/run is what a push runs, in the order of the file; what stands beside a lane is in its command."""
    def started(script: str) -> dict[str, str]:
        lines = re.findall(r"^bash ci/(?:lane|verify) (\S+) +# (.*)$", (ROOT / script).read_text(), re.MULTILINE)
        return {"interpreter" if name == "quick" else name: words for name, words in lines}

    assert list(started(".ci/run")) == [one.name for one in select(FILE, Happening((Event.PUSH,))) if one.runs]
    for script in (".ci/run", "ci/long"):
        for name, words in started(script).items():
            assert words == "the lane `interpreter`" or all(word in FILE.lanes[name].command for word in words.split())


ACTION = read(Path("action.yml"))


def test_the_action_hands_inputs_over_as_values() -> None:
    """Text of an input in a script would be run: each is a variable of the environment, and each is used."""
    steps = ACTION["runs"]["steps"]
    assert step_faults(steps) == []
    assert all(step["shell"] == "bash" for step in steps if "run" in step)
    given = " ".join(str(value) for step in steps for key in ("env", "with") for value in step.get(key, {}).values())
    assert set(re.findall(r"inputs\.(\w+)", given)) == ACTION["inputs"].keys()


def test_the_action_runs_no_text_of_an_input(tmp_path: Path) -> None:
    """Names with signs of the shell, blanks and hyphens reach the command as they are."""
    stub = tmp_path / "python"
    stub.write_text(f"#!{sys.executable}\nimport json, sys\n"
                    "open('calls', 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n")
    stub.chmod(0o755)
    hostile = "--help; touch $(touch hurt) `touch hurt`"
    subprocess.run(["bash", str(ROOT / "ci" / "action")], cwd=tmp_path, check=True, env={
        "PATH": os.environ["PATH"], "MOE_PYTHON": str(stub), "MOE_IMPLEMENTATION": hostile,
        "MOE_TIER": "", "MOE_CASES": "v1-a v1-* ;", "MOE_TP": "1,2", "MOE_MINIMUM": "3 --json", "MOE_DEVICE": "cpu",
        "MOE_EXPECT": "an expectation.yaml"})
    assert {path.name for path in tmp_path.iterdir()} == {"python", "calls"}
    assert json.loads((tmp_path / "calls").read_text()) == [
        "-m", "moe_ref", "verify", "--record", "runs/moe-ref", "--device=cpu", "--tp=1,2", "--minimum=3 --json",
        "--expect=an expectation.yaml", "--case=v1-a", "--case=v1-*", "--case=;", "--", hostile]


def script(name: str) -> ModuleType:
    """A program of ci/ that has no suffix, as a module."""
    loader = SourceFileLoader(name, str(ROOT / "ci" / name))
    spec = spec_from_loader(name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_an_adopters_torch_stays() -> None:
    """What is installed beside it may neither need nor replace it."""
    installer = script("without_torch")
    assert not [one for one in installer.wanted() if re.match(r"(torch|triton)\b", one)]
    assert {"msgspec>=0.19", "jinja2>=3.1"} <= set(installer.wanted())
    assert f"torch=={version('torch')}" in installer.kept()


def test_recipes_use_what_there_is() -> None:
    """Every workflow in the document is YAML, and gives the action inputs that it has."""
    blocks = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "docs" / "ci.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    given = [step["with"] for block in blocks for step in _steps(YAML(typ="safe", pure=True).load(block))
             if str(step.get("uses", "")).startswith("OWNER/moe-ref@")]
    assert len(given) == 3
    for one in given:
        assert one.keys() <= ACTION["inputs"].keys()
        assert "implementation" in one


def _steps(document: Any) -> list[dict[str, Any]]:
    """The steps of all jobs of a workflow; a list of steps, as a recipe may show, is those."""
    if isinstance(document, list):
        return document
    return [step for job in document.get("jobs", {}).values() for step in job["steps"]]
