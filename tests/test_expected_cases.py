"""Expectations in the flow of a case: which failures become known ones, and the entries that are printed for others."""

from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Stage, Verdict
from moe_ref.expectations.load import Expectations, load_expectations
from moe_ref.expectations.schema import KnownFailure
from moe_ref.records.schema import CaseLine, Implementation, StageResult
from moe_ref.verify.paste import entries_to_paste
from moe_ref.verify.run.children import ChildDied, ChildHung
from tests.in_process import judged
from tests.subjects.base import TorchMoE

CASE, TODAY = "v1-T5.H16.I24.E4.K3-fp32", date(2026, 12, 1)


class Halved(TorchMoE):
    """A layer whose activations are half of what they should be."""

    def activate(self, *arguments: Any) -> torch.Tensor:
        """Half of the right one."""
        return super().activate(*arguments) / 2


class Crashes(TorchMoE):
    """A layer that raises."""

    def activate(self, *arguments: Any) -> torch.Tensor:
        """Never returns."""
        raise RuntimeError("out of memory: 3 GiB")


class WrongShape(TorchMoE):
    """A layer that returns one token less."""

    def moe(self, *arguments: Any, **others: Any) -> torch.Tensor:
        """The right output without its last row."""
        return super().moe(*arguments, **others)[:-1]


class Turns(TorchMoE):
    """A layer that sums slots in another order in each call, though determinism is promised."""

    calls = 0

    def sum_of_slots(self, rows_TKH: torch.Tensor) -> torch.Tensor:
        """From another slot on each time."""
        self.calls += 1
        return super().sum_of_slots(rows_TKH.roll(self.calls, 1))


def line(subject: Any, *entries: KnownFailure) -> CaseLine:
    """The record line of a case under these entries."""
    return judged(subject, CASE, expectations=Expectations(entries))


def entry(verdict: Any = "mismatch", stage: Stage | None = None, contains: str | None = None) -> KnownFailure:
    """For the case."""
    return KnownFailure(cases=CASE, verdict=verdict, stage=stage, contains=contains, reason="activations are halved",
                        link="https://tracker.example/12", expires=TODAY)


def test_a_record_says_what_excuses_it() -> None:
    """Link, last day and reason stand in front, and the failure itself behind them."""
    found = line(Halved(), entry(stage=Stage.ACT))
    assert found.verdict == Verdict.KNOWN_FAILURE
    assert found.first_stage == Stage.ACT
    head, failure = found.reason.split("\n")
    assert head == "https://tracker.example/12, mismatch at act expected until 2026-12-01: activations are halved"
    assert failure.startswith("act: ")
    assert found.message.startswith(f"known_failure: {head}\n  | act: ")
    assert found.replay.endswith("--device cpu"), "a replay shows the failure itself"


def test_the_same_failure_is_red_without_an_entry_for_it() -> None:
    """Of another stage, or another verdict."""
    assert line(Halved(), entry(stage=Stage.DOWN)).verdict == Verdict.MISMATCH
    assert line(Halved(), entry("crash")).verdict == Verdict.MISMATCH


@pytest.mark.parametrize(("subject", "verdict", "contains"), [
    (Crashes(), "crash", "out of memory"), (WrongShape(), "struct", "(4, 16)"),
    (Turns(), "nondeterministic", "differ between two runs")])
def test_what_is_no_mismatch_is_excused_too(subject: Any, verdict: str, contains: str) -> None:
    """A crash, a promise about shapes that was broken, runs that differ; another one is red."""
    found = line(subject, entry(verdict, contains=contains))
    assert found.verdict == Verdict.KNOWN_FAILURE
    assert contains in found.reason.split("\n")[1]
    assert line(subject, entry(verdict, contains="another")).verdict == verdict


@pytest.mark.parametrize(("raised", "verdict"), [
    (ChildDied("child was killed by signal 9"), "crash"), (ChildHung("child was waiting"), "hang")])
