"""The GPU lane without a GPU: one step's trouble is its own, a second call goes on, what a GPU is told is spelt right.

Steps here are lines of Python of a few milliseconds; those of the lane itself are rehearsed, and their commands parsed.
"""

import math
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from ci import gpu_lane, gpu_steps
from ci.gpu_evidence import NAME, pack
from ci.gpu_lane import STEPS_FILE, StepLine, main, read_steps, run_lane
from ci.gpu_steps import LARGE, LAYERS, MUTANTS, SETUP, SMALL, STEPS, TOTAL_SECONDS, Command, Place, Step
from ci.large_layers import SHAPES
from moe_ref.cli.main import cli
from moe_ref.contract.case_id import parse_case
from moe_ref.score.load import load_catalogue
from moe_ref.score.run import ScorePlan
from moe_ref.tiers.tiers import PlannedCase
from moe_ref.verify.run.in_process import InProcess
from moe_ref.verify.run.run import Observer, Plan, run_with
from tests.command_line import command
from tests.subjects.right import round_each_stage

DIES = "import os; os.abort()"


def place(folder: Path, num_devices: int = 0) -> Place:
    return Place(folder, num_devices, 2)


def step(name: str, code: str, **others: Any) -> Step:
    """A step that runs a line of Python in a process of its own."""
    share = others.pop("seconds", 100.0)
    others.setdefault("least", 0.1)
    return Step(name, f"step {name}", share, lambda place, seconds: [Command(("-c", code))], **others)


def verdicts(lines: list[StepLine]) -> dict[str, str]:
    return {line.step: line.verdict for line in lines}


@pytest.mark.parametrize(("code", "verdict", "lane_code"), [
    ("", "PASS", 0), ("raise SystemExit(1)", "FAIL", 1), ("raise SystemExit(2)", "WRONG USE", 2),
    ("raise SystemExit(3)", "HARNESS ERROR", 3), ("raise SystemExit(4)", "INCOMPLETE", 4), (DIES, "CRASHED", 3),
    ("raise SystemExit(77)", "CRASHED", 3)])
def test_a_step_ends_by_itself_alone(code: str, verdict: str, lane_code: int, tmp_path: Path) -> None:
    """The one after it is run whatever became of it."""
    lines = run_lane([step("first", code), step("second", "print('fine')")], place(tmp_path), digest="a")
    assert verdicts(lines) == {"first": verdict, "second": "PASS"}
    assert lines[0].lane_code(required=False) == lane_code
    assert lines[1].said == "fine"


