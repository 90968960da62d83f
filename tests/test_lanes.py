"""Protects lanes: a file that is read strictly, a choice that says why, and no lane that is green but was not run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from moe_ref.cli import verify_commands
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Dtype
from moe_ref.lanes import device as device_module
from moe_ref.lanes import happening as happening_module
from moe_ref.lanes.count import count_executed
from moe_ref.lanes.device import find_device
from moe_ref.lanes.happening import buildkite_happening, changed_files, ci_happening, github_happening
from moe_ref.lanes.load import LANES, load_lanes
from moe_ref.lanes.run import command_of, run_lane, words_of
from moe_ref.lanes.schema import Counts, Device, Event, Lane, LanesFile
from moe_ref.lanes.select import Happening, matches, select
from moe_ref.records.lanes import LANE_FILE, LaneRecord, read_lane, write_lane
from moe_ref.records.schema import EndLine
from moe_ref.simulated.layer import capabilities
from moe_ref.tolerances.contracts import contract
from moe_ref.verify.run.run import Plan, RunResult, new_header
from tests.command_line import command
from tests.made_records import PLAIN, TP2, failing, idle, make_run, passing, write
from tests.test_imports import forbidden

TEXT = """\
schema: 1
label: gpu
schedules: {nightly: "17 2 * * *", weekly: "43 4 * * 0"}
lanes:
  cpu:
    purpose: tests
    command: "{python} -c pass {record}"
    counts: {what: cases, minimum: 2}
    device: {gpus: 0, architecture: any, programs: []}
    minutes: 5
    workflow: cpu
    triggers: [push, pull_request]
    paths: []
    runners: [ubuntu-latest]
    forks: true
    baseline: ""
    keep_days: 14
  gpu1:
    purpose: one GPU
    command: bash ci/gpu {record}
    counts: {what: cases, minimum: 250}
    device: {gpus: 1, architecture: any, programs: []}
    minutes: 15
    workflow: gpu
    triggers: [label, nightly]
    paths: ["moe_fast/**", tolerances.yaml]
    runners: [self-hosted, gpu]
    forks: false
    baseline: ""
    keep_days: 30
