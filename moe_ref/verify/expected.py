"""What expectations make of judgements: a known failure is not red, and a pass that was to fail is. Pure, no torch."""

from dataclasses import replace

from moe_ref.contract.vocabulary import Stage, Verdict
from moe_ref.expectations.schema import KnownFailure
from moe_ref.records.schema import StageResult
from moe_ref.verify.judge import Judgement, failing

_SEVERITY = {Verdict.PASS: 3, Verdict.KNOWN_FAILURE: 2, Verdict.NONDETERMINISTIC: 1}
"""A run that is wrong says more than one that differs from it."""

Entries = tuple[KnownFailure, ...]
"""Those that cover the case."""


def excused(judgement: Judgement, entries: Entries, stages: tuple[StageResult, ...] = (),
            ratio_limit: float = 1.0) -> Judgement:
    """A failure as a known one, if an entry excuses it; of a mismatch every stage that fails on its own."""
    is_mismatch = judgement.verdict is Verdict.MISMATCH
    first = judgement.first_stage if is_mismatch else None
    entry = _find(entries, judgement.verdict, first, judgement.reason)
    if entry is None:
        return judgement
    later = own_stages(stages, first, ratio_limit)[1:] if is_mismatch and first is not None else []
    if not all(_find(entries, Verdict.MISMATCH, stage) for stage in later):
        return judgement
    return replace(judgement, verdict=Verdict.KNOWN_FAILURE, reason=f"{entry.words}\n{judgement.reason}")


def own_stages(stages: tuple[StageResult, ...], first: Stage, ratio_limit: float) -> list[Stage]:
    """The first stage of a mismatch and every other that fails on its own.

    The output and gradients are judged from the layer's inputs, so they fail with what comes before them.
    """
    later = [Stage(one.stage) for one in failing(stages, ratio_limit) if one.stage != first]
    return [first] + [stage for stage in later if stage is not Stage.OUTPUT and not stage.is_gradient]


def _find(entries: Entries, verdict: Verdict, stage: Stage | None = None, reason: str = "") -> KnownFailure | None:
    return next((one for one in entries if one.excuses(verdict, stage, reason)), None)


def speaks_for_all(judgements: list[Judgement], entries: Entries) -> tuple[int, Judgement]:
    """Index and judgement of the run that speaks for the case: the first that fails, then the first known to fail.

    That runs differ is said of every one of them, so one that is wrong by itself speaks before those that are not.
    Where all pass although an entry says that they do not, that is unexpected.
    """
    index = min(range(len(judgements)), key=lambda one: _SEVERITY.get(judgements[one].verdict, 0))
    judgement = judgements[index]
    if judgement.verdict is Verdict.PASS and entries:
        return index, Judgement(Verdict.UNEXPECTED_PASS, f"{entries[0].words}; it passes, so the entry can go")
    return index, judgement
