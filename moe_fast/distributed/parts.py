"""A DTensor that every rank holds whole, as parts of which the sum is that tensor: one of them, and zeros."""

from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: DTensor, placements: Sequence[Placement]) -> DTensor:
        mesh, local = tensor.device_mesh, tensor.to_local()
        parts = [dim for dim, placement in enumerate(placements) if placement.is_partial()]
        if any(mesh.get_local_rank(dim) for dim in parts):
            local = torch.zeros_like(local)
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: DTensor):  # type: ignore[override]
        return gradient, None


def in_parts(tensor: DTensor, placements: Sequence[Placement]) -> DTensor:
    """`tensor` with Partial() in place of Replicate() where `placements` has it; nothing is divided or sent.

    DTensor's own way divides by the number of ranks, which rounds. The gradient is passed on as it comes.
    """
    if tuple(placements) == tensor.placements:
        return tensor
    return _InParts.apply(tensor, placements)
