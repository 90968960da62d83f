"""SGLang's experts on a CPU: its Triton kernel interpreted, and its experts in torch."""

import pytest

from tests.adapter_mistakes import LAYER, require, swapped, verdict

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
