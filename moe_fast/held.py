"""The weights that a rank holds, all experts in memory: plain or encoded.

held_experts.py and held_halves.py are the places that tell one from the other.
"""

import torch

from moe_ref.contract.quantised import QuantisedWeights
from moe_ref.contract.weights import MoEWeights

Held = MoEWeights | QuantisedWeights
"""Either."""


def hosted(weights: Held) -> torch.Tensor:
    """hosted_E where ids are places among this rank's experts."""
    experts = weights.w13.codes if isinstance(weights, QuantisedWeights) else weights.w13_EGIH
    return torch.arange(len(experts), device=experts.device)
