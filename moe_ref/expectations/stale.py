"""Entries that have nothing left to excuse: whoever owns the file should remove them, or mend their pattern."""

from collections.abc import Mapping, Sequence

from moe_ref.contract.vocabulary import EXECUTED_VERDICTS, Verdict
from moe_ref.expectations.schema import covers
from moe_ref.tiers.tiers import MINIMUM_EXECUTED, tier


def stale_entries(entries: Sequence[str], found: Mapping[str, tuple[str, int]]) -> list[str]:
    """A sentence for each entry, counted from 1, that covers no case that ran.

    entries: the cases of each, as patterns. found: all cases of a tier by id, each with its verdict and how often it
    ran. Entries of cases that could not be judged here, for want of a device or of time, are left alone, and so are
    those of cases of other tiers alone.
    """
    sentences = []
    for number, cases in enumerate(entries, 1):
        covered = [one for case, one in found.items() if covers(cases, case)]
        if any(_may_fail(*one) for one in covered) or (not covered and _is_of_another_tier(cases)):
            continue
        idle = f": {len(covered)} {' or '.join(sorted({verdict for verdict, _ in covered}))}" if covered else ""
        sentences.append(f"stale: entry {number} (cases {cases}) covers no case that ran{idle}; "
                         "remove it, or mend its cases")
    return sentences


def _may_fail(verdict: str, runs: int) -> bool:
    """Whether a case ran, or would elsewhere; one that ran and counts as not run, for want of power, did not fail."""
    return verdict in EXECUTED_VERDICTS or verdict == Verdict.HARNESS_ERROR or (verdict == Verdict.NOT_RUN and not runs)


def _is_of_another_tier(cases: str) -> bool:
    return any(covers(cases, one.case_id) for name in MINIMUM_EXECUTED for one in tier(name).cases)