"""


@pytest.fixture
def lanes_file(tmp_path: Path) -> Path:
    """Two lanes: cpu on every push, gpu1 on label and at night."""
    path = tmp_path / "lanes.yaml"
    path.write_text(TEXT)
    return path


@pytest.fixture
def file(lanes_file: Path) -> LanesFile:
    return load_lanes(lanes_file)


def test_this_repository_has_the_lanes_that_ci_is_made_of() -> None:
    """A lane that goes is a decision: it would be lost without a trace otherwise."""
    wanted = {"cpu", "interpreter", "compile", "studies", "score-sample", "divergence", "gpu1", "gpuN", "sanitizer"}
    assert wanted <= load_lanes().lanes.keys()


@pytest.mark.parametrize(("old", "new", "line", "said"), [
    pytest.param("minutes: 5", "minutes: 5\n    retries: 2", 11, "lanes.cpu.retries: unknown key", id="unknown key"),
    pytest.param("    forks: true\n", "", 6, "lanes.cpu: forks is missing", id="missing key"),
    pytest.param("minutes: 5", "minutes: soon", 10, "lanes.cpu.minutes", id="wrong type"),
    pytest.param("minimum: 2}", "minimum: 0}", 8, "lanes.cpu.counts.minimum", id="a minimum of nothing"),
    pytest.param("minutes: 5", "minutes: 5\n    minutes: 6", 11, "duplicate key", id="duplicate key"),
    pytest.param("what: cases, minimum: 2}", "what: luck, minimum: 2}", 8, "lanes.cpu.counts.what", id="unknown count"),
    pytest.param("label: gpu\n", "label: \"x') || true || ('\"\n", 2, "label", id="a label that is no word"),
    pytest.param("purpose: tests", "purpose: \"a\\n  - run: b\"", 6, "lanes.cpu.purpose", id="a purpose of two lines"),
    pytest.param("  cpu:\n", "  \"a;b\":\n", 5, "letters and digits", id="a name that is no name of a job"),
    pytest.param("triggers: [label, nightly]", "triggers: [push]", 18, "machine of one's own", id="GPU on every push"),
    pytest.param("forks: false", "forks: true", 18, "trusts forks", id="forks on one's own machine"),
    pytest.param("runners: [self-hosted, gpu]", "runners: [ubuntu-latest]", 18, "should go together",
                 id="workflow and runner"),
    pytest.param("bash ci/gpu {record}", "bash ci/gpu runs", 18, "without {record}", id="nothing to count"),
    pytest.param("43 4 * * 0", "17 2 * * *", 3, "should differ", id="one cron line for two events"),
    pytest.param("schema: 1", "schema: 2", 1, "schema", id="another schema"),
    pytest.param("paths: []", "paths: &x []", 1, "", id="nothing wrong with an anchor alone"),
])
def test_what_is_wrong_in_the_file_is_named(lanes_file: Path, old: str, new: str, line: int, said: str) -> None:
    """File, line and key, before anything runs."""
    lanes_file.write_text(TEXT.replace(old, new, 1))
    if not said:
        load_lanes(lanes_file)
        return
    with pytest.raises(UsageValueError) as caught:
        load_lanes(lanes_file)
    assert f"{lanes_file}:{line}: " in str(caught.value)
    assert said in str(caught.value)


def test_a_file_that_is_no_yaml_or_not_there(lanes_file: Path) -> None:
    lanes_file.write_text("lanes: [")
    with pytest.raises(UsageValueError, match=r"lanes.yaml:1"):
        load_lanes(lanes_file)
    with pytest.raises(UsageValueError, match="No such file"):
        load_lanes(lanes_file.with_name("none.yaml"))


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
def test_a_lane_runs_on_its_events_or_says_why_not(file: LanesFile, happening: Happening, runs: list[str],
                                                   reason: str) -> None:
    """Paths leave a lane out on a pull request alone: at night everything runs."""
    choices = select(file, happening)
    assert [one.name for one in choices if one.runs] == runs
    if reason:
        assert reason in " ".join(one.reason for one in choices)


def test_lanes_of_one_workflow(file: LanesFile) -> None:
    assert [one.name for one in select(file, Happening((Event.PUSH,)), "cpu")] == ["cpu"]
    with pytest.raises(UsageValueError, match="workflow 'nightly', but should be one of cpu, gpu"):
        select(file, Happening((Event.PUSH,)), "nightly")


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
def test_events_of_github(file: LanesFile, monkeypatch: pytest.MonkeyPatch, name: str, payload: dict[str, Any],
                          events: list[str], fork: bool) -> None:
    monkeypatch.setattr(happening_module, "changed_files", lambda since: (since,))
    found = github_happening(file, name, payload)
    assert (list(found.events), found.fork) == (events, fork)
    assert found.changed == (("HEAD^1",) if name == "pull_request" else None)


def test_events_that_nobody_knows_are_refused(file: LanesFile) -> None:
    """A guess would leave lanes out."""
    with pytest.raises(UsageValueError, match="schedule '0 0 1 1 \\*', but should be one of 17 2"):
        github_happening(file, "schedule", {"schedule": "0 0 1 1 *"})
    with pytest.raises(UsageValueError, match="GitHub event 'issue_comment'"):
        github_happening(file, "issue_comment", {})
    with pytest.raises(UsageValueError, match="MOE_EVENT='', but should be nightly or weekly"):
        buildkite_happening(file, {"BUILDKITE_SOURCE": "schedule"})
    with pytest.raises(UsageValueError, match="neither GITHUB_ACTIONS nor BUILDKITE"):
        ci_happening(file, {})


@pytest.mark.parametrize(("environment", "events", "fork"), [
    ({"BUILDKITE_PULL_REQUEST": "false"}, ["push"], False),
    ({"BUILDKITE_SOURCE": "schedule", "MOE_EVENT": "nightly"}, ["nightly"], False),
    ({"BUILDKITE_MERGE_QUEUE_BASE_BRANCH": "main"}, ["merge_queue"], False),
    ({"BUILDKITE_PULL_REQUEST": "7", "BUILDKITE_PULL_REQUEST_REPO": "git@g:our/moe", "BUILDKITE_REPO": "git@g:our/moe",
      "BUILDKITE_PULL_REQUEST_LABELS": "docs,gpu"}, ["pull_request", "label"], False),
    ({"BUILDKITE_PULL_REQUEST": "7", "BUILDKITE_PULL_REQUEST_REPO": "git@g:other/moe",
      "BUILDKITE_REPO": "git@g:our/moe"}, ["pull_request"], True),
])
def test_events_of_buildkite(file: LanesFile, environment: dict[str, str], events: list[str], fork: bool) -> None:
    found = ci_happening(file, {"BUILDKITE": "true", **environment})
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


def lane(code: str, minimum: int = 2, gpus: int = 0, programs: tuple[str, ...] = (), minutes: float = 1) -> Lane:
    """A lane of cases whose command is a line of Python with the lane's folder in sys.argv[1]."""
    base = msgspec.convert({"purpose": "made", "command": "x {record}", "counts": {"what": "cases", "minimum": minimum},
                            "device": {"gpus": gpus, "architecture": "any", "programs": programs}, "minutes": 1,
                            "workflow": "cpu", "triggers": ["push"], "paths": [], "runners": ["ubuntu-latest"],
                            "forks": True, "baseline": "", "keep_days": 1}, Lane)
    return msgspec.structs.replace(base, command=f"{{python}} -c '{code}' {{record}}", minutes=minutes)  # pyrefly: ignore


