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

from moe_ref.contract.case_id import parse_case
from moe_ref.contract.vocabulary import Ranks, Verdict
from moe_ref.records.schema import CaseLine
from moe_ref.records.store import FILE_NAME
from moe_ref.tiers.tiers import PlannedCase
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.run.run import Plan, exit_code, run_plan
from tests.command_line import command
from tests.subjects.misbehaving import TOKENS

CASE = "v1-T5.H32.I48.E4.K2-bf16-norm-tp3"
IMPLEMENTATION = "tests.subjects.misbehaving:"
LOCAL, GLOO = Ranks.LOCAL, Ranks.GLOO
End = tuple[str, Ranks]

# Implementation and ranks; verdict; words in the message that say what happened and where.
ENDS = {
    ("sleeps", LOCAL): (Verdict.HANG, "misbehaving.py"),
    ("collective_skipped", LOCAL): (Verdict.CRASH, "rank 1 returned, but ranks [0] wait in all_reduce"),
    ("collective_skipped", GLOO): (Verdict.CRASH, "rank 1 returned, but ranks [0, 2] wait in all_reduce"),
    ("collectives_differ", LOCAL): (Verdict.CRASH, "rank 1 issued all_gather((32,), 'torch.bfloat16'), but rank 0"),
    ("collectives_differ", GLOO): (Verdict.CRASH, "rank 1 issued all_gather((32,), 'torch.bfloat16'), but ranks"),
    ("shapes_differ", GLOO): (Verdict.CRASH, "rank 1 issued all_reduce(({more}, 32), 'torch.bfloat16'), but ranks"),
    ("sleeps_on_rank_one", GLOO): (Verdict.HANG, "in _sleep_on_rank_one, subjects/misbehaving.py"),
    ("segmentation_fault", LOCAL): (Verdict.CRASH, "SIGSEGV"),
    ("segmentation_fault", GLOO): (Verdict.CRASH, "SIGSEGV"),
    ("ends_the_process", LOCAL): (Verdict.CRASH, "exit code 0"),
    ("takes_memory", LOCAL): (Verdict.CRASH, "memory"),
    ("prints_garbage", LOCAL): (Verdict.PASS, ""),
    ("raises_system_exit", LOCAL): (Verdict.CRASH, "SystemExit: 0"),
    ("raises_system_exit", GLOO): (Verdict.CRASH, "SystemExit: 0"),
    ("raises_base_exception", LOCAL): (Verdict.CRASH, "BaseException: odd"),
    ("raises_on_rank_two", LOCAL): (Verdict.CRASH, "boom on two"),
    ("raises_on_rank_two", GLOO): (Verdict.CRASH, "boom on two"),
    ("imports_the_oracle", LOCAL): (Verdict.CRASH, "moe_ref.oracle may not be imported"),
    ("returns_none", LOCAL): (Verdict.STRUCT, "NoneType"),
    ("returns_tuple", LOCAL): (Verdict.STRUCT, "tuple"),
    ("returns_meta", LOCAL): (Verdict.STRUCT, "meta"),
    ("returns_fp64", LOCAL): (Verdict.STRUCT, "dtype torch.float64, but should be torch.bfloat16"),
    ("returns_narrow", LOCAL): (Verdict.STRUCT, "shape ({tokens}, 31), but should be ({tokens}, 32)"),
    ("returns_nan", LOCAL): (Verdict.MISMATCH, "reduced: infinitely over bound"),
    ("returns_transposed_storage", LOCAL): (Verdict.PASS, ""),
}


# What a run is told besides: a short limit for those that hang, and little memory for the one that takes it all.
LIMITED = {("sleeps", LOCAL): {"time_limit": 9.0}, ("sleeps_on_rank_one", GLOO): {"time_limit": 9.0},
           ("takes_memory", LOCAL): {"memory_gib": 2.0}}


