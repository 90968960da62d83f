"""The tier that runs when none is named must catch the classic parallel mistakes at tp 2, and say what they are.

Cases run in the order of the tier until one fails, as a user would read them.
"""

from collections.abc import Callable, Iterator

import pytest
import torch

from moe_ref.contract.comm import Comm
from moe_ref.contract.vocabulary import RED_VERDICTS, Ranks
from moe_ref.records.schema import CaseLine
from moe_ref.tiers.tiers import tier
from moe_ref.verify.run.untried import untried
from tests.in_process import judged
from tests.subjects import mistaken_parallel as mistaken
from tests.subjects import oracle_gradients as gradients
from tests.subjects.parallel_call import ParallelCall

MISTAKES = (
    (mistaken.BiasOnEveryRank, "down", "F01 bias of w2 added by every tp rank"),
    (mistaken.NoReduction, "reduced", "tp.all_reduce of 3168 elements missing"),
    (mistaken.ReducedTwice, "reduced", "F09 sum of the ranks added up again"),
    (mistaken.OverTheOtherGroup, None, "#4 of ranks [0, 2]: rank 2 issued all_reduce((16, 96)"),
    (mistaken.GateOfOneRankUpOfAnother, "act", "K09 gate rows of a rank beside up rows of another explains 100.0 %"),
    (mistaken.GatheredInReverse, "reduced", "parts of the ranks in another order"),
    (mistaken.SharedReducedTwice, "merged", "tp.all_reduce of 3168 elements too many"),
    (mistaken.ResidualPerRank, "reduced", "F02 residual added 2 times explains 99."),
    (gradients.WeightsNotReduced, "grad_router", "grad_router"),
    (gradients.TokensReducedTwice, "grad_x", "grad_x"),
)


def first_failure(subject: object) -> CaseLine:
    """The first failing line of the smoke tier's cases at tp 2 on virtual ranks."""
    cases = [one.case_id for one in tier("smoke").cases if one.case.parallel.tp == 2 and one.ranks is Ranks.LOCAL]
    lines: Iterator[CaseLine] = (judged(subject, case_id, runs=1) for case_id in cases)
    return next(line for line in lines if line.verdict in RED_VERDICTS)


@pytest.mark.sampled(every=5)
@pytest.mark.parametrize(("mistake", "stage", "words"), MISTAKES)
def test_caught_at_two_ranks_and_named(mistake: Callable[[], object], stage: str | None, words: str) -> None:
    """Stage and cause in the message."""
    line = first_failure(mistake())
    assert line.first_stage == stage, line.message
    assert words in line.message, line.message


class NoReductionOverEP(mistaken.ParallelMoE):
    """A layer without further features that leaves its partial sums apart where experts are spread."""

    features = ()

    def sum_over(self, call: ParallelCall, comm: Comm, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if comm is call.groups.ep else super().sum_over(call, comm, tensor)


def test_a_plain_layer_is_tried_under_everything_it_declares() -> None:
    """Cases with features it lacks do not count: what spreads a layer must be tried without them."""
    ran, subject = [], NoReductionOverEP()
    for one in tier("smoke").cases:
        if subject.CAPABILITIES.refusal(one.case, one.ranks, "cpu") is None:
            ran.append(one.case)
    assert untried(subject.CAPABILITIES, ran) == []
    line = first_failure(subject)
    assert "ep.all_reduce of 3168 elements missing" in line.message


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("right", [mistaken.ParallelMoE, gradients.OracleGradients])
def test_the_right_layer_passes_all_of_them(right: Callable[[], object]) -> None:
    """Otherwise the mistakes might not be what was caught."""
    with pytest.raises(StopIteration):
        first_failure(right())
