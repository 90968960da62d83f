"""What waivers make of judgements: a known failure is not red, and a pass that was to fail is. Pure, no torch."""

from collections.abc import Callable
from dataclasses import replace

from moe_ref.contract.vocabulary import Stage, Verdict
from moe_ref.records.schema import StageResult
from moe_ref.tolerances.waivers import Waiver
from moe_ref.verify.judge import Judgement, failing

FindWaiver = Callable[[Stage | None], Waiver | None]
"""The waiver of this case for a failure at a stage, at any stage where it is None."""

_SEVERITY = {Verdict.PASS: 3, Verdict.KNOWN_FAILURE: 2, Verdict.NONDETERMINISTIC: 1}
"""A run that is wrong says more than one that differs from it."""


def waived(judgement: Judgement, stages: tuple[StageResult, ...], ratio_limit: float,
           find_waiver: FindWaiver) -> Judgement:
    """A mismatch as a known failure, if its first stage is waived and so is every other that fails on its own.

    The output and gradients are judged from the layer's inputs, so they fail with what comes before them.
    """
    if judgement.verdict is not Verdict.MISMATCH or judgement.first_stage is None:
        return judgement
    waiver = find_waiver(judgement.first_stage)
    later = [Stage(one.stage) for one in failing(stages, ratio_limit) if one.stage != judgement.first_stage]
    own = [stage for stage in later if stage is not Stage.OUTPUT and not stage.is_gradient]
    if waiver is None or not all(find_waiver(stage) for stage in own):
        return judgement
    return replace(judgement, verdict=Verdict.KNOWN_FAILURE, reason=f"{waiver.words}\n{judgement.reason}")


def speaks_for_all(judgements: list[Judgement], find_waiver: FindWaiver) -> tuple[int, Judgement]:
    """Index and judgement of the run that speaks for the case: the first that fails, then the first known to fail.

    That runs differ is said of every one of them, so one that is wrong by itself speaks before those that are not.
    Where all pass although a waiver says that they do not, that is unexpected.
    """
    index = min(range(len(judgements)), key=lambda one: _SEVERITY.get(judgements[one].verdict, 0))
    judgement = judgements[index]
    if judgement.verdict is Verdict.PASS and (waiver := find_waiver(None)) is not None:
        return index, Judgement(Verdict.UNEXPECTED_PASS, f"{waiver.words}; the waiver can go")
    return index, judgement
