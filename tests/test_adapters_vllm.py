"""vLLM's experts on a CPU: its Triton kernel interpreted, its reference in torch, and OpenAI's triton_kernels in it."""

import pytest

from tests.adapter_mistakes import LAYER, require, swapped, verdict

require("vllm.fused_moe")
GPT_OSS = "norm-routerbias-mlpbias-limit7-alpha1.702-up1-large"


@pytest.mark.parametrize("case", [f"{LAYER}.K2-fp32-norm", f"{LAYER}.K4-bf16-{GPT_OSS}-tp2",
                                  f"{LAYER}.K2-fp16-norm-gelutanh", f"{LAYER}.K1-bf16-sigmoid-weightinput",
                                  "v1-T1.H128.I256.E8.K2-bf16-norm", "v1-T0.H128.I256.E8.K2-bf16-norm"])
def test_fused_experts(case: str) -> None:
    """Products in tf32, biases and clamp on two ranks, weights on the input, a token of which nothing is sorted."""
    assert verdict("vllm.fused_moe", case) == "pass"


def test_rows_of_ignored_ids_are_added_unwritten() -> None:
    """moe_align_block_size ignores ids that are no expert's, and fused_experts_impl zeroes their rows only where there
    is an expert map."""
    assert verdict("vllm.fused_moe", f"{LAYER}.K2-bf16-norm-holes-exact") == "mismatch merged"


@pytest.mark.parametrize("case", [f"{LAYER}.K2-bf16-norm-tp2", f"{LAYER}.K2-bf16-norm-holes-exact",
                                  f"{LAYER}.K2-fp32-norm-gelutanh", "v1-T0.H128.I256.E8.K2-bf16-norm"])
def test_reference(case: str) -> None:
    """NaiveBatchedExperts, which no id without an expert reaches."""
    assert verdict("vllm.torch", case) == "pass"


@pytest.mark.parametrize("case", [f"{LAYER}.K2-fp32-norm", f"{LAYER}.K4-bf16-{GPT_OSS}-tp2",
                                  f"{LAYER}.K2-fp32-norm-exact"])
def test_triton_kernels_reference(case: str) -> None:
    """gpt-oss is what its swiglu is for."""
    assert verdict("triton_kernels.torch", case) == "pass"


def test_triton_kernels_reference_shifts_rows_by_ids_without_expert() -> None:
    """routing_torch sorts id -1 before all experts and leaves it out of their counts."""
    case = f"{LAYER}.K2-bf16-norm-holes-exact"
    assert verdict("triton_kernels.torch", case) == "unsupported"
    assert verdict("triton_kernels.torch", case, absent_ids=True) == "mismatch act"


@pytest.mark.parametrize(("name", "stage"), [("vllm.fused_moe", "act"), ("vllm.torch", "merged"),
                                             ("triton_kernels.torch", "act")])
def test_a_mistake_of_the_adapter_is_seen(name: str, stage: str) -> None:
    """Up taken for gate, in the first stage after it that is shown."""
    assert swapped(name, f"{LAYER}.K2-bf16-norm") == f"mismatch {stage}"
