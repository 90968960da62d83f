"""SGLang's experts on a CPU: its Triton kernel interpreted, and its experts in torch."""

from collections.abc import Callable

import pytest

from tests.adapter_mistakes import ENCODED, LAYER, changed, require, shifted_scales, swapped, swapped_codes, verdict

require("sglang.fused_moe")
GPT_OSS = "norm-routerbias-mlpbias-limit7-alpha1.702-up1-large"


@pytest.mark.parametrize("case", [f"{LAYER}.K2-bf16-norm-holes-exact", f"{LAYER}.K4-bf16-{GPT_OSS}-tp2",
                                  f"{LAYER}.K2-fp16-norm-gelutanh", "v1-T7.H128.I256.E8.K3-bf16-norm",
                                  f"{LAYER}.K1-bf16-sigmoid-weightinput", "v1-T0.H128.I256.E8.K2-bf16-norm"])
def test_fused_experts(case: str) -> None:
    """Slots without expert, which are -1 there; biases and clamp on two ranks; each way to add slots up."""
    assert verdict("sglang.fused_moe", case) == "pass"


@pytest.mark.parametrize("case", [f"{LAYER}.K2-fp32-norm-tp2", f"{LAYER}.K2-bf16-norm-exact",
                                  f"{LAYER}.K4-bf16-{GPT_OSS}"])
def test_native_experts(case: str) -> None:
    """moe_forward_native."""
    assert verdict("sglang.torch", case) == "pass"


@pytest.mark.parametrize("case", [f"{LAYER}.K2-bf16-norm-holes-exact", "v1-T0.H128.I256.E8.K2-bf16-norm"])
def test_what_the_native_experts_do_not_take(case: str) -> None:
    """scatter_ of counts refuses an id without expert, which is not declared; view(0, K, -1) of no row has no sense."""
    assert verdict("sglang.torch", case, absent_ids=True) == "crash"


@pytest.mark.parametrize(("name", "stage"), [("sglang.fused_moe", "act"), ("sglang.torch", "merged")])
def test_a_mistake_of_the_adapter_is_seen(name: str, stage: str) -> None:
    """Up taken for gate, in the first stage after it that is shown."""
    assert swapped(name, f"{LAYER}.K2-bf16-norm") == f"mismatch {stage}"


@pytest.mark.parametrize("case", [f"{ENCODED}-fp8row-norm", f"{ENCODED}-fp8block-norm-tp2", f"{ENCODED}-int8-norm-tp2",
                                  f"{ENCODED}-gptq-norm-extreme", "v1-T33.H256.I384.E4.K2-fp16-awq-norm-tp2"])
def test_encoded_experts(case: str) -> None:
    """Rows rounded to 8 bits and weights decoded, groups of 128 that two ranks cut into 64."""
    assert verdict("sglang.fused_moe", case) == "pass"


def test_rows_rounded_to_int8() -> None:
    """Weights of a W8A8 checkpoint, whose rows its own Triton kernel rounds."""
    assert verdict("sglang.fused_moe.int8_w8a8", f"{ENCODED}-int8-norm") == "pass"


@pytest.mark.parametrize(("scheme", "change", "stage"), [
    ("fp8row", swapped_codes, "act"), ("fp8block", shifted_scales, "down"), ("gptq", shifted_scales, "down")])
def test_a_mistake_with_encoded_experts_is_seen(scheme: str, change: Callable, stage: str) -> None:
    """Codes with the scales of others."""
    assert changed("sglang.fused_moe", f"{ENCODED}-{scheme}-norm", change) == f"mismatch {stage}"


def test_few_tokens_read_past_the_end_of_four_bit_codes() -> None:
    """fused_moe_kernel_gptq_awq loads codes without a mask, 64 columns at a time where experts outnumber tokens.

    What it reads there is multiplied by 0; 352, the share of four ranks of Qwen1.5-MoE, is no multiple either.
    """
    assert verdict("sglang.fused_moe", "v1-T1.H160.I96.E1.K1-bf16-gptq32-norm") == "crash"
    assert verdict("sglang.fused_moe", "v1-T1.H192.I128.E1.K1-bf16-gptq32-norm") == "pass"
