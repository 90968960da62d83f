"""Parameters of released blocks as views under the names of MoEWeights, and their routings; differentiable."""

from typing import Any

import torch
from torch import nn

from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec
from tests.third_party.family import Tensors


def stacked(experts: nn.Module) -> Tensors:
    """gate_up_proj (E, 2I, H) and down_proj (E, H, I)."""
    return {"w13_EGIH": experts.gate_up_proj.unflatten(1, (2, -1)), "w2_EHI": experts.down_proj}


def transposed(experts: nn.Module) -> Tensors:
    """gate_up_proj (E, H, 2I), all gates first, and down_proj (E, I, H)."""
    return {"w13_EGIH": experts.gate_up_proj.transpose(1, 2).unflatten(1, (2, -1)),
            "w2_EHI": experts.down_proj.transpose(1, 2)}


def transposed_with_biases(experts: nn.Module, interleaved: bool) -> Tensors:
    """As `transposed`, with gate_up_proj_bias (E, 2I) and down_proj_bias; interleaved: gate and up take turns."""
    w13, bias = experts.gate_up_proj.transpose(1, 2), experts.gate_up_proj_bias
    if interleaved:
        w13, bias = w13.unflatten(1, (-1, 2)).transpose(1, 2), bias.unflatten(1, (-1, 2)).transpose(1, 2)
    else:
        w13, bias = w13.unflatten(1, (2, -1)), bias.unflatten(1, (2, -1))
    return {"w13_EGIH": w13, "w2_EHI": experts.down_proj.transpose(1, 2), "w13_bias_EGI": bias,
            "w2_bias_EH": experts.down_proj_bias}


def shared(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Tensors:
    """One shared expert from matrices (I, H), (I, H), (H, I)."""
    return {"shared_w13_GIH": torch.stack([gate, up]), "shared_w2_HI": down}


def shared_mlp(mlp: nn.Module) -> Tensors:
    """A shared expert of three Linear modules."""
    return shared(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)


def plain(block: nn.Module) -> Tensors:
    """experts, gate.weight."""
    return stacked(block.experts) | {"router_EH": block.gate.weight}


def plain_router(block: nn.Module) -> Tensors:
    """experts, router.weight."""
    return stacked(block.experts) | {"router_EH": block.router.weight}


def biased(block: nn.Module) -> Tensors:
    """experts, gate.weight, gate.e_score_correction_bias."""
    return plain(block) | {"selection_bias_E": block.gate.e_score_correction_bias}


def with_shared(block: nn.Module) -> Tensors:
    """experts, gate.weight, shared_experts."""
    return plain(block) | shared_mlp(block.shared_experts)


def biased_with_shared(block: nn.Module) -> Tensors:
    """experts, gate.weight, gate.e_score_correction_bias, shared_experts."""
    return biased(block) | shared_mlp(block.shared_experts)


def gated_shared(block: nn.Module) -> Tensors:
    """experts, gate.weight, shared_expert, shared_expert_gate."""
    return (plain(block) | shared_mlp(block.shared_expert)
            | {"shared_gate_SH": block.shared_expert_gate.weight})


def triple(output: Any, block: nn.Module, spec: MoESpec) -> Routing:
    """(logits, weights, ids)."""
    return Routing(output[2], output[1])