def test_a_step_that_hangs_costs_its_share_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ended with all that it has started, even if it does not listen; those behind it have their time."""
    monkeypatch.setattr(gpu_lane, "GRACE_SECONDS", 0.2)
    deaf = ("import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "started = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
            "print(started.pid, flush=True)\ntime.sleep(60)")
    began = time.monotonic()
    lines = run_lane([step("hangs", deaf, seconds=TOTAL_SECONDS / 4), step("fine", "", seconds=TOTAL_SECONDS * 3 / 4)],
                     place(tmp_path), total=4.0, digest="a")
    assert verdicts(lines) == {"hangs": "TIMED OUT", "fine": "PASS"}
    assert lines[0].lane_code(required=False) == 4
    assert time.monotonic() - began < 3.5
    assert _ended(int(lines[0].said))


def _ended(process: int) -> bool:
    """Whether it is gone within some seconds, or waits to be looked at by its new parent."""
    until, stat = time.monotonic() + 5, Path(f"/proc/{process}/stat")
    while time.monotonic() < until:
        with suppress(OSError):
            if stat.read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.02)
                continue
        return True
    return False


def test_a_second_call_does_what_is_left(tmp_path: Path) -> None:
    """What passed or failed is not repeated; what was cut, not run, or made from other sources is."""
    again = tmp_path / "again"
    flaky = f"import os, sys; n = os.path.exists({str(again)!r}); open({str(again)!r}, 'w'); sys.exit(0 if n else 4)"
    steps = [step("passes", "", required=True), step("fails", "raise SystemExit(1)"), step("cut", flaky),
             step("absent", "", missing=lambda place: "no such device")]
    first = run_lane(steps, place(tmp_path), digest="a")
    second = run_lane(steps, place(tmp_path), digest="a")
    assert verdicts(first) == {"passes": "PASS", "fails": "FAIL", "cut": "INCOMPLETE", "absent": "NOT RUN"}
    assert verdicts(second) == {**verdicts(first), "cut": "PASS"}
    written = [line.split(b'"')[3].decode() for line in (tmp_path / STEPS_FILE).read_bytes().splitlines()]
    assert written == ["passes", "fails", "cut", "absent", "cut", "absent"]
    assert first[3].lane_code(required=True) == 4
    assert first[3].lane_code(required=False) == 0
    assert first[3].not_run == "no such device"
    run_lane(steps[:1], place(tmp_path), digest="b")
    assert read_steps(tmp_path)["passes"].digest == "b"


@pytest.mark.parametrize(("goes_on", "digest", "kept"), [(True, "a", True), (False, "a", False), (True, "b", False)])
def test_a_folder_is_kept_for_who_goes_on_in_it(goes_on: bool, digest: str, kept: bool, tmp_path: Path) -> None:
    """Records of other sources, or of a verb that begins anew, would be refused or counted twice."""
    cut = step("cut", "raise SystemExit(4)", goes_on=goes_on)
    run_lane([cut], place(tmp_path), digest="a")
    (tmp_path / "cut" / "records.jsonl").write_text("lines\n")
    run_lane([cut], place(tmp_path), digest=digest)
    assert (tmp_path / "cut" / "records.jsonl").exists() == kept


def test_the_report_is_made_again_after_any_other_step(tmp_path: Path) -> None:
    pages = step("pages", "", last=True)
    run_lane([pages], place(tmp_path), digest="a")
    run_lane([pages], place(tmp_path), digest="a")
    assert (tmp_path / STEPS_FILE).read_bytes().count(b"\n") == 1
    run_lane([step("other", ""), pages], place(tmp_path), digest="a")
    assert [line.split(b'"')[3] for line in (tmp_path / STEPS_FILE).read_bytes().splitlines()] == [
        b"pages", b"other", b"pages"]


def test_a_step_that_cannot_be_planned_is_an_error_of_its_own(tmp_path: Path) -> None:
    def raises(*_: object) -> Any:
        raise RuntimeError("no such tier")

    steps = [Step("planned", "", 10.0, raises), step("asked", "", missing=raises), step("fine", "")]
    lines = run_lane(steps, place(tmp_path), digest="a")
    assert verdicts(lines) == {"planned": "HARNESS ERROR", "asked": "NOT RUN", "fine": "PASS"}
    assert lines[0].said == "RuntimeError: no such tier"
    assert "no such tier" in lines[1].not_run


KILLED = """
import sys
from pathlib import Path
from tests.test_gpu_lane import place, run_lane, three
run_lane(three(Path(sys.argv[1])), place(Path(sys.argv[1])), digest="a")
"""


def three(folder: Path) -> list[Step]:
    """The third one stays for a minute, unless it has been there before."""
    mark = str(folder / "mark")
    code = (f"import os, time; before = os.path.exists({mark!r}); open({mark!r}, 'w').write(str(os.getpid()))\n"
            "time.sleep(0 if before else 60)")
    return [step("first", ""), step("second", ""), step("third", code)]


def test_a_killed_lane_goes_on(tmp_path: Path) -> None:
    """SIGKILL in the third step, which ends with it; a second call does that one alone."""
    lane = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.DEVNULL)
    until, mark = time.monotonic() + 60, tmp_path / "mark"
    while not mark.exists() or not mark.read_text():
        assert lane.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    lane.send_signal(signal.SIGKILL)
    lane.wait()
    assert _ended(int(mark.read_text()))
    with (tmp_path / STEPS_FILE).open("ab") as steps:
        steps.write(b'{"step":"thi')
    lines = run_lane(three(tmp_path), place(tmp_path), digest="a")
    assert verdicts(lines) == {"first": "PASS", "second": "PASS", "third": "PASS"}
    written = [line.split(b'"')[3] for line in (tmp_path / STEPS_FILE).read_bytes().splitlines()]
    assert written == [b"first", b"second", b"third"]


def test_all_that_is_there_goes_into_one_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below its limit: the largest files stay behind, and it says which."""
    (tmp_path / "matrix").mkdir()
    (tmp_path / "matrix" / "records.jsonl").write_text("line\n")
    (tmp_path / "large.bin").write_bytes(torch.randint(256, (40_000,), dtype=torch.uint8).numpy().tobytes())
    monkeypatch.setattr("ci.gpu_evidence.MOST_BYTES", 20_000)
    assert "1 files" in pack(tmp_path)
    assert "without large.bin" in pack(tmp_path)
    with tarfile.open(tmp_path / NAME) as archive:
        assert archive.getnames() == ["matrix/records.jsonl"]


def _parsed(given: Command) -> click.Context:
    """The arguments as the program that gets them reads them; raises click's errors."""
    module, *arguments = given.arguments[1:]
    if module != "moe_ref":
        return import_module(module).main.make_context(module, list(arguments))
    verb = cli.get_command(click.Context(cli), arguments[0])
    assert verb is not None
    return verb.make_context(arguments[0], arguments[1:])


@pytest.mark.parametrize("num_devices", [0, 1, 2])
@pytest.mark.parametrize("one", STEPS, ids=[step.name for step in STEPS])
def test_every_command_is_one_that_its_program_knows(one: Step, num_devices: int, tmp_path: Path) -> None:
    """A misspelt option would be seen on a GPU alone, which nobody has at hand."""
    for given in one.commands(place(tmp_path, num_devices), one.seconds):
        found = _parsed(given).params
        assert found.get("device", "cuda" if num_devices else "cpu") == ("cuda" if num_devices else "cpu")
        assert found.get("deadline", 0.0) < one.seconds


