"""Rows that leave their tokens and come back: take_rows and sum_rows, and their order.

R rows and T tokens with K places each are tied by two tables (int64): source_R, the token of a row, and place_TK, the
rows of a token; -1 where there is none. place_TK[t, k] == r exactly where source_R[r] == t for one k.
"""

import torch

from moe_fast.kernels.align import align
from moe_fast.kernels.gather_sum import gather_sum
from moe_fast.kernels.order import order
from moe_fast.kernels.take import take
from moe_fast.operators.checks import check_dtypes, check_shapes
from moe_fast.operators.rows import sum_of_tokens

FLOATING = (torch.float32, torch.float16, torch.bfloat16)
ORDER_BLOCK = 16
"""Rows of a block in the counting sort; only a grouped product would look at its blocks."""


@torch.library.custom_op("moe_fast::take_rows", mutates_args=())
def take_rows(x_TH: torch.Tensor, source_R: torch.Tensor, place_TK: torch.Tensor) -> torch.Tensor:
    """rows_RH: the token of each row in x's dtype, zeros for rows without one.

    Raises UsageValueError / UsageTypeError on wrong shapes or dtypes.
    """
    _check("moe_fast::take_rows", {"x_TH": x_TH}, source_R, place_TK)
    return take(x_TH, source_R)


@take_rows.register_fake
def _(x_TH: torch.Tensor, source_R: torch.Tensor, place_TK: torch.Tensor) -> torch.Tensor:
    _check("moe_fast::take_rows", {"x_TH": x_TH}, source_R, place_TK)
    return x_TH.new_empty(source_R.shape[0], x_TH.shape[1])


@torch.library.custom_op("moe_fast::sum_rows", mutates_args=())
def sum_rows(rows_RH: torch.Tensor, source_R: torch.Tensor, place_TK: torch.Tensor,
             bias_H: torch.Tensor | None = None, mean: bool = False) -> torch.Tensor:
    """y_TH: the rows of each token added up in slot order and fp32, rounded once to their dtype.

    mean: half of the sum; then the bias is added. Raises UsageValueError / UsageTypeError on wrong shapes or dtypes.
    """
    _check("moe_fast::sum_rows", {"rows_RH": rows_RH}, source_R, place_TK, bias_H)
    return gather_sum(rows_RH, place_TK, bias_H, mean)


@sum_rows.register_fake
def _(rows_RH: torch.Tensor, source_R: torch.Tensor, place_TK: torch.Tensor, bias_H: torch.Tensor | None = None,
      mean: bool = False) -> torch.Tensor:
    _check("moe_fast::sum_rows", {"rows_RH": rows_RH}, source_R, place_TK, bias_H)
    return rows_RH.new_empty(place_TK.shape[0], rows_RH.shape[1])


def _setup_take(ctx, inputs: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _setup_sum(ctx, inputs: tuple, output: torch.Tensor) -> None:
    _, *tables, bias_H, ctx.mean = inputs
    ctx.has_bias = bias_H is not None
    ctx.save_for_backward(*tables)


def _take_backward(ctx, grad_RH: torch.Tensor):
    return sum_rows(grad_RH, *ctx.saved_tensors), None, None


def _sum_backward(ctx, grad_TH: torch.Tensor):
    part_TH = grad_TH * 0.5 if ctx.mean else grad_TH
    return (take_rows(part_TH, *ctx.saved_tensors), None, None, sum_of_tokens(grad_TH) if ctx.has_bias else None, None)


take_rows.register_autograd(_take_backward, setup_context=_setup_take)
sum_rows.register_autograd(_sum_backward, setup_context=_setup_sum)


@torch.library.custom_op("moe_fast::order_rows", mutates_args=())
def order_rows(host_TK: torch.Tensor, num_hosts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """slot_R, place_TK and ends_N (int64 but for the last, int32) of the slots sorted by host, in their order.

    slot_R: the slot token * K + k at each of T * K places, -1 for those left over. place_TK: the place of each slot, -1
    where its host is none of [0, num_hosts). ends_N: how many slots go to hosts up to each one.
    """
    _check_order(host_TK)
    hosts_N = torch.arange(num_hosts, device=host_TK.device)
    alignment = align(host_TK, hosts_N, ORDER_BLOCK)
    slot_R, place_R = order(alignment)
    return slot_R, place_R.view(host_TK.shape), alignment.offsets[1:num_hosts + 1].clone()


@order_rows.register_fake
def _(host_TK: torch.Tensor, num_hosts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_order(host_TK)
    place_TK = host_TK.new_empty(host_TK.shape, dtype=torch.int64)
    return place_TK.new_empty(host_TK.numel()), place_TK, host_TK.new_empty(num_hosts, dtype=torch.int32)


def _check_order(host_TK: torch.Tensor) -> None:
    check_shapes("moe_fast::order_rows", {"host_TK": host_TK}, {})
    check_dtypes("moe_fast::order_rows", {"host_TK": host_TK}, (torch.int32, torch.int64))


def _check(operator: str, moved: dict[str, torch.Tensor], source_R: torch.Tensor, place_TK: torch.Tensor,
           bias_H: torch.Tensor | None = None) -> None:
    tables = {"source_R": source_R, "place_TK": place_TK}
    check_shapes(operator, moved | {"bias_H": bias_H} | tables, {})
    check_dtypes(operator, moved, FLOATING)
    check_dtypes(operator, {"bias_H": bias_H}, tuple(tensor.dtype for tensor in moved.values()))
    check_dtypes(operator, tables, (torch.int64,))
