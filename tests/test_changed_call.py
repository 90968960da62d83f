"""What an implementation keeps from call to call shows, in the case itself and whatever cases were before it."""

from typing import Any

import pytest
import torch

from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Verdict
from moe_ref.tiers.tiers import tier
from moe_ref.verify.child import job
from moe_ref.verify.child.changed import asks_untraced, changed, precedes
from tests.in_process import judged
from tests.subjects.base import Call
from tests.subjects.whole import WholeSpec

SAME_SHAPE_FIRST = "v1-T33.H96.I160.E8.K2-fp32-norm-tp3"
ANOTHER_SHAPE_BETWEEN = "v1-T33.H96.I160.E8.K2-fp32-norm-tp2"


class ChoiceOfTheFirstCall(WholeSpec):
    """A graph that has captured ids: every call of a shape takes those of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[tuple[int, torch.Size], torch.Tensor] = {}

    def rows(self, call: Call, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        return super().rows(call, self.kept.setdefault((call.rank, ids_TK.shape), ids_TK), weights_TK)


class LastShape(WholeSpec):
    """Sums are scaled for the first call that has another number of tokens than the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.before = 0

    def sum_of_slots(self, rows_TKH: torch.Tensor) -> torch.Tensor:
        is_other, self.before = self.before not in (0, len(rows_TKH)), len(rows_TKH)
        return super().sum_of_slots(rows_TKH) * (1.0 + is_other)


class FirstCall(WholeSpec):
    """The first call of a shape adds to what an autotuner has left."""

    def __init__(self) -> None:
        super().__init__()
        self.tuned: set[torch.Size] = set()

    def sum_of_slots(self, rows_TKH: torch.Tensor) -> torch.Tensor:
        is_first = rows_TKH.shape not in self.tuned
        self.tuned.add(rows_TKH.shape)
        return super().sum_of_slots(rows_TKH) * (1.0 + is_first)


SEEN = {
    ChoiceOfTheFirstCall: {SAME_SHAPE_FIRST: Verdict.MISMATCH, ANOTHER_SHAPE_BETWEEN: Verdict.PASS},
    LastShape: {SAME_SHAPE_FIRST: Verdict.PASS, ANOTHER_SHAPE_BETWEEN: Verdict.MISMATCH},
    FirstCall: {SAME_SHAPE_FIRST: Verdict.PASS, ANOTHER_SHAPE_BETWEEN: Verdict.MISMATCH},
}
"""One call cannot show all of them: it hides a wrong first call where it is the first itself."""


@pytest.mark.sampled(every=2, each="subject")
@pytest.mark.parametrize("case", [SAME_SHAPE_FIRST, ANOTHER_SHAPE_BETWEEN])
@pytest.mark.parametrize("subject", SEEN)
def test_state_is_seen_where_the_call_comes(subject: type[WholeSpec], case: str) -> None:
    assert judged(subject(), case).verdict == SEEN[subject][case]


@pytest.mark.parametrize("subject", [ChoiceOfTheFirstCall, LastShape])
def test_runs_of_one_input_do_not_show_it(subject: type[WholeSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "precedes", lambda case_id, runs: None)
    assert {judged(subject(), case).verdict for case in SEEN[subject]} == {Verdict.PASS}


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 33])
def test_inputs_of_the_call(num_tokens: int) -> None:
    """As many tokens before the first run, fewer before the second; numbers and their order are others."""
    x_TH = torch.arange(1.0, num_tokens * 3 + 1).view(num_tokens, 3)
    ids_TK = torch.arange(num_tokens)[:, None]
    handed = {"x_TH": x_TH, "ids_TK": ids_TK, "logits_TE": None}
    first, second = changed(handed, 0), changed(handed, 1)
    assert first["logits_TE"] is second["logits_TE"] is None
    assert torch.equal(first["x_TH"], -x_TH.flip(0))
    assert torch.equal(first["ids_TK"], ids_TK.flip(0))
    assert len(second["x_TH"]) == len(second["ids_TK"]) == {0: 0, 1: 2, 2: 1, 33: 16}[num_tokens]


def test_both_places_are_taken_in_every_tier() -> None:
    """By the case alone, so that a replay does what the run did; never where a case runs once."""
    for name in ("smoke", "quick"):
        places = [precedes(one.case_id, 2) for one in tier(name).cases]
        for wanted in (0, 1):
            assert 1 / 8 < sum(place == wanted for place in places) / len(places) < 3 / 8
    assert precedes(SAME_SHAPE_FIRST, 1) is None


class OtherOrderUntraced(WholeSpec):
    """Adds slots from the last one where nobody looks, as a fused path may."""

    factor = 1.0

    def moe(self, *arguments: Any, trace: Trace | None = None, **options: Any) -> torch.Tensor:
        self.is_traced = trace is not None
        return super().moe(*arguments, trace=trace, **options)

    def sum_of_slots(self, rows_TKH: torch.Tensor) -> torch.Tensor:
        if self.is_traced:
            return super().sum_of_slots(rows_TKH)
        return self.factor * super().sum_of_slots(rows_TKH.flip(1))


class WrongUntraced(OtherOrderUntraced):
    """A path that no trace looks into, and that is wrong."""

    factor = 1.01


@pytest.mark.parametrize(("subject", "verdict"), [(OtherOrderUntraced, Verdict.PASS),
                                                  (WrongUntraced, Verdict.MISMATCH)])
def test_what_runs_without_a_trace_is_judged_by_its_output(subject: type[WholeSpec], verdict: Verdict) -> None:
    """Other bits are no fault there, since a trace may ask for another path; a wrong output is."""
    case = "v1-T19.H48.I33.E64.K8-fp32-norm-ties-tp2"
    assert asks_untraced(case)
    line = judged(subject(), case)
    assert line.verdict == verdict, line.message
    assert line.same_bits
