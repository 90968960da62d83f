"""Gradients at the down product: of the activation and of the routing weight, from the merged token's."""

import torch
import triton
import triton.language as tl

from moe_fast.kernels.align import Alignment
from moe_fast.kernels.described import weight_operand, weight_tile, weights_at
from moe_fast.kernels.grouped import block_rows, grouped_tile, launch_grouped
from moe_fast.tiles import Tile


@triton.jit
def down_gradient_kernel(act, grad, w2, row_weights, grad_act, weighted_act, weight_parts, sorted_rows, block_expert,
                         block_row, block_row_end, block_count, hidden_size, intermediate_size, top_k, stride_act_R,
                         stride_act_I, stride_grad_T, stride_grad_H, stride_w_E, stride_w_H, stride_w_I,
                         W2_LOADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr,
                         GROUP: tl.constexpr, PERSISTENT: tl.constexpr):
    """With d = grad[token] @ w2 in fp32: grad_act[row] = weight d, weight_parts[row, tile] = sum of act d.

    weighted_act[position] = weight act.
    """
    num_blocks, num_columns = tl.load(block_count), tl.cdiv(intermediate_size, BLOCK_I)
    for tile in tl.range(tl.program_id(0), num_blocks * num_columns, tl.num_programs(0), flatten=PERSISTENT):
        block, column = grouped_tile(tile, num_blocks, num_columns, GROUP)
        expert, position, in_rows, row = block_rows(sorted_rows, block_expert, block_row, block_row_end, block, BLOCK_M)
        i = column * BLOCK_I + tl.arange(0, BLOCK_I)
        in_columns = i < intermediate_size
        h = tl.arange(0, BLOCK_H)
        grad_at = grad + (row // top_k).to(tl.int64)[:, None] * stride_grad_T + h.to(tl.int64)[None, :] * stride_grad_H
        w_at = weights_at(w2, expert, i, h, stride_w_E, stride_w_I, stride_w_H, W2_LOADS)
        product = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
        for start in range(0, hidden_size, BLOCK_H):
            in_hidden = start + h < hidden_size
            grad_tile = tl.load(grad_at, mask=in_rows[:, None] & in_hidden[None, :], other=0.0)
            w_tile = weight_tile(w2, w_at, in_hidden[:, None] & in_columns[None, :], expert, 0, column * BLOCK_I, start,
                                 W2_LOADS, BLOCK_I, BLOCK_H)
            product = tl.dot(grad_tile, w_tile, product, input_precision="ieee")
            grad_at += BLOCK_H * stride_grad_H
            w_at += BLOCK_H * stride_w_H
        inside = in_rows[:, None] & in_columns[None, :]
        wide_row = row.to(tl.int64)
        act_at = act + wide_row[:, None] * stride_act_R + i.to(tl.int64)[None, :] * stride_act_I
        act_tile = tl.load(act_at, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(row_weights + row, mask=in_rows, other=0.0)[:, None]
        tl.store(weight_parts + wide_row * num_columns + column, tl.sum(act_tile * product, axis=1), mask=in_rows)
        kind = grad_act.dtype.element_ty
        tl.store(grad_act + wide_row[:, None] * intermediate_size + i[None, :], (weight * product).to(kind),
                 mask=inside)
        weighted_at = weighted_act + position.to(tl.int64)[:, None] * intermediate_size + i[None, :]
        tl.store(weighted_at, (weight * act_tile).to(kind), mask=inside)


def down_gradient(grad_TH: torch.Tensor, act_RI: torch.Tensor, w2_EHI: torch.Tensor, row_weights_R: torch.Tensor,
                  alignment: Alignment, top_k: int, tile: Tile) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad_act_RI and grad_weights_R (fp32) in (token, slot) order, and weighted act_RI in expert order.

    act_RI: in (token, slot) order. Both gradients are 0 for rows of no expert at hand; the third stays unwritten there.
    """
    row_weights_R = row_weights_R.contiguous()  # the kernel knows no stride of them
    (num_rows, intermediate), device = act_RI.shape, act_RI.device
    grad_act_RI = torch.zeros(num_rows, intermediate, dtype=act_RI.dtype, device=device)
    weighted_act_RI = torch.empty_like(grad_act_RI)
    num_columns = triton.cdiv(intermediate, tile.block_n)
    parts = torch.zeros(num_rows, num_columns, dtype=torch.float32, device=device)
    stride_E, stride_H, stride_I = w2_EHI.stride()
    w2, w2_loads = weight_operand(w2_EHI.transpose(1, 2)[:, None], tile)
    launch_grouped(down_gradient_kernel, alignment, num_columns, tile, device, act=act_RI, grad=grad_TH, w2=w2,
                   W2_LOADS=w2_loads, row_weights=row_weights_R, grad_act=grad_act_RI, weighted_act=weighted_act_RI,
                   weight_parts=parts, hidden_size=w2_EHI.shape[1], intermediate_size=intermediate, top_k=top_k,
                   stride_act_R=act_RI.stride(0), stride_act_I=act_RI.stride(1), stride_grad_T=grad_TH.stride(0),
                   stride_grad_H=grad_TH.stride(1), stride_w_E=stride_E, stride_w_H=stride_H, stride_w_I=stride_I,
                   BLOCK_I=tile.block_n, BLOCK_H=tile.block_k)
    return grad_act_RI, weighted_act_RI, parts.sum(1)
