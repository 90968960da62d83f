"""A long prefill is summed over ranks chunk by chunk, beside the experts of the next chunk."""

import pytest
import torch

import moe_fast
from moe_fast import overlap
from moe_fast.invariance import batch_invariant
from moe_ref import Groups, run_virtual_ranks
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.comm import Comm, CountingComm
from moe_ref.contract.vocabulary import Verdict
from moe_ref.inputs.build import build_inputs
from moe_ref.inputs.shards import build_shards
from tests.in_process import judged

LAYER = "H80.I48.E4.K2-bf16-norm-sh32-shgate-tp2"


def reductions(tokens: int, grad: bool = False, options: str = "") -> tuple[list[list[int]], torch.Tensor]:
    """Elements of every all-reduce of each rank, and the output of rank 0."""
    case = parse_case(f"v1-T{tokens}.{LAYER}{options}")
    x_TH, shards = build_inputs(case.problem).x_TH, build_shards(case.problem, case.parallel)
    x_TH.requires_grad_(grad)

    def body(comm: Comm) -> tuple[list[int], torch.Tensor]:
        counted = CountingComm(comm)
        y_TH = moe_fast.moe(x_TH, shards[comm.rank], case.problem.spec, case.parallel, Groups(tp=counted))
        return [call.num_elements for call in counted.calls if call.operation == "all_reduce"], y_TH.detach()

    found = run_virtual_ranks(2, body)
    return [calls for calls, _ in found], found[0][1]


def test_chunks_are_summed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same elements and, where tiles are the same, the same bits; below two chunks there is one sum."""
    with batch_invariant():
        calls, whole_TH = reductions(21)
        assert calls == [[21 * 80]] * 2
        monkeypatch.setattr(overlap, "CHUNK_TOKENS", 8)
        calls, y_TH = reductions(21)
        assert calls == [[8 * 80, 8 * 80, 5 * 80]] * 2
        assert torch.equal(y_TH, whole_TH)
        assert reductions(15)[0] == [[15 * 80]] * 2


def test_a_recorded_gradient_sees_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks would add up gradients of weights that each has rounded; without recording they come back."""
    monkeypatch.setattr(overlap, "CHUNK_TOKENS", 8)
    assert reductions(21, grad=True)[0] == [[21 * 80]] * 2
    with torch.no_grad():
        assert reductions(21, grad=True)[0] == [[8 * 80, 8 * 80, 5 * 80]] * 2


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("options", ["", "-ep2", "-ep2-copy0.1", "-allreducerows", "-reducescatter",
                                     "-reducescatter-tokenstp"])
def test_the_harness_finds_nothing_wrong(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output, elements sent and equality of ranks, under every schedule that has chunks and some that must not."""
    monkeypatch.setattr(overlap, "CHUNK_TOKENS", 8)
    # Chunks are for calls without a trace, of which a case has one or none.
    monkeypatch.setattr("moe_ref.verify.child.execute.asks_untraced", lambda case_id: True)
    found = judged(moe_fast, f"v1-T21.{LAYER}{options}")
    assert found.verdict == Verdict.PASS, found.reason
