"""Liger-Kernel's experts on a CPU: its Triton kernels interpreted, judged like any implementation."""

import pytest

from tests.adapter_mistakes import LAYER, require, swapped, verdict

require("liger")


@pytest.mark.parametrize("case", [f"{LAYER}.K2-bf16-norm-bwd", f"{LAYER}.K3-fp16", f"{LAYER}.K2-fp32-norm-exact",
                                  "v1-T0.H128.I256.E8.K2-fp32-norm"])
def test_passes(case: str) -> None:
    """Both directions; tf32 products where tokens are fp32; no token."""
    assert verdict("liger", case) == "pass"


def test_an_id_without_expert_is_beyond_its_histogram() -> None:
    """_moe_router_histogram_kernel counts id -1 before the first counter: there is no id for "no expert"."""
    case = f"{LAYER}.K2-bf16-norm-holes-exact"
    assert verdict("liger", case) == "unsupported"
    assert verdict("liger", case, absent_ids=True) == "crash"


def test_a_mistake_of_the_adapter_is_seen() -> None:
    """It shows nothing between routing and sum, so that is where it starts."""
    assert swapped("liger", f"{LAYER}.K3-fp16") == "mismatch merged"