WRITES = ('import os, pathlib, sys; pathlib.Path(sys.argv[1], "sub").mkdir(); '
          'pathlib.Path(sys.argv[1], "sub", "records.jsonl").write_text('
          '"".join("{%stype%s: %scase%s, %scase%s: %d, %sverdict%s: %spass%s}\\n".replace("%s", chr(34)) % n '
          'for n in range(2))); assert os.environ["MOE_LANE"] == "made"; ')


@pytest.mark.parametrize(("code", "minimum", "verdict", "exit_code", "executed", "reason"), [
    pytest.param("", 2, "pass", 0, 2, "", id="passes"),
    pytest.param("", 3, "fail", 4, 2, "lane made executed 2 of at least 3 cases", id="too few"),
    pytest.param("sys.exit(1)", 2, "fail", 1, 2, "exit code 1", id="its command fails"),
    pytest.param("sys.exit(1)", 9, "fail", 1, 2, "lane made executed 2 of at least 9 cases", id="both"),
])
def test_a_lane_leaves_what_became_of_it(tmp_path: Path, code: str, minimum: int, verdict: str, exit_code: int,
                                         executed: int, reason: str) -> None:
    """Its number is read from its records, at any depth, and not from what it says."""
    done = run_lane("made", lane(WRITES + code, minimum), tmp_path / "run", print)
    assert (done.verdict, done.exit_code, done.executed, done.reason) == (verdict, exit_code, executed, reason)
    assert read_lane(tmp_path / "run" / LANE_FILE) == done
    with pytest.raises(UsageValueError, match="is there already"):
        run_lane("made", lane(WRITES), tmp_path / "run", print)


def test_a_lane_is_ended_at_its_limit(tmp_path: Path) -> None:
    """Also what its command has started; records that were written count."""
    code = WRITES + 'import subprocess, time; subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])'
    done = run_lane("made", lane(code, minutes=0.01), tmp_path, print)
    assert (done.verdict, done.exit_code) == ("fail", 4)
    assert done.reason.startswith("ended after 0.01 minutes, its limit")
    assert done.seconds < 20


