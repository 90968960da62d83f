"""A token's bits do not depend on the rest of the batch where that is declared; the tiles of a GPU, run by the
interpreter, show that they otherwise do.
"""

import pytest
import torch

import moe_fast
from moe_fast import invariant
from moe_fast.architecture import assuming
from moe_fast.invariance import batch_invariant
from moe_fast.tiles import Load, gemm_tile
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.vocabulary import Verdict
from moe_ref.inputs.build import build_inputs
from moe_ref.inputs.shards import build_shards
from moe_ref.verify.run.batches import SAME
from tests.in_process import judged
from tests.test_gpu_tiles import on_gpu

LAYER = "H208.I160.E4.K2-bf16-norm-sh96-shgate"
LONG = "H512.I160.E4.K2-fp16-norm-outlier"
"""Long sums with outliers are not exact in fp32; fp16 shows more of that than bf16."""


def first_rows(tokens: int, rows: int = 1) -> torch.Tensor:
    """The results of the first tokens in a batch of so many."""
    case = parse_case(f"v1-T256.{LONG}")
    x_TH, (weights,) = build_inputs(case.problem).x_TH, build_shards(case.problem, case.parallel)
    return moe_fast.moe(x_TH[:tokens].contiguous(), weights, case.problem.spec)[:rows]


def test_rows_have_the_same_bits_in_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """From one token to 256, which take four different tiles; by default sums are cut elsewhere, and bits differ."""
    on_gpu(monkeypatch, multiprocessors=1)  # which this layer fills, so that tiles follow the rows alone
    assert not torch.equal(first_rows(32, rows=32), first_rows(256, rows=32))
    with batch_invariant():
        alone_H = first_rows(1)
        assert all(torch.equal(alone_H, first_rows(tokens)) for tokens in (2, 40, 110, 256))
        assert torch.equal(first_rows(32, rows=32), first_rows(256, rows=32))


def test_no_tile_follows_the_batch_on_a_gpu_that_is_not_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs take narrower tiles, of the router too; how many there are must not follow the tokens then."""
    used, seen = on_gpu(monkeypatch, multiprocessors=4), []
    with batch_invariant():
        alone_H = first_rows(1)
        for tokens in (1, 40, 256):
            used.clear()
            assert torch.equal(first_rows(tokens), alone_H)
            seen.append(set(used))
    assert seen[0] == seen[1] == seen[2]


def test_the_tile_is_one_for_all() -> None:
    """Whatever number of rows; outside, it follows them again."""
    def tiles() -> int:
        with assuming("sm_90"):
            return len({gemm_tile(torch.device("meta"), torch.bfloat16, Load(8 * rows, 8), 4096, 1792, kernel="down")
                        for rows in (1, 30, 64, 999)})

    with batch_invariant():
        assert tiles() == 1
    assert tiles() == 4


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("case", [f"v1-T33.{LAYER}", f"v1-T5.{LAYER}-tp2",
                                  "v1-T17.H96.I80.E8.K3-fp32-sigmoid-norm-ep2"])
def test_the_declared_implementation_keeps_its_promise(case: str) -> None:
    """The harness permutes the batch and adds tokens to it."""
    found = judged(invariant, case, runs=1)
    assert found.verdict == Verdict.PASS, found.reason
    assert len(found.batches) == 3
    assert set(found.batches.values()) == {SAME}