def test_a_child_that_is_gone_is_excused_too(raised: Exception, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no answer to be judged."""
    def ask(*arguments: Any) -> Any:
        raise raised
    monkeypatch.setattr("tests.in_process.InProcess.ask", ask)
    assert line(TorchMoE(), entry(verdict, contains="child was")).verdict == Verdict.KNOWN_FAILURE
    assert line(TorchMoE(), entry(verdict, contains="another")).verdict == verdict


@pytest.mark.parametrize("known", [entry(stage=Stage.ACT), entry("crash"), entry("nondeterministic")])
def test_a_pass_that_was_to_fail_is_red(known: KnownFailure) -> None:
    """The entry has outlived its cause and would hide the next failure."""
    found = line(TorchMoE(), known)
    assert found.verdict == Verdict.UNEXPECTED_PASS
    assert found.reason == f"{known.words}; it passes, so the entry can go"


# --- entries to paste ----------------------------------------------------------------------------

HEAD = "schema: 1\nimplementation: mypkg.layer\nentries:\n"


@pytest.mark.parametrize("subject", [Halved(), Crashes(), WrongShape()])
def test_what_is_printed_to_be_pasted_covers_the_failure(subject: Any, tmp_path: Path) -> None:
    """Once reason and link are filled in, without which it is refused."""
    red = line(subject)
    text = HEAD + "\n".join(entries_to_paste([red, red], Expectations(), 1.0)) + "\n"
    assert f'- cases: "{CASE}"    # and 1 more that fail so\n' in text
    path = tmp_path / "expectations.yaml"
    path.write_text(text.replace('link: "..."', "link: 1"))
    with pytest.raises(UsageValueError, match=r"reason is '...', but should say why"):
        load_expectations(path, "mypkg.layer")
    path.write_text(text.replace('link: "..."', "link: 1").replace('reason: "..."', "reason: known"))
    read = load_expectations(path, "mypkg.layer")
    known = line(subject, *read.entries)
    assert known.verdict == Verdict.KNOWN_FAILURE
    assert entries_to_paste([known, line(TorchMoE(), *read.entries)], read, 1.0) == []


def red(verdict: Verdict, stages: tuple[Stage, ...] = ()) -> CaseLine:
    """A line that fails, at these stages."""
    results = [StageResult(stage=stage, ratio=3.0, num_checked=1, num_bad=1) for stage in stages]
    return CaseLine(run="r", case=CASE, purpose="", implementation=Implementation(name="mypkg.layer", version="1"),
                    ranks="local", device="cpu", verdict=verdict, reason="words [on rank 0]",
                    first_stage=stages[0] if stages else None, stages=results)


def test_stages_that_have_an_entry_are_left_out() -> None:
    """What is missing is the second failure alone; the output fails with what comes before it."""
    mismatch = red(Verdict.MISMATCH, (Stage.ACT, Stage.DOWN, Stage.OUTPUT))
    for entries, missing in (((), ["act", "down"]), ((entry(stage=Stage.ACT),), ["down"])):
        rows = entries_to_paste([mismatch], Expectations(entries), 1.0)
        assert [row.removeprefix("    stage: ") for row in rows if "stage: " in row] == missing


def test_three_distinct_failures_are_shown() -> None:
    """What tells a crash from another is its reason without the rank; a hang is a hang."""
    lines = [red(Verdict.HANG), red(Verdict.CRASH), red(Verdict.CRASH), red(Verdict.NONDETERMINISTIC),
             red(Verdict.STRUCT)]
    rows = [row.strip() for row in entries_to_paste(lines, Expectations(), 1.0)]
    assert [row for row in rows if row.startswith(("verdict", "contains"))] == [
        "verdict: hang", "verdict: crash", 'contains: "words"', "verdict: nondeterministic"]
    assert [row for row in rows if row.startswith("-")][1] == f'- cases: "{CASE}"    # and 1 more that fail so'