@pytest.mark.parametrize(("gpus", "programs", "reason"), [
    (2, (), "needs 2 GPUs, but torch finds 1 here: H100 (sm_90)"),
    (0, ("no-such-tool",), "no no-such-tool on the search path"),
])
def test_a_lane_without_its_device_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int,
                                              programs: tuple[str, ...], reason: str) -> None:
    """A reason and a count, exit code 4, and its command was not even started."""
    monkeypatch.setattr(device_module, "_gpus", lambda: ([("H100", "sm_90")], ""))
    done = run_lane("made", lane(WRITES, gpus=gpus, programs=programs), tmp_path / "run", print)
    assert (done.verdict, done.exit_code, done.executed, done.reason) == ("not_run", 4, 0, reason)
    assert words_of(done) == f"NOT RUN  lane made, 0 of at least 2 cases, {done.seconds:.0f} s of 1 min: {reason}"
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LANE_FILE]


def test_a_device_of_another_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "_gpus", lambda: ([("A100", "sm_80"), ("H100", "sm_90")], ""))
    assert find_device(Device(gpus=1, architecture="sm_90", programs=())).words == "1x H100"
    found = find_device(Device(gpus=2, architecture="sm_90", programs=()))
    assert found.missing == "needs 2 GPUs of sm_90, but torch finds 2 here: A100 (sm_80), H100 (sm_90)"


def test_a_python_without_torch_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "_PROBE", "import no_such_module")
    found = find_device(Device(gpus=1, architecture="any", programs=()))
    assert found.missing == ("needs 1 GPU, but torch could not be asked (ModuleNotFoundError: No module named "
                             "'no_such_module')")


def test_no_shell_reads_a_command(file: LanesFile) -> None:
    """A folder's name is one word, whatever stands in it."""
    words = command_of(file.lanes["gpu1"], Path("runs/a b; touch c"))
    assert words == ["bash", "ci/gpu", "runs/a b; touch c"]
    of_interpreter = command_of(load_lanes().lanes["interpreter"], Path("r"))
    assert of_interpreter[:4] == [sys.executable, "-m", "moe_ref", "verify"]
    assert of_interpreter[-4:] == ["--minimum", "550", "--record", "r"]


