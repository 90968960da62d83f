"""Regressions that were put in are called by their right names in the summary.

Every case is really judged; the baseline is of the right package on the same cases. `python ci/regressions.py` does the
same, and a kernel that is twice as slow, through the commands that users type.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

import moe_fast
from moe_ref.contract.vocabulary import Verdict
from moe_ref.records.schema import CaseLine, to_number
from moe_ref.records.store import Run, read_run
from moe_ref.report.baseline import baseline_of
from moe_ref.report.compare import compare
from moe_ref.report.head import exit_code, head_lines
from moe_ref.report.summary import summary
from moe_ref.score.schema import Patch
from moe_ref.score.seed import seed
from moe_ref.tolerances.load import Tolerances, default_path, load_tolerances
from moe_ref.tolerances.numbers import numbers_of
from tests.command_line import command
from tests.in_process import judged
from tests.made_records import make_run

CASES = ("v1-T17.H80.I72.E5.K3-bf16-norm", "v1-T8.H64.I64.E8.K2-fp32-norm-empty-tp2")
DROPPED_TAIL = Patch(file="moe_fast/kernels/gate_up.py", old="range(0, hidden_size, BLOCK_H)",
                     new="range(0, hidden_size // BLOCK_H * BLOCK_H, BLOCK_H)")


def recorded(lines: Sequence[CaseLine], tolerances: Tolerances, lane: str = "") -> Run:
    """The lines as a run that was judged with these tolerances."""
    run = make_run(*lines)
    numbers = {path: to_number(value) for path, value in numbers_of(tolerances.file).items()}
    run.header = msgspec.structs.replace(run.header, tolerances=numbers, tolerances_digest=tolerances.digest, lane=lane)
    return run


@pytest.fixture(scope="module")
def right() -> list[CaseLine]:
    """What the right package is accepted with."""
    lines = [judged(moe_fast, case, runs=1) for case in CASES]
    assert [line.verdict for line in lines] == [Verdict.PASS] * len(CASES), [line.reason for line in lines]
    return lines


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[CaseLine]:
    """What a copy of moe_fast that drops the tail of K records, in children that know it under another name."""
    seed([DROPPED_TAIL], tmp_path)
    copy = (tmp_path / "moe_fast").rename(tmp_path / "moe_without_tail")
    for source in copy.rglob("*.py"):
        source.write_text(re.sub(r"\bmoe_fast\.", "moe_without_tail.", source.read_text()))
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--lanes", "1", "--runs", "1", "--record", str(tmp_path / "run")]
    assert command("verify", "moe_without_tail", *(word for case in CASES for word in ("--case", case)), *options) == 1
    return [read_run(tmp_path / "run").cases[case] for case in CASES]


def said(run: Run, before: Run) -> tuple[list[str], str, int]:
    """Head lines, summary and exit code against the accepted run."""
    baseline = baseline_of(before)
    comparison = compare(run, baseline)
    head = head_lines(run, comparison, baseline)
    return list(head), summary(run, head, comparison), exit_code(run, comparison)


def test_a_tile_that_drops_the_tail_of_k_is_named_with_stage_and_fault(right: list[CaseLine],
                                                                       broken: list[CaseLine]) -> None:
    """K = 80 in blocks has a tail, K = 64 has none: that case stays right."""
    head, text, code = said(recorded(broken, load_tolerances()), recorded(right, load_tolerances()))
    assert code == 1
    assert "1 new failure, 0 fixed, coverage -0 +0" in head[0]
    assert head[3].startswith("first 1 new failure starts in act; looks like `")
    assert re.search(r"last \d+ columns of K left out of gate and up` \(explains (9\d|100) %\)", head[3])
    assert head[3].endswith(f"repro: {broken[0].replay}")
    assert text.startswith("```text\n" + "\n".join(head))


def test_a_looser_constant_is_named_with_its_effect(right: list[CaseLine], tmp_path: Path) -> None:
    """The whole file with one constant raised, and cases that are judged with it: all pass, with more room."""
    text = default_path().read_text()
    assert text.count("{sigmas_factor: 3.0,") == 1
    path = tmp_path / "tolerances.yaml"
    path.write_text(text.replace("{sigmas_factor: 3.0,", "{sigmas_factor: 6.0,"))
    looser = load_tolerances(path)
    lines = [judged(moe_fast, case, runs=1, tolerances=looser) for case in CASES]
    head, text, code = said(recorded(lines, looser), recorded(right, load_tolerances()))
    assert [line.verdict for line in lines] == [Verdict.PASS] * len(CASES), [line.reason for line in lines]
    assert code == 1
    assert "bounds looser: checks.stage.sigmas_factor 3 -> 6, 0 new failures" in head[0]
    assert re.search(r"first nothing failed, but bounds are looser than accepted: checks\.stage\.sigmas_factor 3 -> 6 "
                     r"\([1-9]\d* of \d+ ratios fell, to 0\.\d+ of what they were in the median\)", head[3])
    assert "## Bounds looser than accepted: 1" in text


def test_a_lost_lane_is_named_with_its_cases(right: list[CaseLine]) -> None:
    """Two lanes were accepted as one; one of them did not report."""
    both, one = recorded(right, load_tolerances(), "cpu+gpu1"), recorded(right[:1], load_tolerances(), "cpu")
    head, text, code = said(one, both)
    assert code == 1
    assert "coverage -1 (lane gpu1 lost) +0" in head[0]
    assert head[3].startswith("first nothing failed, but lane gpu1 lost: 1 case of the baseline did not run")
    assert "| lane gpu1 lost | 1 |" in text
