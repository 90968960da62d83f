"""Protects the rule of dtypes in checkpoints: what MoEWeights refuse to hold together is not read together."""

from pathlib import Path

import pytest
import torch

from moe_ref.checkpoints.reader import open_checkpoint
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.spec import MoESpec
from tests.checkpoint_models import BIASED, EXPERT_NAMES, GATE_NAME, GATED_SHARE, PLAIN, mixtral, write

BIAS_NAME = "model.layers.0.block_sparse_moe.e_score_correction_bias"


def fault(path: Path, naming: str, spec: MoESpec) -> str:
    """What opening says."""
    with pytest.raises(UsageValueError) as caught:
        open_checkpoint(path, 0, naming, spec)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_router_is_in_the_experts_dtype_or_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    """fp32 beside another dtype is how released files keep it; nobody keeps another dtype beside fp32."""
    kept = mixtral(dtype) | {GATE_NAME: mixtral()[GATE_NAME]}
    lost = mixtral() | {GATE_NAME: mixtral(dtype)[GATE_NAME]}
    assert open_checkpoint(write(tmp_path, kept), 0, "mixtral", PLAIN).router_EH.dtype == torch.float32
    said = fault(write(tmp_path, lost), "mixtral", PLAIN)
    assert f"{GATE_NAME}: dtype {dtype}, but should be torch.float32 as {EXPERT_NAMES['w1'].format(e=0)}" in said


def test_all_faults_at_once(tmp_path: Path) -> None:
    """An fp64 matrix, a quantised one, a selection bias in fp16 and a missing matrix: four faults, one message."""
    two, three, four = (EXPERT_NAMES["w3"].format(e=e) for e in (2, 3, 4))
    tensors = mixtral(torch.bfloat16) | {BIAS_NAME: torch.zeros(6, dtype=torch.float16)}
    tensors |= {two: tensors[two].double(), three: tensors[three].to(torch.int8)}
    del tensors[four]
    said = fault(write(tmp_path, tensors), "minimax_m2", BIASED)
    first = EXPERT_NAMES["w1"].format(e=0)
    for words in (f"{two}: dtype torch.float64, but should be torch.bfloat16 as {first}",
                  f"{three}: stored as I8, but should be one of F64, F32, F16, BF16",
                  f"{BIAS_NAME}: dtype torch.float16, but should be torch.bfloat16 or torch.float32 as {first}",
                  f"{four} is missing"):
        assert words in said


@pytest.mark.parametrize(("dtype", "refused"), [(torch.bfloat16, False), (torch.float32, True)])
def test_the_shared_expert_has_the_experts_dtype(dtype: torch.dtype, refused: bool, tmp_path: Path) -> None:
    """fp32 is for routers, biases of the choice and gates; every matrix of the shared expert is named."""
    block, shared = "model.layers.0.mlp", "model.layers.0.mlp.shared_expert"
    tensors = {f"{block}.gate.weight": torch.zeros(6, 12),
               f"{block}.shared_expert_gate.weight": torch.zeros(1, 12)}
    experts = [(f"{block}.experts.{e}", 8, torch.bfloat16) for e in range(6)]
    for prefix, width, kind in (*experts, (shared, 10, dtype)):
        tensors |= {f"{prefix}.gate_proj.weight": torch.zeros(width, 12, dtype=kind),
                    f"{prefix}.up_proj.weight": torch.zeros(width, 12, dtype=kind),
                    f"{prefix}.down_proj.weight": torch.zeros(12, width, dtype=kind)}
    path = write(tmp_path, tensors)
    if not refused:
        assert open_checkpoint(path, 0, "qwen2_moe", GATED_SHARE).shared_gate_SH.dtype == torch.float32
        return
    said = fault(path, "qwen2_moe", GATED_SHARE)
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert f"{shared}.{name}.weight: dtype torch.float32, but should be torch.bfloat16 as" in said
    assert "gate.weight: dtype" not in said