def test_the_shares_are_the_whole_time() -> None:
    """And all names differ, so that each has a folder."""
    assert sum(one.seconds for one in STEPS) == TOTAL_SECONDS < 9 * 60
    assert len({one.name for one in STEPS}) == len(STEPS)


def test_what_is_named_is_there() -> None:
    """Cases, models, mutants and shapes; the mutants that only a GPU can run are each in one of two steps."""
    for case_id in (*SETUP, *gpu_steps.WORLD_OF_ONE, *(f"v1-{name}-bf16" for name in LAYERS)):
        parse_case(case_id)
    catalogue = load_catalogue(Path("tests/catalogue"))
    gpu = {one.id for one in catalogue.mutants if one.runs_on == "gpu"}
    plan = ScorePlan(catalogue=catalogue, only=MUTANTS, gpu_only=True)
    scored = {one.id for one in catalogue.mutants if plan.chosen(one)}
    assert scored | set(LARGE.values()) == gpu
    assert not scored & set(LARGE.values())
    assert {one.id for one in catalogue.right if plan.chosen(one)} == {"right.fast", "right.overlapped-sums"}
    assert LARGE.keys() == SHAPES.keys() >= SMALL.keys()
    assert set(SMALL.values()) <= {one.id for one in catalogue.mutants} - gpu


def test_nccl_counts_what_it_leaves_out() -> None:
    words = [gpu_steps.nccl_words(num_devices) for num_devices in (1, 2, 8)]
    left = [int(text.split()[0]) for text in words]
    assert all(more > fewer for more, fewer in pairwise(left))
    assert left[-1] == 0


def test_a_deadline_is_where_a_run_goes_on(tmp_path: Path) -> None:
    """Of verify: cases that it left out are on record as not run, and run by the next call."""
    planned = PlannedCase(case=parse_case("v1-T5.H32.I32.E4.K2-fp32-norm"), purpose="cut short")
    plan = Plan(implementation="right", cases=[planned],
                tier="", minimum_executed=1, record=tmp_path, resume=True, deadline=-1.0)

    def verdict(plan: Plan) -> tuple[str, int]:
        pool: Any = InProcess(round_each_stage)
        found = run_with(plan, pool, round_each_stage.CAPABILITIES, "", time.monotonic(), Observer())
        return found.lines[0].verdict, found.end.exit_code

    assert verdict(plan) == ("not_run", 4)
    assert verdict(plan) == ("not_run", 4)
    assert verdict(replace(plan, deadline=math.inf)) == ("pass", 0)


def test_an_error_of_the_harness_is_no_verdict(monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    """As of a driver that is not there: not 1, by which a step would be done."""
    def no_driver(device: str) -> Any:
        raise RuntimeError("no driver")

    monkeypatch.setattr("moe_ref.cli.hardware_commands.hardware_class", no_driver)
    assert command("fingerprint", "--device", "cpu") == 3
    assert "RuntimeError: no driver" in capsys.readouterr().err


def test_the_lane_rehearses_on_a_cpu(tmp_path: Path) -> None:
    """Some of its own steps, in processes of their own, with table and archive."""
    done = CliRunner().invoke(main, [str(tmp_path), "--rehearse", "--steps", "environment,graphs"])
    assert done.exit_code == 0, done.output
    found = read_steps(tmp_path)
    assert {name: line.verdict for name, line in found.items()} == {
        "environment": "PASS", "graphs": "NOT RUN"}
    assert found["graphs"].not_run == "no GPU here"
    assert found["environment"].said.startswith("device cpu, torch ")
    assert "no GPU here" in (tmp_path / gpu_lane.SUMMARY).read_text()
    with tarfile.open(tmp_path / NAME) as archive:
        assert {"steps.jsonl", "environment/environment.json", "summary.txt"} <= set(archive.getnames())


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_lane.torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(main, [str(tmp_path)])
    assert done.exit_code == 1
    assert "--rehearse" in done.output
    assert "no such step" in CliRunner().invoke(main, [str(tmp_path), "--rehearse", "--steps", "none"]).output


def test_too_little_time_is_a_reason(tmp_path: Path) -> None:
    """And another call has time for it."""
    steps = [step("long", "", seconds=TOTAL_SECONDS / 2, least=60.0)]
    lines = run_lane(steps, place(tmp_path), total=10.0, digest="a")
    assert lines[0].verdict == "NOT RUN"
    assert lines[0].not_run == "10 s were left for it, and it wants 60; call again"
    assert verdicts(run_lane(steps, place(tmp_path), total=100.0, digest="a")) == {"long": "PASS"}
