"""Protects `verify --ranks torchrun`: real torchrun on one host and on two, failures that are named, a clear end."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_ref.cli.main import main
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Ranks
from moe_ref.records.store import Run, read_run
from moe_ref.tiers.tiers import PlannedCase
from moe_ref.verify.child.torchrun_rank import Hello
from moe_ref.verify.run.case_runner import missing_devices
from moe_ref.verify.run.torchrun import check_hosts

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
               "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def _torchrun(ranks: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
               "-m", "moe_ref", "verify", *arguments, "--ranks", "torchrun", "--device", "cpu"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT,
                          env=ENVIRONMENT | environment)


def _options(cases: list[str], record: Path) -> list[str]:
    return [*(f"--case={case}" for case in cases), f"--record={record}"]


def _verdicts(run: Run) -> dict[str, str]:
    return {case: line.verdict for case, line in run.cases.items()}


LAYER = "H32.I48.E4.K2-bf16-norm"
SPREAD = [f"v1-T5.{LAYER}-tp2", f"v1-T5.{LAYER}-tp3-split3.1.2", f"v1-T5.{LAYER}-tp4-gather",
          f"v1-T5.{LAYER}-tp2-ep2-reducescatter-tokensboth-share3.0.1.1", f"v1-T5.{LAYER}-ep2-tokensep",
          f"v1-T5.{LAYER}-tp4-allreducerows", f"v1-T5.{LAYER}", f"v1-T3.{LAYER}-tp2-ep2-reducescatter-tokensboth-bwd"]


@pytest.mark.nightly("a run under torchrun that passes, fails and hangs is there by default")
def test_cases_of_one_to_four_ranks_on_four(tmp_path: Path) -> None:
    """Every case takes as many ranks as it needs; one that needs more is not run, and says how many there are."""
    done = _torchrun(4, "moe_ref", *_options([*SPREAD, f"v1-T5.{LAYER}-tp8"], tmp_path))
    assert done.returncode == 0, done.stderr
    assert "1 cases not_run: torchrun started 4 ranks, 8 needed" in done.stdout
    assert "8 pass, 1 not_run; 8 of 9 executed" in done.stdout
    run = read_run(tmp_path)
    assert _verdicts(run) == dict.fromkeys(SPREAD, "pass") | {f"v1-T5.{LAYER}-tp8": "not_run"}
    assert run.header.environment["ranks"] == "4"
    assert re.fullmatch(r"\S+: ranks 0-3", run.header.environment["hosts"])
    line = run.cases[SPREAD[0]]
    assert line.ranks == "torchrun"
    assert line.guard["process"].startswith("torchrun rank: no protection against hangs and crashes")
    assert line.same_bits
    assert line.replay.startswith(f"torchrun --nproc-per-node 2 -m moe_ref replay {SPREAD[0]} --impl moe_ref --ranks")


# By number of tokens: the verdict, and words of its reason.
ENDS = {
    2: ("crash", "RuntimeError: boom on rank one [on rank 1]"),
    3: ("pass", ""),
    4: ("crash", "rank 1 returned, but ranks [0, 2] wait in all_reduce((4, 32), 'torch.bfloat16') #0 of ranks [0, 1"),
    5: ("crash", "rank 1 issued all_reduce((6, 32), 'torch.bfloat16'), but ranks [0, 2] issued all_reduce((5, 32)"),
    6: ("pass", ""),
    7: ("hang", "rank 1 of 3 did not answer within 8 s; ranks [0, 2] wait in all_reduce((7, 32), 'torch.bfloat16')"),
    8: ("not_run", f"the run ended with v1-T7.{LAYER}-tp3, from which ranks did not come back"),
}


def test_a_failure_is_named_and_the_next_case_runs_until_a_rank_is_lost(tmp_path: Path) -> None:
    """Ranks that failed meet in a new world; one that never comes back ends the run, and all processes with it."""
    cases = {tokens: f"v1-T{tokens}.{LAYER}-tp3" for tokens in ENDS}
    done = _torchrun(3, "tests.subjects.torchrun:wrong_by_tokens", *_options(list(cases.values()), tmp_path),
                     "--time-limit=12")
    assert done.returncode == 1, done.stderr
    assert "2 pass, 3 crash, 1 hang, 1 not_run; 6 of 7 executed" in done.stdout
    run = read_run(tmp_path)
    for tokens, (verdict, words) in ENDS.items():
        line = run.cases[cases[tokens]]
        assert line.verdict == verdict, line.message
        # Making the inputs takes a part of the limit.
        assert words in re.sub(r"within [78]\S* s", "within 8 s", line.reason)
    assert run.end is not None
    assert run.end.exit_code == 1


@pytest.mark.nightly("a run under torchrun that passes, fails and hangs is there by default")
def test_a_rank_that_dies_leaves_a_record_to_resume(tmp_path: Path) -> None:
    """torchrun ends the other ranks; what is recorded stays, and the case of the death is run again."""
    cases = [f"v1-T{tokens}.{LAYER}-tp2" for tokens in (2, 3)]
    arguments = ["tests.subjects.torchrun:dies_when_told", *_options(cases, tmp_path)]
    died = _torchrun(2, *arguments, RANK_ONE_DIES="1")
    assert died.returncode == 1, died.stderr
    assert "recorded cases are kept, --resume goes on" in died.stderr
    run = read_run(tmp_path)
    assert _verdicts(run) == {cases[0]: "pass"}
    assert run.end is None
    resumed = _torchrun(2, *arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert _verdicts(read_run(tmp_path)) == dict.fromkeys(cases, "pass")


def _no_hosts() -> str:
    """Why this system cannot be two hosts; "" if it can."""
    if missing := [tool for tool in ("unshare", "nsenter", "ip") if not shutil.which(tool)]:
        return f"{', '.join(missing)} not found"
    tried = subprocess.run("unshare --user --map-root-user --net --uts --mount ip link add one type veth peer name two",
                           shell=True, capture_output=True, text=True, check=False)
    return tried.stderr.strip()


@pytest.mark.nightly("a run under torchrun that passes, fails and hangs is there by default")
def test_two_hosts(tmp_path: Path) -> None:
    """The command that the document names: two network namespaces, two ranks in each, groups across both."""
    if reason := _no_hosts():
        pytest.skip(f"NOT RUN, this system has no network namespaces: {reason}")
    text = (ROOT / "docs" / "parallel.md").read_text()
    command = re.findall(r"^bash tests/two_hosts\.sh (?:.*\\\n)*.*$", text, re.MULTILINE)
    assert len(command) == 1
    words = [str(tmp_path) if word == "RUN" else word for word in shlex.split(command[0].replace("\\\n", ""))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    run = read_run(tmp_path)
    assert run.header.environment["hosts"] == "first: ranks 0-1, second: ranks 2-3"
    assert list(_verdicts(run).values()) == ["pass", "pass"]
    assert "PASS  moe_fast" in done.stdout


def test_without_torchrun_the_command_is_named(capsys: pytest.CaptureFixture[str],
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """The option alone starts no ranks."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["moe-ref", "replay", SPREAD[0], "--impl", "moe_ref", "--ranks", "torchrun"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "torchrun --nproc-per-node N -m moe_ref verify" in capsys.readouterr().err


