"""How tokens become the rows of a grouped product, the same forward and backward."""

import torch

from moe_fast.tiles import Load


def load_of(ids_TK: torch.Tensor, num_experts: int) -> Load:
    """What tile sizes follow: every slot, as if all experts were at hand."""
    return Load(ids_TK.numel(), num_experts)


def every_token(x_TH: torch.Tensor, gate_T1: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The shared expert's ids_T1, weights_T1 and hosted_1: a layer of one expert that every token visits."""
    ids_T1 = torch.zeros(len(x_TH), 1, dtype=torch.int64, device=x_TH.device)
    if gate_T1 is None:
        gate_T1 = torch.ones_like(ids_T1, dtype=torch.float32)
    return ids_T1, gate_T1, ids_T1.new_zeros(1)


def sum_of_tokens(grad_TH: torch.Tensor) -> torch.Tensor:
    """(H,), summed in fp32: the gradient of what was added to every token."""
    return grad_TH.sum(0, dtype=torch.float32).to(grad_TH.dtype)
