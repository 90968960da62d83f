"""Protects the promise that a token's row does not depend on its batch: tried where declared, a note where not."""

from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
import torch

from moe_ref.contract.case_id import parse_case
from moe_ref.contract.vocabulary import Ranks, Verdict
from moe_ref.records.schema import CaseLine
from moe_ref.tiers.tiers import OTHER_BATCHES, PlannedCase, tier
from moe_ref.verify.child.batches import other_batches, same_rows
from moe_ref.verify.run.batches import LEFT_OUT, SAME, batch_words, left_out
from tests.in_process import judged
from tests.subjects.base import Call, TorchMoE
from tests.subjects.parallel import ParallelMoE

CASE = "v1-T15.H96.I64.E4.K2-fp32-norm"
BATCHES = ("tokens are permuted", "1 token is added", "17 tokens are added")


class RowByRow(TorchMoE):
    """Every product of one row at a time: the same sums, in the same order, whatever else is in the batch."""

    def logits(self, call: Call) -> torch.Tensor:
        return self._each(call.x_TH, call.weights.router_EH)

    def gate_up(self, call: Call, x_RH: torch.Tensor, w13_GIH: torch.Tensor, expert: int) -> torch.Tensor:
        return self._each(x_RH, w13_GIH.flatten(0, 1)).unflatten(1, w13_GIH.shape[:2])

    def down(self, call: Call, act_RI: torch.Tensor, w2_HI: torch.Tensor, expert: int) -> torch.Tensor:
        return self._each(act_RI, w2_HI)

    def _each(self, a_RK: torch.Tensor, w_NK: torch.Tensor) -> torch.Tensor:
        rows = [row_K.float() @ w_NK.float().T for row_K in a_RK]
        return torch.stack(rows) if rows else torch.zeros(0, len(w_NK))


