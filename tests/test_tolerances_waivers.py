"""Protects waivers: one excuses the failure that it names until its last day, and nothing else."""

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_ref.contract.vocabulary import Stage, Verdict
from moe_ref.records.schema import CaseLine, StageResult
from moe_ref.tolerances.load import default_path, load_tolerances
from moe_ref.tolerances.waivers import Waiver, find
from moe_ref.verify.judge import Judgement
from moe_ref.verify.waived import speaks_for_all, waived
from tests.in_process import judged
from tests.subjects.base import TorchMoE

CASE, TODAY = "v1-T5.H16.I24.E4.K2-fp32", date(2026, 12, 1)
WAIVER = Waiver(cases="v1-T5.*-fp32*", implementation="Halved", stage=Stage.ACT, issue=12, expiry=TODAY, cause="halves")
MISMATCH = Judgement(Verdict.MISMATCH, "act: 3x over bound", Stage.ACT)


def result(stage: Stage, ratio: float) -> StageResult:
    """The numbers of one stage."""
    return StageResult(stage=stage, ratio=ratio, num_checked=1, num_bad=int(ratio > 1))


@pytest.mark.parametrize(("case_id", "implementation", "stage", "today", "found"), [
    (CASE, "Halved", Stage.ACT, TODAY, True), (CASE + "-tp2", "Halved", Stage.ACT, TODAY, True),
    (CASE, "Halved", None, TODAY, True), (CASE, "Halved", Stage.ACT, date(2026, 12, 2), False),
    (CASE, "Halved", Stage.DOWN, TODAY, False), (CASE, "halved", Stage.ACT, TODAY, False),
    ("v1-T55.H16.I24.E4.K2-fp32", "Halved", Stage.ACT, TODAY, False),
    ("v1-T5.H16.I24.E4.K2-bf16", "Halved", Stage.ACT, TODAY, False),
])
def test_a_waiver_is_found_for_what_it_names(case_id: str, implementation: str, stage: Stage | None, today: date,
                                             found: bool) -> None:
    """Case by pattern, implementation and stage by name, up to its last day."""
    assert find((WAIVER,), case_id, implementation, stage, today) == (WAIVER if found else None)


def find_act(stage: Stage | None) -> Waiver | None:
    """A case with a waiver for failures at act."""
    return WAIVER if stage in (None, Stage.ACT) else None


@pytest.mark.parametrize(("stages", "verdict"), [
    ((result(Stage.ACT, 3.0), result(Stage.DOWN, 0.5)), Verdict.KNOWN_FAILURE),
    # The output and gradients fail with what comes before them.
    ((result(Stage.ACT, 3.0), result(Stage.OUTPUT, 3.0), result(Stage.GRAD_X, 3.0)), Verdict.KNOWN_FAILURE),
    # down is judged from the subject's own activations: a failure there is another one.
    ((result(Stage.ACT, 3.0), result(Stage.DOWN, 1.1)), Verdict.MISMATCH),
], ids=["act alone", "what follows", "a second failure"])
def test_only_what_is_waived_is_excused(stages: tuple[StageResult, ...], verdict: Verdict) -> None:
    """A second failure behind a known one stays red."""
    assert waived(MISMATCH, stages, 1.0, find_act).verdict is verdict


@pytest.mark.parametrize("verdict", [one for one in Verdict if one is not Verdict.MISMATCH])
def test_a_waiver_excuses_mismatches_only(verdict: Verdict) -> None:
    """A crash, a hang or a layer of the wrong shape is never what was attributed to rounding."""
    judgement = Judgement(verdict, "another", Stage.ACT)
    assert waived(judgement, (), 1.0, find_act) == judgement


def test_a_failure_elsewhere_is_not_excused() -> None:
    """The waiver is for act."""
    judgement = replace(MISMATCH, first_stage=Stage.DOWN)
    assert waived(judgement, (result(Stage.DOWN, 3.0),), 1.0, find_act) == judgement


