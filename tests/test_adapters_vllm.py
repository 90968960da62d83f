"""vLLM's experts on a CPU: its Triton kernel interpreted, its reference in torch, and OpenAI's triton_kernels in it."""

from collections.abc import Callable

import pytest

from tests.adapter_mistakes import ENCODED, LAYER, changed, require, shifted_scales, swapped, swapped_codes, verdict

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


@pytest.mark.parametrize("case", [f"{ENCODED}-fp8row-norm", f"{ENCODED}-fp8block-norm-tp2", f"{ENCODED}-int8-norm-tp2",
                                  f"{ENCODED}-gptq-norm-extreme", "v1-T33.H256.I384.E4.K2-fp16-awq-norm-tp2",
                                  "v1-T9.H96.I257.E5.K1-fp32-fp8row-norm-mlpbias-tp3"])
def test_encoded_experts(case: str) -> None:
    """Rows rounded to 8 bits and weights decoded, groups of 128 that two ranks cut into 64, biases and odd widths."""
    assert verdict("vllm.fused_moe", case) == "pass"


def test_rows_rounded_to_int8() -> None:
    """Weights of a W8A8 checkpoint, whose rows its own Triton kernel rounds."""
    assert verdict("vllm.fused_moe.int8_w8a8", f"{ENCODED}-int8-norm") == "pass"


@pytest.mark.parametrize("case", [f"{ENCODED}-fp8tensor-norm", f"{ENCODED}-gptqorder-norm",
                                  f"{ENCODED}-gptq-norm-mlpbias", "v1-T33.H256.I384.E4.K2-bf16-fp8block-norm-tp2"])
def test_encoded_experts_that_it_does_not_take(case: str) -> None:
    """One scale of gate and up and one for all rows, no columns in any order, no biases of groups, whole blocks."""
    assert verdict("vllm.fused_moe", case) == "unsupported"


@pytest.mark.parametrize(("scheme", "change", "stage"), [
    ("fp8row", swapped_codes, "act"), ("fp8block", shifted_scales, "down"), ("gptq", shifted_scales, "down")])
def test_a_mistake_with_encoded_experts_is_seen(scheme: str, change: Callable, stage: str) -> None:
    """Codes with the scales of others."""
    assert changed("vllm.fused_moe", f"{ENCODED}-{scheme}-norm", change) == f"mismatch {stage}"


def test_one_token_reads_past_the_end_of_four_bit_codes() -> None:
    """fused_moe_kernel_gptq_awq loads codes without a mask, 64 columns at a time for one token, and 160 is no multiple.

    What it reads there is multiplied by 0. MoeWNA16Method lets such a size in, as groups of 32 divide it.
    """
    assert verdict("vllm.fused_moe", "v1-T1.H160.I96.E1.K1-bf16-gptq32-norm") == "crash"
    assert verdict("vllm.fused_moe", "v1-T1.H192.I128.E1.K1-bf16-gptq32-norm") == "pass"
