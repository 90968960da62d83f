"""Adapters with a planted mistake: gate and up change places. The attribute is an adapter's name with _ for the dot."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from moe_ref.adapters.catalogue import ADAPTERS
from moe_ref.contract.weights import MoEWeights
from moe_ref.verify.run.subjects import load_subject


@dataclass(frozen=True)
class Swapped:
    """An adapter that is handed weights in which up comes before gate."""

    adapter: Any

    @property
    def CAPABILITIES(self) -> Any:
        """The adapter's own."""
        return self.adapter.CAPABILITIES

    def moe(self, x_TH: torch.Tensor, weights: MoEWeights, *others: Any, **named: Any) -> torch.Tensor:
        """What the adapter makes of them."""
        return self.adapter.moe(x_TH, replace(weights, w13_EGIH=weights.w13_EGIH.flip(1)), *others, **named)


def __getattr__(name: str) -> Swapped:
    """The adapter of that name, whose library is loaded now."""
    for adapter in ADAPTERS:
        if adapter.name.replace(".", "_") == name:
            return Swapped(load_subject(adapter.name))
    raise AttributeError(name)
