"""Gradients of gate and up from that of the activation; gate and up are made again."""

import torch
import triton
import triton.language as tl

from moe_fast.kernels.act_gradient import activation_slope
from moe_fast.kernels.align import Alignment
from moe_fast.kernels.gate_up import activate, grouped_tile
from moe_fast.launch import launch
from moe_fast.tiles import Tile


@triton.jit
def projection_gradient_kernel(x, grad_act, w13, grad_gate_up, sorted_rows, block_expert, block_row, block_row_end,
                               num_blocks, hidden_size, intermediate_size, top_k, stride_x_T, stride_x_H, stride_grad_R,
                               stride_grad_I, stride_w_E, stride_w_G, stride_w_I, stride_w_H,
                               ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
                               BLOCK_H: tl.constexpr, GROUP: tl.constexpr):
    """With d = grad_act[row]: grad_gate = d up slope(gate), grad_up = d activation(gate), at the row's position."""
    block, column = grouped_tile(num_blocks, tl.cdiv(intermediate_size, BLOCK_I), GROUP)
    expert = tl.load(block_expert + block)
    if expert < 0:
        return
    position = tl.load(block_row + block) + tl.arange(0, BLOCK_M)
    in_rows = position < tl.load(block_row_end + block)
    row = tl.load(sorted_rows + position, mask=in_rows, other=0)
    token = (row // top_k).to(tl.int64)[:, None]
    i = column * BLOCK_I + tl.arange(0, BLOCK_I)
    in_columns = i < intermediate_size
    wide_i = i.to(tl.int64)[None, :]
    h = tl.arange(0, BLOCK_H)
    wide_h = h.to(tl.int64)
    x_at = x + token * stride_x_T + wide_h[None, :] * stride_x_H
    w_at = w13 + expert.to(tl.int64) * stride_w_E + wide_i * stride_w_I + wide_h[:, None] * stride_w_H
    gate = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        in_hidden = start + h < hidden_size
        w_mask = in_hidden[:, None] & in_columns[None, :]
        x_tile = tl.load(x_at, mask=in_rows[:, None] & in_hidden[None, :], other=0.0)
        gate = tl.dot(x_tile, tl.load(w_at, mask=w_mask, other=0.0), gate, input_precision="ieee")
        up = tl.dot(x_tile, tl.load(w_at + stride_w_G, mask=w_mask, other=0.0), up, input_precision="ieee")
        x_at += BLOCK_H * stride_x_H
        w_at += BLOCK_H * stride_w_H
    inside = in_rows[:, None] & in_columns[None, :]
    grad_at = grad_act + row.to(tl.int64)[:, None] * stride_grad_R + wide_i * stride_grad_I
    grad = tl.load(grad_at, mask=inside, other=0.0).to(tl.float32)
    kind = grad_gate_up.dtype.element_ty
    gate_at = grad_gate_up + position.to(tl.int64)[:, None] * 2 * intermediate_size + i[None, :]
    tl.store(gate_at, (grad * up * activation_slope(gate, ACTIVATION)).to(kind), mask=inside)
    tl.store(gate_at + intermediate_size, (grad * activate(gate, ACTIVATION)).to(kind), mask=inside)


def projection_gradient(grad_act_RI: torch.Tensor, x_TH: torch.Tensor, w13_EGIH: torch.Tensor, alignment: Alignment,
                        top_k: int, activation: str, tile: Tile) -> torch.Tensor:
    """grad_gate_up_RGI in expert order and x's dtype; grad_act_RI is in (token, slot) order.

    Rows of no expert at hand stay unwritten.
    """
    num_rows, intermediate = grad_act_RI.shape
    grad_gate_up_RGI = torch.empty(num_rows, 2, intermediate, dtype=x_TH.dtype, device=x_TH.device)
    stride_E, stride_G, stride_I, stride_H = w13_EGIH.stride()
    launch(projection_gradient_kernel, (alignment.num_blocks * triton.cdiv(intermediate, tile.block_n),), x_TH.device,
           x=x_TH, grad_act=grad_act_RI, w13=w13_EGIH, grad_gate_up=grad_gate_up_RGI,
           sorted_rows=alignment.sorted_rows_R, block_expert=alignment.block_expert, block_row=alignment.block_row,
           block_row_end=alignment.block_row_end, num_blocks=alignment.num_blocks, hidden_size=x_TH.shape[1],
           intermediate_size=intermediate, top_k=top_k, stride_x_T=x_TH.stride(0), stride_x_H=x_TH.stride(1),
           stride_grad_R=grad_act_RI.stride(0), stride_grad_I=grad_act_RI.stride(1), stride_w_E=stride_E,
           stride_w_G=stride_G, stride_w_I=stride_I, stride_w_H=stride_H, ACTIVATION=activation, BLOCK_M=tile.block_m,
           BLOCK_I=tile.block_n, BLOCK_H=tile.block_k, GROUP=tile.group, num_warps=tile.num_warps,
           num_stages=tile.num_stages)
    return grad_gate_up_RGI