def test_a_lane_of_cases_has_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its head lines go into lane.json, from where the report of all lanes takes them."""
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    made = write(make_run(passing(PLAIN), failing(TP2)), tmp_path / "made")
    code = f'import shutil, sys; shutil.copy("{made / "records.jsonl"}", sys.argv[1])'
    told: list[str] = []
    done = run_lane("made", lane(code), tmp_path / "run", told.append)
    assert (done.verdict, done.exit_code, done.executed) == ("fail", 1, 2)
    assert done.head[0].startswith("FAIL  moe_fast 0.4.1")
    assert told == [f"report: {tmp_path / 'run' / 'report' / 'index.html'}"]


@pytest.mark.parametrize(("what", "name", "lines", "number"), [
    ("cases", "records.jsonl", [{"type": "case", "case": "a", "verdict": "not_run"},
                                {"type": "case", "case": "a", "verdict": "pass"},
                                {"type": "case", "case": "b", "verdict": "unsupported"},
                                {"type": "case", "case": "c", "verdict": "mismatch"}, {"type": "end"}], 2),
    ("curves", "records.jsonl", [{"type": "growth", "subject": "a", "status": "PREDICTED"},
                                 {"type": "growth", "subject": "b", "status": "NOT RUN"}], 1),
    ("mutants", "score.jsonl", [{"type": "mutant", "id": "a", "outcome": "caught"},
                                {"type": "mutant", "id": "b", "outcome": "not_runnable"}], 1),
    ("layers", "alarms.jsonl", [{"type": "draw", "draw": 1, "runs": [{"verdict": "pass"}, {"verdict": "not_run"}]}], 1),
    ("layers", "graphs.jsonl", [{"case": "a", "faults": []}, {"case": "b", "faults": []}], 2),
    ("combinations", "records.jsonl", [{"type": "combination", "key": "a", "error": ""},
                                       {"type": "combination", "key": "b", "error": "no"}], 1),
])
def test_what_is_counted(tmp_path: Path, what: Any, name: str, lines: list[dict[str, Any]], number: int) -> None:
    """What ran, once each; half a line, as a kill leaves it, is nothing."""
    assert count_executed(what, tmp_path) == 0
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / name).write_text(text + "no json\n" + text.splitlines()[-1])
    assert count_executed(what, tmp_path) == number


def test_tests_are_counted_from_junit(tmp_path: Path) -> None:
    (tmp_path / "junit.xml").write_text('<testsuites><testsuite tests="9" skipped="2" errors="1" failures="3"/>'
                                        "</testsuites>")
    assert count_executed("tests", tmp_path) == 6


def test_verify_writes_the_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    """By --lane, or by the variable that `lanes run` sets."""
    plans: list[Plan] = []
    monkeypatch.setattr(verify_commands, "_on_ranks", lambda ranks, plan, use: plans.append(plan) or 0)
    monkeypatch.delenv("MOE_LANE", raising=False)
    assert command("verify", "moe_fast", "--case", PLAIN, "--lane", "gpu1") == 0
    monkeypatch.setenv("MOE_LANE", "gpuN")
    assert command("verify", "moe_fast", "--case", PLAIN) == 0
    assert [plan.lane for plan in plans] == ["gpu1", "gpuN"]
    numerics = {Dtype.BF16: contract("stored_rows", Dtype.BF16)}
    assert new_header(plans[0], capabilities("made", numerics), "").lane == "gpu1"


def test_a_lane_below_its_minimum_is_told_by_verify() -> None:
    plan = Plan(implementation="moe_fast", cases=[], tier="", minimum_executed=250, lane="gpu1")
    end = EndLine(run="r", finished="", seconds=1.0, verdicts={}, executed=3, exit_code=4)
    text = verify_commands._summary(plan, RunResult(make_run().header, [], end))
    assert "lane gpu1 executed 3 of at least 250 cases" in text


def record(name: str, verdict: Any = "pass", **changes: Any) -> LaneRecord:
    base = LaneRecord(lane=name, started="2026-11-22T02:17:00+00:00", verdict=verdict, device="1x H100",
                      counted="cases", executed=300, minimum=250, seconds=61.0, minutes=15, exit_code=0)
    return msgspec.structs.replace(base, **changes)


def reported(folder: Path, lanes_file: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, report.json and summary.md of `moe-ref report FOLDER --lanes ...`."""
    code = command("report", str(folder), "--out", str(folder / "out"), "--lanes", str(lanes_file), *options)
    document = json.loads((folder / "out" / "report.json").read_text())
    return code, document, (folder / "out" / "summary.md").read_text()


def test_a_lane_that_was_lost_or_not_run_is_never_green(tmp_path: Path, lanes_file: Path) -> None:
    """All cases pass, but the GPU lane left nothing: its name stands in the first line, and the exit code is 4."""
    run = make_run(passing(PLAIN), passing(TP2))
    run.header = msgspec.structs.replace(run.header, lane="cpu")
    write(run, tmp_path / "runs")
    nightly = ("--event", "nightly", "--event", "push")
    code, document, summary = reported(tmp_path / "runs", lanes_file, *nightly)
    assert code == 4
    assert document["head"][0].startswith("FAIL  lane LOST: gpu1 (should have run on this event and left no record); "
                                          "moe_fast 0.4.1")
    assert document["head"][2].endswith("1 of 2 lanes ran")
    assert document["head"][3] == ("first lane gpu1: should have run on this event and left no record; "
                                   "repro: bash ci/lane gpu1; in the cases nothing failed")
    assert "| gpu1 |  | LOST | - | - | should have run" in summary
    page = (tmp_path / "runs" / "out" / "index.html").read_text()
    assert '<h2 id="lanes">' in page
    assert '<td class="w bad">LOST</td>' in page
    missing = record("gpu1", "not_run", executed=0, reason="no <b>device</b>", exit_code=4)
    write_lane(tmp_path / "runs" / "gpu1", missing)
    code, document, summary = reported(tmp_path / "runs", lanes_file, *nightly)
    assert code == 4
    assert "lane NOT RUN: gpu1 (no <b>device</b>); " in document["head"][0]
    assert "<b>device" not in (tmp_path / "runs" / "out" / "index.html").read_text()
    assert "&lt;b&gt;device" in summary


