"""Protects the run of a lane: it counts what was executed, and none is green that was not run."""

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from moe_ref.cli import verify_commands
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Dtype
from moe_ref.lanes import device as device_module
from moe_ref.lanes.count import count_executed
from moe_ref.lanes.device import find_device
from moe_ref.lanes.load import load_lanes
from moe_ref.lanes.run import command_of, run_lane, words_of
from moe_ref.lanes.schema import Device, Lane, LanesFile
from moe_ref.records.lanes import LANE_FILE, read_lane
from moe_ref.records.schema import EndLine
from moe_ref.simulated.layer import capabilities
from moe_ref.tolerances.contracts import contract
from moe_ref.verify.run.run import Plan, RunResult, new_header
from tests.command_line import command
from tests.made_records import PLAIN, TP2, failing, make_run, passing, write


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


def test_no_shell_reads_a_command(two_lanes: LanesFile) -> None:
    """A folder's name is one word, whatever stands in it."""
    words = command_of(two_lanes.lanes["gpu1"], Path("runs/a b; touch c"))
    assert words == ["bash", "ci/gpu", "runs/a b; touch c"]
    interpreter = load_lanes().lanes["interpreter"]
    of_interpreter = command_of(interpreter, Path("r"))
    assert of_interpreter[:4] == [sys.executable, "-m", "moe_ref", "verify"]
    assert of_interpreter[-4:] == ["--minimum", str(interpreter.counts.minimum), "--record", "r"]


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
