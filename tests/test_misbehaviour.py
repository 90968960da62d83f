"""Implementations that hang, crash or return nonsense, and users who err: a clear end, nothing left over."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from moe_ref.cli.main import main
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.vocabulary import Ranks, Verdict
from moe_ref.records.schema import CaseLine
from moe_ref.records.store import FILE_NAME
from moe_ref.tiers.tiers import PlannedCase
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.run.run import Plan, RunResult, run_plan

CASE = "v1-T5.H32.I48.E4.K2-bf16-norm-tp3"
IMPLEMENTATION = "tests.subjects.misbehaving:"
LOCAL, GLOO = Ranks.LOCAL, Ranks.GLOO

# Implementation and ranks; verdict; words in the message that say what happened and where.
ENDS = {
    ("sleeps", LOCAL): (Verdict.HANG, "misbehaving.py"),
    ("collective_skipped", LOCAL): (Verdict.CRASH, "rank 1 returned, but ranks [0] wait in all_reduce"),
    ("collective_skipped", GLOO): (Verdict.CRASH, "rank 1 returned, but ranks [0, 2] wait in all_reduce"),
    ("collectives_differ", LOCAL): (Verdict.CRASH, "rank 1 issued all_gather((32,), 'torch.bfloat16'), but rank 0"),
    ("collectives_differ", GLOO): (Verdict.CRASH, "rank 1 issued all_gather((32,), 'torch.bfloat16'), but ranks"),
    ("shapes_differ", GLOO): (Verdict.CRASH, "rank 1 issued all_reduce((6, 32), 'torch.bfloat16'), but ranks"),
    ("sleeps_on_rank_one", GLOO): (Verdict.HANG, "in _sleep_on_rank_one, subjects/misbehaving.py"),
    ("segmentation_fault", LOCAL): (Verdict.CRASH, "SIGSEGV"),
    ("segmentation_fault", GLOO): (Verdict.CRASH, "SIGSEGV"),
    ("ends_the_process", LOCAL): (Verdict.CRASH, "exit code 0"),
    ("takes_memory", LOCAL): (Verdict.CRASH, "memory"),
    ("prints_garbage", LOCAL): (Verdict.PASS, ""),
    ("raises_system_exit", LOCAL): (Verdict.CRASH, "SystemExit: 0"),
    ("raises_system_exit", GLOO): (Verdict.CRASH, "SystemExit: 0"),
    ("raises_base_exception", LOCAL): (Verdict.CRASH, "BaseException: odd"),
    ("raises_on_rank_two", LOCAL): (Verdict.CRASH, "boom on two [on rank 2]"),
    ("raises_on_rank_two", GLOO): (Verdict.CRASH, "boom on two"),
    ("imports_the_oracle", LOCAL): (Verdict.CRASH, "moe_ref.oracle may not be imported"),
    ("returns_none", LOCAL): (Verdict.STRUCT, "NoneType"),
    ("returns_tuple", LOCAL): (Verdict.STRUCT, "tuple"),
    ("returns_meta", LOCAL): (Verdict.STRUCT, "meta"),
    ("returns_fp64", LOCAL): (Verdict.STRUCT, "dtype torch.float64, but should be torch.bfloat16"),
    ("returns_narrow", LOCAL): (Verdict.STRUCT, "shape (5, 31), but should be (5, 32)"),
    ("returns_nan", LOCAL): (Verdict.MISMATCH, "reduced: infinitely over bound"),
    ("returns_transposed_storage", LOCAL): (Verdict.PASS, ""),
}


def _run(name: str, ranks: Ranks) -> RunResult:
    planned = PlannedCase(case=parse_case(CASE), purpose="misbehaviour", ranks=ranks)
    return run_plan(Plan(implementation=IMPLEMENTATION + name, cases=[planned], tier="", minimum_executed=1,
                         lanes=1, time_limit=9.0 if name.startswith("sleeps") else 60.0,
                         memory_gib=2.0 if name == "takes_memory" else 0.0))


@pytest.fixture(scope="module")
def ended() -> Iterator[dict[tuple[str, Ranks], Future[RunResult]]]:
    """The run of every misbehaving implementation, two at a time."""
    os.environ[MARKER] = str(os.getpid())
    # msgspec must not learn a type from two threads at once; a run of its own does that before it has lanes.
    load_tolerances()
    with ThreadPoolExecutor(2) as lanes:
        yield {key: lanes.submit(_run, *key) for key in ENDS}
        lanes.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("name", "ranks"), ENDS)
def test_misbehaviour_ends_in_a_verdict(ended: dict[tuple[str, Ranks], Future[RunResult]], name: str,
                                        ranks: Ranks) -> None:
    verdict, words = ENDS[name, ranks]
    result = ended[name, ranks].result()
    line = result.lines[0]
    assert line.verdict == verdict, line.message
    assert words in line.message
    assert result.end.exit_code == (0 if verdict == Verdict.PASS else 1)
    assert len(line.message.splitlines()) <= 10
    assert max(map(len, line.message.splitlines())) <= 200


def test_the_case_after_a_dead_rank_passes(ended: dict[tuple[str, Ranks], Future[RunResult]]) -> None:
    """One failing case costs its own verdict only: the same child forks new ranks for the next case."""
    cases = [PlannedCase(case=parse_case(CASE.replace("T5", tokens)), purpose="misbehaviour", ranks=GLOO)
             for tokens in ("T5", "T6", "T7")]
    result = run_plan(Plan(implementation=IMPLEMENTATION + "dies_on_five_tokens", cases=cases, tier="", lanes=1,
                           minimum_executed=1, time_limit=60.0))
    assert [line.verdict for line in result.lines] == [Verdict.CRASH, Verdict.PASS, Verdict.PASS]
    assert "rank 1 was killed by SIGKILL; ranks [0, 2] wait in all_reduce((5, 32)" in result.lines[0].message


def test_no_process_is_left_over(ended: dict[tuple[str, Ranks], Future[RunResult]]) -> None:
    """Children and forked ranks all inherit the marker of this process; those of a test worker beside it do not."""
    for future in ended.values():
        future.result()
    assert _processes_marked(os.getpid()) == []


MARKER = "MOE_REF_TEST_PROCESS"


def _processes_marked(process: int) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if f"{MARKER}={process}".encode() in variables and IMPLEMENTATION in command:
            found.append(f"{folder.name} {command}")
    return found


RIGHT = "tests.subjects.right:round_each_stage"
WRONG_USE = {
    "unknown implementation": ["no_such_package", "--case", CASE],
    "unknown attribute": ["tests.subjects.right:nobody", "--case", CASE],
    "no capabilities": [IMPLEMENTATION + "without_numerics", "--case", CASE],
    "malformed case id": [RIGHT, "--case", "v1-T5-bf16"],
    "unknown word in a case id": [RIGHT, "--case", CASE + "-fast"],
    "unknown tier": [RIGHT, "--tier", "enormous"],
    "tier and case": [RIGHT, "--tier", "smoke", "--case", CASE],
    "no case of that tp": [RIGHT, "--tp", "7"],
    "tp that is no number": [RIGHT, "--tp", "two"],
    "shard beyond the last": [RIGHT, "--shard", "3/2"],
    "shard without a slash": [RIGHT, "--shard", "3"],
}


def _command_line(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> int:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["moe-ref", "verify", *arguments])
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("mistake", WRONG_USE)
def test_wrong_use_is_one_line_and_exit_code_2(
        monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], mistake: str) -> None:
    assert _command_line(monkeypatch, WRONG_USE[mistake]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("moe-ref: ")


def test_a_record_of_another_run_and_a_corrupt_record_are_refused(
        monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Nothing is appended to what is not understood: another run, or an unreadable line."""
    arguments = [RIGHT, "--case", CASE, "--record", str(tmp_path)]
    assert _command_line(monkeypatch, arguments) == 0
    path = tmp_path / FILE_NAME
    recorded = path.read_bytes()
    capfd.readouterr()
    other = [RIGHT, "--case", CASE.replace("T5", "T6"), "--record", str(tmp_path), "--resume"]
    for refused, words in ((arguments, "holds a run already"), (other, "cases of the recorded run differ")):
        assert _command_line(monkeypatch, refused) == 2
        assert words in capfd.readouterr().err
    path.write_bytes(recorded[:40] + b"\n" + recorded[40:])
    corrupt = path.read_bytes()
    assert _command_line(monkeypatch, [*arguments, "--resume"]) == 2
    assert f"{FILE_NAME}:1:" in capfd.readouterr().err
    assert path.read_bytes() == corrupt