def test_a_test_runner_does_not_run_torchruns_cases() -> None:
    """It has no ranks of torchrun's to give; NCCL's limits are those of its own ranks."""
    planned = PlannedCase(case=parse_case(SPREAD[0]), purpose="", ranks=Ranks.TORCHRUN)
    assert missing_devices(planned, "cpu", 0).startswith("torchrun ranks need a run that torchrun started")
    assert missing_devices(planned, "cpu", 1) == "torchrun started 1 ranks, 2 needed"
    assert missing_devices(planned, "cpu", 2) == ""


def test_hosts_with_other_sources_are_refused() -> None:
    """One verdict on two versions would be on neither."""
    first = Hello(host="a", node=0, torch="2.13.0", source_digest="1234")
    check_hosts([first, first])
    others = {
        "rank 1 on b has source_digest 5678, but rank 0 on a has 1234": {"torch": "2.13.0", "source_digest": "5678"},
        "rank 1 on b has torch 2.12.0, but rank 0 on a has 2.13.0": {"torch": "2.12.0", "source_digest": "1234"},
        "no such thing [rank 1 on b]": {"torch": "2.13.0", "usage_error": "no such thing"},
    }
    for words, fields in others.items():
        with pytest.raises(UsageValueError, match=re.escape(words)):
            check_hosts([first, Hello(host="b", node=1, **fields)])