def _run(ends: list[End], **limits: float) -> dict[End, CaseLine]:
    cases = {key: PlannedCase(case=parse_case(CASE.replace("T5", f"T{TOKENS[key[0]]}").replace(
        "-tp3", "-s1-tp3" if key[1] is GLOO else "-tp3")), purpose="misbehaviour", ranks=key[1]) for key in ends}
    plan = Plan(implementation=IMPLEMENTATION + "by_tokens", cases=list(cases.values()), tier="", minimum_executed=1,
                lanes=1, **{"time_limit": 60.0, **limits})
    return dict(zip(ends, run_plan(plan).lines, strict=True))


@pytest.fixture(scope="module")
def ended() -> Iterator[dict[End, Future[dict[End, CaseLine]]]]:
    """The run that has the line of every misbehaviour: one run for all that need no limit of their own."""
    os.environ[MARKER] = str(os.getpid())
    # msgspec must not learn a type from two threads at once; a run of its own does that before it has lanes.
    load_tolerances()
    with ThreadPoolExecutor(2) as lanes:
        usual = lanes.submit(_run, [key for key in ENDS if key not in LIMITED])
        yield {key: lanes.submit(_run, [key], **LIMITED[key]) if key in LIMITED else usual for key in ENDS}
        lanes.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("name", "ranks"), ENDS)
def test_misbehaviour_ends_in_a_verdict(ended: dict[End, Future[dict[End, CaseLine]]],
                                        name: str, ranks: Ranks) -> None:
    """Whatever the case before it did."""
    verdict, words = ENDS[name, ranks]
    line, tokens = ended[name, ranks].result()[name, ranks], TOKENS[name]
    assert line.verdict == verdict, line.message
    assert words.replace("{tokens}", str(tokens)).replace("{more}", str(tokens + 1)) in line.message
    assert exit_code([line], executed=1, minimum=1) == (0 if verdict == Verdict.PASS else 1)
    assert len(line.message.splitlines()) <= 10
    assert max(map(len, line.message.splitlines())) <= 200


def test_the_case_after_a_dead_rank_passes() -> None:
    """One failing case costs its own verdict only: the same child forks new ranks for the next case."""
    cases = [PlannedCase(case=parse_case(CASE.replace("T5", tokens)), purpose="misbehaviour", ranks=GLOO)
             for tokens in ("T5", "T6", "T7")]
    result = run_plan(Plan(implementation=IMPLEMENTATION + "dies_on_five_tokens", cases=cases, tier="", lanes=1,
                           minimum_executed=1, time_limit=60.0))
    assert [line.verdict for line in result.lines] == [Verdict.CRASH, Verdict.PASS, Verdict.PASS]
    assert "rank 1 was killed by SIGKILL; ranks [0, 2] wait in all_reduce((5, 32)" in result.lines[0].message


def test_no_process_is_left_over(ended: dict[End, Future[dict[End, CaseLine]]]) -> None:
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


def test_a_record_of_another_run_and_a_corrupt_record_are_refused(
        capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Nothing is appended to what is not understood: another run, or an unreadable line."""
    arguments = ["verify", RIGHT, "--case", CASE, "--record", str(tmp_path)]
    assert command(*arguments) == 0
    path = tmp_path / FILE_NAME
    recorded = path.read_bytes()
    capfd.readouterr()
    other = ["verify", RIGHT, "--case", CASE.replace("T5", "T6"), "--record", str(tmp_path), "--resume"]
    for refused, words in ((arguments, "holds a run already"), (other, "cases of the recorded run differ")):
        assert command(*refused) == 2
        assert words in capfd.readouterr().err
    path.write_bytes(recorded[:40] + b"\n" + recorded[40:])
    corrupt = path.read_bytes()
    assert command(*arguments, "--resume") == 2
    assert f"{FILE_NAME}:1:" in capfd.readouterr().err
    assert path.read_bytes() == corrupt


@pytest.mark.nightly("test_record_survival kills a run by default")
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
