"""The contract's weights under the names and in the layouts of a block's parameters: differentiable views or copies."""

import torch

from moe_ref.adapters.transformers_blocks.family import Family
from moe_ref.contract.weights import MoEWeights

Tensors = dict[str, torch.Tensor]


def parameters_of(weights: MoEWeights, family: Family) -> Tensors:
    """Every parameter and buffer of the family's block by name."""
    found = {f"experts.{name}": tensor for name, tensor in _EXPERTS[family.experts](weights).items()}
    found |= gate_parameters(weights, family)
    if family.shared is not None:
        assert weights.shared_w13_GIH is not None
        assert weights.shared_w2_HI is not None
        projections = ("up_proj",) if family.experts == "ungated" else ("gate_proj", "up_proj")
        found |= {f"{family.shared}.{name}.weight": tensor
                  for name, tensor in zip(projections, weights.shared_w13_GIH, strict=True)}
        found[f"{family.shared}.down_proj.weight"] = weights.shared_w2_HI
    if family.shared_gate is not None:
        assert weights.shared_gate_SH is not None
        found[f"{family.shared_gate}.weight"] = weights.shared_gate_SH
    return found


def gate_parameters(weights: MoEWeights, family: Family) -> Tensors:
    """Those of the router; from_pretrained keeps the selection bias in fp32."""
    assert weights.router_EH is not None
    found = {f"{family.gate}.weight": weights.router_EH}
    if weights.router_bias_E is not None:
        found[f"{family.gate}.bias"] = weights.router_bias_E
    if weights.selection_bias_E is not None:
        found[f"{family.gate}.e_score_correction_bias"] = weights.selection_bias_E.float()
    return found


def _stacked(weights: MoEWeights) -> Tensors:
    """(E, 2I, H), gates before ups, and (E, H, I)."""
    return {"gate_up_proj": weights.w13_EGIH.flatten(1, 2), "down_proj": weights.w2_EHI}


def _ungated(weights: MoEWeights) -> Tensors:
    return {"up_proj": weights.w13_EGIH[:, 0], "down_proj": weights.w2_EHI}


def _transposed(weights: MoEWeights) -> Tensors:
    """(E, H, 2I) and (E, I, H), contiguous as a released checkpoint has them."""
    return {"gate_up_proj": weights.w13_EGIH.flatten(1, 2).transpose(1, 2).contiguous(),
            "down_proj": weights.w2_EHI.transpose(1, 2).contiguous()}


def _interleaved(weights: MoEWeights) -> Tensors:
    """(E, H, 2I) with gate and up in turns, and biases (E, 2I) and (E, H)."""
    assert weights.w13_bias_EGI is not None
    assert weights.w2_bias_EH is not None
    return {"gate_up_proj": weights.w13_EGIH.permute(0, 3, 2, 1).flatten(2),
            "gate_up_proj_bias": weights.w13_bias_EGI.transpose(1, 2).flatten(1),
            "down_proj": weights.w2_EHI.transpose(1, 2).contiguous(), "down_proj_bias": weights.w2_bias_EH}


_EXPERTS = {"stacked": _stacked, "ungated": _ungated, "transposed": _transposed, "interleaved": _interleaved}
