"""Right implementations unlike moe_fast must pass; an accusation here is a defect of the harness.

Same request, measurement and verdict as in a run, without the child process.
"""

import pytest

from moe_ref.contract.vocabulary import Verdict
from tests.in_process import judged
from tests.subjects import right

RIGHT = ("round_each_stage", "gate_up_stored", "fp32_partials", "bf16_weights", "hidden_bf16_weights",
         "bf16_router", "black_box", "topk_reversed", "split_k", "batched", "weight_at_merge", "grouped_mm",
         "hidden_eager_loop", "own_part_first", "collective_only_where_needed", "collective_always",
         "partials_only_in_reduce", "residual_on_rank_zero")

CASES = (
    # Every dtype, on one rank and on several, with shares that are even and uneven.
    "v1-T33.H96.I160.E8.K2-fp32-norm", "v1-T33.H96.I160.E8.K2-fp16-norm-tp2",
    "v1-T33.H96.I160.E8.K2-bf16-norm-tp3",
    "v1-T17.H80.I72.E5.K3-fp32-norm-tp3", "v1-T17.H80.I72.E5.K3-bf16-tp2-split60.40",
    # Routing that rounding can move: ties, near certainty, no tokens for an expert, all of them for one.
    "v1-T33.H96.I160.E8.K2-fp32-norm-ties-tp2", "v1-T21.H130.I50.E16.K4-bf16-norm-ties",
    "v1-T33.H96.I160.E8.K2-bf16-norm-onehot", "v1-T33.H96.I160.E8.K2-fp16-norm-empty-tp2",
    "v1-T33.H96.I160.E8.K2-fp32-norm-allone-tp2", "v1-T64.H64.I128.E4.K2-bf16-norm-zipf-tp4",
    # Router options together with a shared expert and a residual.
    "v1-T33.H96.I160.E8.K2-fp16-sigmoid-norm-eps1em20-bias-g4.2-top2sum-scale2.5-sh83-shgate-res-tp3",
    "v1-T21.H130.I50.E16.K4-fp32-norm-gelu-sh28-shgelu-res-tp2", "v1-T17.H80.I72.E5.K3-bf16-gelutanh-outlier",
    # Many experts of few rows each, and many ranks of few columns each.
    "v1-T19.H48.I33.E64.K8-bf16-norm", "v1-T19.H48.I33.E8.K8-bf16-norm-tp8",
    # A gated shared row near a power of two: half an ulp after the gate is more than the gate times half an ulp.
    "v1-T140.H64.I65.E3.K2-fp16-gelutanh-sh35-shgate-shgelutanh-zipf-tp2",
    # The edges: no token, one token, a dense layer, a residual larger than the sum it is added to.
    "v1-T0.H64.I96.E4.K2-bf16-norm-tp2", "v1-T1.H64.I96.E4.K2-fp32-norm-tp4", "v1-T40.H72.I90-bf16-tp2",
    "v1-T40.H72.I90-fp32-res-tp4", "v1-T12.H128.I64.E4.K2-fp16-norm-outlier-tp2",
)


PAIRS = [(name, case_id) for i, name in enumerate(RIGHT) for case_id in CASES[i % 3::3]]
"""Every third case of each; `moe-ref score` runs them all through the smoke tier."""


@pytest.mark.sampled(every=6, each="name")
@pytest.mark.parametrize(("name", "case_id"), PAIRS)
def test_a_right_implementation_passes(name: str, case_id: str) -> None:
    line = judged(getattr(right, name), case_id)
    assert line.verdict == Verdict.PASS, line.message
