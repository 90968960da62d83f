"""The weights that a rank holds, all experts in memory: plain or encoded.

held_experts.py and held_halves.py are the places that tell one from the other.
"""

from dataclasses import dataclass

import torch

from moe_ref.contract.quantised import QuantisedWeights
from moe_ref.contract.weights import MoEWeights

Held = MoEWeights | QuantisedWeights
"""Either."""


@dataclass(frozen=True)
class FP8Weights(MoEWeights):
    """Plain weights of experts whose products round both operands to e4m3, forward and backward: fp8_training.py."""


def operands_of(weights: MoEWeights) -> str:
    """The word by which operators know them."""
    return "fp8_row" if isinstance(weights, FP8Weights) else "exact"


def hosted(weights: Held) -> torch.Tensor:
    """hosted_E where ids are places among this rank's experts."""
    experts = weights.w13.codes if isinstance(weights, QuantisedWeights) else weights.w13_EGIH
    return torch.arange(len(experts), device=experts.device)