def test_a_killed_run_is_resumed_without_losing_or_doubling_a_case(tmp_path: Path) -> None:
    """SIGKILL with several cases on record and several to go; the second run has all of them, once each."""
    cases = [part for seed in range(1, 13) for part in ("--case", CASE.replace("-tp3", f"-s{seed}-tp3"))]
    arguments = [sys.executable, "-m", "moe_ref", "verify", RIGHT, *cases, "--record", str(tmp_path)]
    run = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path, deadline = tmp_path / FILE_NAME, time.monotonic() + 60
    while not path.exists() or len(path.read_bytes().splitlines()) < 4:
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    before = path.read_bytes().count(b'"type":"case"')
    resumed = subprocess.run([*arguments, "--resume"], capture_output=True, text=True, timeout=120)
    assert resumed.returncode == 0, resumed.stderr
    kinds = [msgspec.json.decode(line)["type"] for line in path.read_bytes().splitlines()]
    lines = [msgspec.json.decode(line, type=CaseLine) for line in path.read_bytes().splitlines()
             if b'"type":"case"' in line]
    planned = msgspec.json.decode(path.read_bytes().splitlines()[0])["cases"]
    assert 0 < before < len(planned)
    assert Counter(line.case for line in lines) == Counter(planned)
    assert Counter(kinds) == {"run": 1, "case": len(planned), "end": 1}