@pytest.mark.parametrize(("records", "code", "said"), [
    pytest.param([record("gpu1", "fail", exit_code=1, reason="exit code 1")], 1, "lane FAIL: gpu1 (exit code 1)",
                 id="failed"),
    pytest.param([record("gpu1", executed=9)], 4, "lane gpu1 executed 9 of at least 250 cases",
                 id="passed by a minimum of its own"),
    pytest.param([record("gpu1", "fail", exit_code=1, reason="first"), record("gpu1")], 1, "gpu1 (first)",
                 id="passed at the second attempt"),
    pytest.param([record("gpu1")], 0, "PASS  lanes: no case was verified", id="passed"),
    pytest.param([], 4, "lane LOST: gpu1", id="no record"),
])
def test_lanes_alone_make_a_report(tmp_path: Path, lanes_file: Path, records: list[LaneRecord], code: int,
                                   said: str) -> None:
    """Where no case was verified the lanes are what there is to tell."""
    folder = tmp_path / "runs"
    folder.mkdir()
    for number, one in enumerate(records):
        write_lane(folder / str(number), one)
    found, document, summary = reported(folder, lanes_file, "--event", "label", "--workflow", "gpu")
    assert (found, document["exit_code"]) == (code, code)
    assert said in document["head"][0] + document["lanes"][0]["reason"]
    assert "## Lanes" in summary


def test_a_broken_record_of_a_lane_is_a_failure_of_that_lane(tmp_path: Path, lanes_file: Path) -> None:
    """It loses nothing else, and is not taken for lost."""
    folder = tmp_path / "runs" / "lane-gpu1"
    folder.mkdir(parents=True)
    (folder / LANE_FILE).write_text('{"lane": "gpu1"')
    code, document, _ = reported(tmp_path / "runs", lanes_file, "--event", "label", "--workflow", "gpu")
    assert (code, document["lanes"][0]["verdict"]) == (3, "FAIL")
    assert "lane.json" in document["lanes"][0]["reason"]


def test_reports_of_lanes_stand_in_the_summary(tmp_path: Path, lanes_file: Path) -> None:
    """Five lines of each, so that nobody has to open artefacts to learn which lane broke where."""
    write(make_run(passing(PLAIN), idle(TP2, "unsupported", "not declared")), tmp_path / "runs")
    write_lane(tmp_path / "runs" / "gpu1", record("gpu1", "fail", exit_code=1, reason="exit code 1", head=[
        "FAIL  moe_fast on a GPU", "on    1x H100", "cases 300", "first `down`\n```", "close none"]))
    _, _, summary = reported(tmp_path / "runs", lanes_file, "--event", "label", "--workflow", "gpu")
    assert "## Reports of lanes" in summary
    assert "FAIL  moe_fast on a GPU\non    1x H100" in summary
    assert "````text" in summary


def test_events_and_lanes_belong_together(tmp_path: Path, lanes_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong use, exit code 2."""
    folder = write(make_run(passing(PLAIN)), tmp_path / "runs")
    for words, said in ((("report", str(folder), "--event", "push"), "events without --lanes"),
                        (("report", str(folder), "--lanes", str(lanes_file)), "no --event; give one of push"),
                        (("lanes", "select", "--event", "ci", "--fork"), "--event ci with --changed")):
        assert command(*words) == 2
        assert said in capsys.readouterr().err


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


def test_lanes_need_no_torch() -> None:
    """They are chosen and reported where nothing is installed that could run them."""
    assert forbidden(("moe_ref/lanes", "moe_ref/cli/lane_commands.py", "moe_ref/cli/lane_options.py"),
                     ("torch", "triton", "moe_ref.verify", "moe_ref.oracle", "moe_ref.tiers")) == []


def test_counts_have_a_minimum() -> None:
    """A lane that may execute nothing would be green without having run."""
    assert all(one.counts.minimum > 0 for one in load_lanes().lanes.values())
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"what": "cases", "minimum": 0}, Counts)
