"""Collectives with their gradients (Megatron-LM, arXiv 1909.08053, section 3, and 2205.05198, section 4).

    forward                         what it does           backward
    enter     nothing               whole -> split work    all-reduce       everybody's part of the gradient
    gather    all-gather            parts -> split work    reduce-scatter
    leave     all-reduce            partial -> whole       nothing          the gradient of the whole is everybody's
    scatter   reduce-scatter        partial -> parts       all-gather
    assemble  all-gather            parts -> whole         the own part
    exchange  all-to-all            rows -> other ranks    all-to-all
    copy      broadcast             rank 0 -> whole        nothing

"Whole" is what every rank of the group holds and has the complete gradient of, "split work" what every rank computes
another part of. A group of one is skipped. Gradients of gradients are refused.
"""

from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable

from moe_ref.contract.comm import Comm


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor, comm: Comm) -> torch.Tensor:
        ctx.comm = comm
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):  # type: ignore[override]
        return ctx.comm.all_reduce(gradient.contiguous()), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor, comm: Comm) -> tuple[torch.Tensor, ...]:
        parts = comm.all_gather(tensor.contiguous())
        ctx.comm, ctx.rows = comm, [len(part) for part in parts]
        return tuple(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: torch.Tensor):  # type: ignore[override]
        return ctx.comm.reduce_scatter(torch.cat(gradients), ctx.rows), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor, comm: Comm) -> torch.Tensor:
        return comm.all_reduce(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):  # type: ignore[override]
        return gradient, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor, rows: Sequence[int], comm: Comm) -> torch.Tensor:
        ctx.comm = comm
        return comm.reduce_scatter(tensor, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):  # type: ignore[override]
        return torch.cat(ctx.comm.all_gather(gradient.contiguous())), None, None


class _Assemble(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor, comm: Comm) -> torch.Tensor:
        parts = comm.all_gather(tensor.contiguous())
        ctx.start, ctx.rows = sum(len(part) for part in parts[:comm.rank]), len(tensor)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):  # type: ignore[override]
        return gradient[ctx.start:ctx.start + ctx.rows], None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, comm: Comm, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.comm = comm
        return tuple(comm.all_to_all(parts))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: torch.Tensor):  # type: ignore[override]
        return None, *ctx.comm.all_to_all([gradient.contiguous() for gradient in gradients])


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor, comm: Comm) -> torch.Tensor:
        return comm.broadcast(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):  # type: ignore[override]
        return gradient, None


def enter(tensor: torch.Tensor, *comms: Comm) -> torch.Tensor:
    """The tensor itself; its gradient is completed by one all-reduce over each group, the last one first."""
    for comm in comms:
        if comm.size > 1:
            tensor = _Enter.apply(tensor, comm)
    return tensor


def gather(tensor: torch.Tensor, comm: Comm) -> tuple[torch.Tensor, ...]:
    """Every rank's rows; their gradients are added up, and each rank gets that of its own."""
    return _Gather.apply(tensor, comm) if comm.size > 1 else (tensor,)


def leave(tensor: torch.Tensor, *comms: Comm) -> torch.Tensor:
    """The sum over each group in turn, by an all-reduce; its gradient goes to every rank as it is."""
    for comm in comms:
        if comm.size > 1:
            tensor = _Leave.apply(tensor, comm)
    return tensor


def scatter(tensor: torch.Tensor, rows: Sequence[int], comm: Comm) -> torch.Tensor:
    """This rank's rows of the sum over ranks, rows[rank] of them; the gradients of all rows go to every rank."""
    return _Scatter.apply(tensor, rows, comm) if comm.size > 1 else tensor


def assemble(tensor: torch.Tensor, comm: Comm) -> torch.Tensor:
    """Every rank's rows one after the other, the same on every rank; so is their gradient, and each takes its own."""
    return _Assemble.apply(tensor, comm) if comm.size > 1 else tensor


def exchange(parts: Sequence[torch.Tensor], comm: Comm) -> tuple[torch.Tensor, ...]:
    """parts[r] goes to rank r; returned is what came from each. The gradients travel back."""
    return _Exchange.apply(comm, *parts) if comm.size > 1 else tuple(parts)


def copy(tensor: torch.Tensor, comm: Comm) -> torch.Tensor:
    """The tensor of rank 0. All ranks hold it and compute the same from it, so each has its complete gradient."""
    return _Copy.apply(tensor, comm) if comm.size > 1 else tensor


def once(tensor: torch.Tensor, here: bool) -> torch.Tensor:
    """The tensor, or zeros: for what every rank holds whole and a sum of partial sums needs once.

    Not a product with 0, which would turn an infinity into NaN; and part of every rank's graph, so that all of them
    take part in the collectives of the backward pass.
    """
    return tensor if here else torch.where(torch.zeros_like(tensor, dtype=torch.bool), tensor, 0.0)
