"""A right layer with ways of its own: it replaces a function when loaded, and another during a collective."""

import torch
import torch.nn.functional as F

from tests.subjects.base import Call, TorchMoE

torch_silu, torch_gelu = F.silu, F.gelu


def silu(tensor: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """As torch's; it must be there in every part of every call."""
    return torch_silu(tensor, inplace)


F.silu = silu


class OwnWays(TorchMoE):
    """Looks after the collective, when other ranks have had their turn, whether all is as it left it."""

    def all_reduce(self, call: Call, merged_TH: torch.Tensor) -> torch.Tensor:
        assert F.silu is silu
        F.gelu = silu
        total_TH = super().all_reduce(call, merged_TH)
        assert F.silu is silu
        F.gelu = torch_gelu
        return total_TH


own_ways = OwnWays()
