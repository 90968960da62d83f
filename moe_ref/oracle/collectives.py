"""The differentiable pair that tensor parallelism needs (Megatron-LM, arXiv 1909.08053, section 3).

`enter` stands where a tensor that every rank holds enters work that is split over the ranks: nothing to do
forward, and the ranks' gradients are added up backward. `leave` stands where partial sums become the result:
added up forward; backward every rank's share has the gradient of the whole. Gradients of gradients are refused.
"""

import torch
from torch.autograd.function import once_differentiable

from moe_ref.contract.comm import Comm


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, tensor: torch.Tensor, comm: Comm) -> torch.Tensor:
        ctx.comm = comm  # type: ignore[attr-defined]
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):  # type: ignore[override]
        return ctx.comm.all_reduce(gradient.contiguous()), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, tensor: torch.Tensor, comm: Comm) -> torch.Tensor:
        return comm.all_reduce(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):  # type: ignore[override]
        return gradient, None


def enter(tensor: torch.Tensor, comm: Comm) -> torch.Tensor:
    """The tensor itself; its gradient is completed by one all-reduce."""
    return _Enter.apply(tensor, comm) if comm.size > 1 else tensor


def leave(tensor: torch.Tensor, comm: Comm) -> torch.Tensor:
    """The sum over ranks, by one all-reduce; its gradient goes to every rank as it is."""
    return _Leave.apply(tensor, comm) if comm.size > 1 else tensor


def once(tensor: torch.Tensor, comm: Comm) -> torch.Tensor:
    """The tensor on rank 0, zeros elsewhere: for what every rank holds whole and the sum of partial sums needs once.

    Not a product with 0, which would turn an infinity into NaN; and part of every rank's graph, so that all of them
    take part in the collectives of the backward pass.
    """
    return tensor if comm.rank == 0 else torch.where(torch.zeros_like(tensor, dtype=torch.bool), tensor, 0.0)
