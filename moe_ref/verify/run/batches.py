"""Which cases are run in other batches too, and what a summary says of it. Imports no torch."""

from collections import Counter
from collections.abc import Iterable

from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.vocabulary import EXECUTED_VERDICTS, Direction, Ranks, Tokens
from moe_ref.records.schema import CaseLine
from moe_ref.tiers.tiers import PlannedCase

LEFT_OUT = "left out"
SAME = "same bits"


def left_out(planned: PlannedCase, capabilities: Capabilities) -> str:
    """Why a case is not run in other batches, in words; empty where it is."""
    case, router = planned.case, planned.case.problem.spec.router
    reasons = (
        (not capabilities.batch_invariant and not planned.other_batches, "not declared, and asked in few cases only"),
        (planned.ranks is not Ranks.LOCAL, "virtual ranks say the same"),
        (case.direction is not Direction.FORWARD, "gradients of parameters are sums over the batch"),
        (case.parallel.tokens is not Tokens.REPLICATED, "which rank holds a token depends on the batch"),
        (bool(case.parallel.redundant), "which copy of an expert serves a token depends on its row"),
        (router is not None and router.capacity is not None, "a capacity counts the whole batch"),
        (case.problem.num_tokens == 0, "no token"))
    return next((words for applies, words in reasons if applies), "")


def batch_words(declared: bool, lines: Iterable[CaseLine]) -> list[str]:
    """One line on what other batches did, if any were tried, and one that counts what was left out of a declaration."""
    asked, differ, omitted = 0, Counter[str](), Counter[str]()
    for line in (one for one in lines if one.verdict in EXECUTED_VERDICTS):
        if reason := line.batches.get(LEFT_OUT):
            omitted[reason] += 1
        elif line.batches:
            asked += 1
            differ.update(name for name, words in line.batches.items() if words != SAME)
    words, promise = [], "batch invariance, " + ("declared" if declared else "not declared")
    if asked:
        found = ", ".join(f"{count} where {name}" for name, count in differ.items()) or "none"
        words.append(f"{promise}: of {asked} cases in other batches rows differ in {found}")
    if omitted:
        words.append(f"{promise}: left out " + ", ".join(f"{count} ({reason})" for reason, count in omitted.items()))
    return words
