"""Defects planted in a copy of moe_fast are reported at the right stage, expert and rank, and replay.

The copy's sources are patched as text and run through the command line, as a user would meet them, in children that
are new for every run: a defect of an expert, one of ranks, one of the router. Many more are in tests/catalogue, for
`moe-ref score`.
"""

import json
import re
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import moe_fast
from tests.command_line import command

CASE = "v1-T33.H96.I160.E8.K2-bf16-norm-res-tp3"


@dataclass(frozen=True)
class Defect:
    """One replaced line of one file, and what the referee must say of it."""

    file: str
    right: str
    wrong: str
    stage: str
    experts: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=lambda: [0, 1, 2])
    case: str = CASE


DEFECTS = {
    # The tail of K is what a wrong loop bound loses; only one expert has it, the others acquit the kernel.
    "last K block dropped for expert 3": Defect(
        "kernels/gate_up.py", "range(0, hidden_size, BLOCK_H)",
        "range(0, hidden_size - (expert == 3).to(tl.int32) * BLOCK_H, BLOCK_H)", "act", experts=[3]),
    "all-reduce left out": Defect(
        "tokens.py", "return leave(part_TH, *rank.with_other_parts)", "return part_TH", "reduced"),
    "ties go to the higher id": Defect(
        "kernels/select.py",
        "tl.min(tl.where(candidates & (ranked == largest[:, None]), index[None, :], NONE), axis=1)",
        "tl.max(tl.where(candidates & (ranked == largest[:, None]), index[None, :], -1), axis=1)", "ids",
        case="v1-T33.H96.I160.E8.K2-bf16-norm-ties-tp3"),
}

OVERRUN = Defect("kernels/grouped.py", "in_rows = position < tl.load(block_row_end + block)",
                 "in_rows = position < tl.load(block_row_end + block) + (tl.load(block_expert + block) == 2)", "")


@pytest.fixture
def broken_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a copy of moe_fast named moe_broken with one defect in it where children find it."""

    def plant(defect: Defect) -> None:
        copy = tmp_path / "moe_broken"
        shutil.copytree(Path(moe_fast.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
        for source in copy.rglob("*.py"):
            source.write_text(re.sub(r"\bmoe_fast\.", "moe_broken.", source.read_text()))
        target = copy / defect.file
        assert target.read_text().count(defect.right) == 1, "the line to break is not there once"
        target.write_text(target.read_text().replace(defect.right, defect.wrong))
        monkeypatch.syspath_prepend(tmp_path)
    return plant


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_found_where_it_is(name: str, broken_package, capsys: pytest.CaptureFixture[str]) -> None:
    defect = DEFECTS[name]
    broken_package(defect)
    assert command("verify", "moe_broken", "--case", defect.case, "--json") == 1
    [line] = json.loads(capsys.readouterr().out)["cases"]
    stage = next(stage for stage in line["stages"] if stage["stage"] == defect.stage)
    assert (line["verdict"], line["first_stage"]) == ("mismatch", defect.stage), line["message"]
    assert stage["bad_experts"] == defect.experts
    assert stage["bad_ranks"] == defect.ranks
    message = line["message"].splitlines()
    assert len(message) <= 10
    assert defect.stage in message[0]
    program, *replay = shlex.split(line["replay"])
    assert (program, replay[0]) == ("moe-ref", "replay")
    assert command(*replay) == 1
    assert capsys.readouterr().out.splitlines()[0] == message[0]


def test_a_race_is_found_where_the_numbers_are_right(broken_package, capsys: pytest.CaptureFixture[str]) -> None:
    """Expert 2 writes one row of expert 3, which then overwrites it: right in this order, a coin toss on a GPU."""
    broken_package(OVERRUN)
    assert command("replay", CASE, "--impl", "moe_broken") == 1
    assert capsys.readouterr().out.startswith("crash: StoreRaceError: kernel gate_up_kernel")


@pytest.mark.nightly("the lane interpreter judges what is copied")
def test_the_copy_itself_is_right(broken_package, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a defect the same copy passes, so it is the defects that are found."""
    broken_package(Defect("layer.py", "DTYPES = (", "DTYPES = (", ""))
    cases = sorted({CASE, *(defect.case for defect in DEFECTS.values())})
    code = command("verify", "moe_broken", "--lanes", "1", *(word for case in cases for word in ("--case", case)))
    assert code == 0, capsys.readouterr()