class SplitByBatch(RowByRow):
    """The down product in as many pieces as there are tokens in tens: right, and another order in another batch."""

    def down(self, call: Call, act_RI: torch.Tensor, w2_HI: torch.Tensor, expert: int) -> torch.Tensor:
        pieces = zip(act_RI.tensor_split(1 + len(call.x_TH) // 10, 1), w2_HI.tensor_split(1 + len(call.x_TH) // 10, 1),
                     strict=True)
        return torch.stack([self._each(a, w) for a, w in pieces]).sum(0)


class PlaceMatters(RowByRow):
    """Slots of the first ten tokens are added up from the first on, those of the others from the last."""

    def sum_of_slots(self, rows_TKH: torch.Tensor) -> torch.Tensor:
        first_TH, second_TH, third_TH = rows_TKH.unbind(1)
        early_T1 = torch.arange(len(rows_TKH))[:, None] < 10
        return torch.where(early_T1, first_TH + second_TH + third_TH, third_TH + second_TH + first_TH)


class FewTokens(RowByRow):
    """Has room for 20 tokens."""

    def moe(self, x_TH, *arguments, **options):
        if len(x_TH) > 20:
            raise RuntimeError(f"{len(x_TH)} tokens, but room for 20")
        return super().moe(x_TH, *arguments, **options)


def declared(subject: TorchMoE) -> TorchMoE:
    """The same layer with the promise."""
    subject.CAPABILITIES = replace(subject.CAPABILITIES, batch_invariant=True)
    return subject


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("case", [CASE, CASE + "-tp2", "v1-T15.H96.I64.E4.K2-bf16-norm-sh24-shgate-res-zipf-tp2",
                                  "v1-T15.H96.I64-fp16-res", "v1-T15.H96.I64.E4.K2-bf16-norm-exact-tp2"])
def test_rows_that_are_their_own_pass(case: str) -> None:
    """Injected logits, routing and residual go with their tokens into the other batch."""
    line = judged(declared(RowByRow()), case)
    assert line.verdict == Verdict.PASS, line.message
    assert line.batches == dict.fromkeys(BATCHES, SAME)


@pytest.mark.parametrize(("subject", "differing"), [(SplitByBatch, BATCHES[2:]), (PlaceMatters, BATCHES)])
def test_a_broken_promise_is_named(subject: Callable[[], TorchMoE], differing: tuple[str, ...]) -> None:
    """15 tokens are 2 pieces, as are 16, and 32 are 4; each row is right, so only the promise is broken."""
    line = judged(declared(subject()), CASE.replace("K2", "K3"))
    assert line.verdict == Verdict.NONDETERMINISTIC
    assert line.reason == "declared batch invariant, but " + "; ".join(f"rows differ when {name}" for name in differing)
    assert {name for name, words in line.batches.items() if words != SAME} == set(differing)


def test_a_layer_that_takes_no_other_batch_breaks_it_too() -> None:
    line = judged(declared(FewTokens()), CASE)
    assert line.verdict == Verdict.NONDETERMINISTIC
    assert "RuntimeError: 32 tokens, but room for 20 when 17 tokens are added" in line.reason
    assert judged(FewTokens(), CASE).verdict == Verdict.PASS


def test_a_wrong_number_comes_before_a_broken_promise() -> None:
    """What is wrong is a mismatch, whatever else it is."""

    class Wrong(SplitByBatch):
        def sum_of_slots(self, rows_TKH: torch.Tensor) -> torch.Tensor:
            return rows_TKH[:, :1].sum(1)

    assert judged(declared(Wrong()), CASE).verdict == Verdict.MISMATCH


def test_without_the_promise_it_is_a_note_in_few_cases() -> None:
    """Where a tier asks the rows are compared and recorded, and the verdict stays; elsewhere nobody asks."""
    asked, other = judged(SplitByBatch(), CASE, other_batches=True), judged(SplitByBatch(), CASE)
    assert (asked.verdict, other.verdict) == (Verdict.PASS, Verdict.PASS)
    assert asked.batches == {**dict.fromkeys(BATCHES, SAME), "17 tokens are added": "rows differ"}
    assert other.batches == {}
    assert batch_words(False, [asked, other]) == [
        "batch invariance, not declared: of 1 cases in other batches rows differ in 1 where 17 tokens are added"]


@pytest.mark.parametrize(("case", "ranks", "words"), [
    (CASE + "-bwd", Ranks.LOCAL, "gradients of parameters are sums over the batch"),
    (CASE + "-tp2", Ranks.GLOO, "virtual ranks say the same"),
    (CASE + "-ep2-tokensep", Ranks.LOCAL, "which rank holds a token depends on the batch"),
    (CASE + "-ep2-copy0.1", Ranks.LOCAL, "which copy of an expert serves a token depends on its row"),
    (CASE + "-cap5", Ranks.LOCAL, "a capacity counts the whole batch"),
    ("v1-T0.H96.I64.E4.K2-fp32-norm", Ranks.LOCAL, "no token"),
    (CASE + "-tp2-ep2", Ranks.LOCAL, ""),
])
def test_what_is_left_out_says_why(case: str, ranks: Ranks, words: str) -> None:
    capabilities = declared(ParallelMoE()).CAPABILITIES
    planned = PlannedCase(case=parse_case(case), purpose="test", ranks=ranks)
    assert left_out(planned, capabilities) == words
    undeclared = replace(capabilities, batch_invariant=False)
    assert left_out(planned, undeclared) == "not declared, and asked in few cases only"
    assert left_out(replace(planned, other_batches=True), undeclared) == words


def test_what_is_left_out_is_recorded_and_counted() -> None:
    subject = declared(ParallelMoE())
    spreads = ("ep2-tokensep", "tp2-reducescatter-tokenstp", "cap5")
    lines = [judged(subject, f"{CASE}-{spread}") for spread in spreads]
    assert [line.batches for line in lines] == [{LEFT_OUT: "which rank holds a token depends on the batch"}] * 2 + [
        {LEFT_OUT: "a capacity counts the whole batch"}]
    assert batch_words(True, lines) == [
        "batch invariance, declared: left out 2 (which rank holds a token depends on the batch), "
        "1 (a capacity counts the whole batch)"]


def test_records_hold_the_words() -> None:
    """What a report reads is what was found."""
    line = judged(declared(RowByRow()), CASE)
    assert msgspec.json.decode(msgspec.json.encode(line), type=CaseLine).batches == line.batches


def test_smoke_asks_whatever_is_declared() -> None:
    """So that a record of any implementation says what holds of it."""
    asked = {one.case_id for one in tier("smoke").cases if one.other_batches}
    assert asked == set(OTHER_BATCHES)


def test_the_batches_hold_every_token_and_move_most() -> None:
    batches = other_batches(parse_case("v1-T33.H8.I8.E4.K2-fp32").problem)
    token_T = torch.arange(33)
    order_T = batches["tokens are permuted"]
    assert torch.equal(order_T.sort().values, token_T)
    assert (order_T != token_T).double().mean() > 0.8
    assert [len(batches[name]) for name in BATCHES] == [33, 34, 50]
    assert all(torch.equal(batches[name][:33], token_T) for name in BATCHES[1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_compared_by_their_bits(dtype: torch.dtype) -> None:
    """A last bit and the sign of a zero count; one NaN is like another; another shape or dtype is no copy."""
    first_TH = torch.tensor([[1.0, 0.0], [torch.nan, torch.inf]], dtype=dtype)
    token_T = torch.tensor([1, 0, 1])
    assert same_rows(first_TH, first_TH[token_T], token_T)
    for column, value in ((0, 1.0 + torch.finfo(dtype).eps), (1, -0.0)):
        changed_TH = first_TH[token_T]
        changed_TH[1, column] = value
        assert not same_rows(first_TH, changed_TH, token_T)
    assert not same_rows(first_TH, first_TH, token_T)
    other = torch.float32 if dtype != torch.float32 else torch.float64
    assert not same_rows(first_TH, first_TH[token_T].to(other), token_T)