PASS, KNOWN = Judgement(Verdict.PASS), replace(MISMATCH, verdict=Verdict.KNOWN_FAILURE)


@pytest.mark.parametrize(("judgements", "index", "verdict"), [
    ([PASS, PASS], 0, Verdict.UNEXPECTED_PASS), ([PASS, KNOWN], 1, Verdict.KNOWN_FAILURE),
    ([KNOWN, MISMATCH], 1, Verdict.MISMATCH), ([PASS, MISMATCH], 1, Verdict.MISMATCH),
    ([Judgement(Verdict.NOT_RUN)] * 2, 0, Verdict.NOT_RUN),
    ([Judgement(Verdict.NONDETERMINISTIC), MISMATCH], 1, Verdict.MISMATCH),
    ([KNOWN, Judgement(Verdict.NONDETERMINISTIC)], 1, Verdict.NONDETERMINISTIC),
], ids=["all pass", "one known", "known, then new", "new", "not run", "other bits, then wrong", "other bits"])
def test_the_worst_run_speaks(judgements: list[Judgement], index: int, verdict: Verdict) -> None:
    """Runs that differ are all judged; only where every one passes is the waiver no longer true."""
    spoken, judgement = speaks_for_all(judgements, find_act)
    assert (spoken, judgement.verdict) == (index, verdict)


def test_a_pass_without_a_waiver_is_a_pass() -> None:
    """Nothing was expected to fail."""
    assert speaks_for_all([PASS], lambda stage: None) == (0, PASS)


class Halved(TorchMoE):
    """A layer whose activations are half of what they should be."""

    def activate(self, *arguments: Any) -> torch.Tensor:
        """Half of the right one."""
        return super().activate(*arguments) / 2


def line(subject: Any, folder: Path, waiver: str, today: date = TODAY) -> CaseLine:
    """The record line of a case under a file with one waiver."""
    path = folder / "tolerances.yaml"
    path.write_text(default_path().read_text().partition("waivers:")[0] + f"waivers:\n- {waiver}\n")
    return judged(subject, CASE, tolerances=load_tolerances(path), today=today)


def waiver_for(name: str, stage: str = "act") -> str:
    """As it stands in the file."""
    return (f"{{cases: '{CASE[:5]}*', implementation: {name}, stage: {stage}, issue: https://tracker.example/12, "
            "expiry: 2026-12-01, cause: activations are halved}")


def test_a_record_says_what_excuses_it(tmp_path: Path) -> None:
    """Issue, last day and cause stand in the reason, and the failure itself behind them."""
    found = line(Halved(), tmp_path, waiver_for("Halved"))
    assert found.verdict == Verdict.KNOWN_FAILURE
    assert found.first_stage == Stage.ACT
    head, failure = found.reason.split("\n")
    assert head == "https://tracker.example/12, waived until 2026-12-01, cause: activations are halved"
    assert failure.startswith("act: ")
    assert found.message.startswith(f"known_failure: {head}\n  | act: ")


def test_the_same_failure_is_red_without_a_waiver_that_counts(tmp_path: Path) -> None:
    """For another stage, another implementation, or after its last day."""
    assert line(Halved(), tmp_path, waiver_for("Halved", "down")).verdict == Verdict.MISMATCH
    assert line(Halved(), tmp_path, waiver_for("moe_fast")).verdict == Verdict.MISMATCH
    assert line(Halved(), tmp_path, waiver_for("Halved"), date(2026, 12, 2)).verdict == Verdict.MISMATCH


def test_a_pass_that_was_to_fail_is_red(tmp_path: Path) -> None:
    """The waiver has outlived its cause and would hide the next failure."""
    found = line(TorchMoE(), tmp_path, waiver_for("TorchMoE"))
    assert found.verdict == Verdict.UNEXPECTED_PASS
    assert found.reason.endswith("cause: activations are halved; the waiver can go")
