"""Gradients of the routed rows of x: back through w13, row by row."""

import torch
import triton
import triton.language as tl

from moe_fast.kernels.align import Alignment
from moe_fast.kernels.gate_up import grouped_tile
from moe_fast.launch import launch
from moe_fast.tiles import Tile


@triton.jit
def row_gradient_kernel(grad_gate_up, w13, grad_rows, sorted_rows, block_expert, block_row, block_row_end, num_blocks,
                        hidden_size, intermediate_size, stride_w_E, stride_w_G, stride_w_I, stride_w_H,
                        NUM_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr,
                        GROUP: tl.constexpr):
    """grad_rows[row] = grad_gate[position] @ w1 (+ grad_up[position] @ w3), accumulated in fp32, rounded once."""
    block, column = grouped_tile(num_blocks, tl.cdiv(hidden_size, BLOCK_H), GROUP)
    expert = tl.load(block_expert + block)
    if expert < 0:
        return
    position = tl.load(block_row + block) + tl.arange(0, BLOCK_M)
    in_rows = position < tl.load(block_row_end + block)
    row = tl.load(sorted_rows + position, mask=in_rows, other=0)
    h = column * BLOCK_H + tl.arange(0, BLOCK_H)
    in_columns = h < hidden_size
    i = tl.arange(0, BLOCK_I)
    total = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    # Gate, then up: one loop over both would keep four tiles in shared memory instead of two.
    for g in tl.static_range(NUM_PARTS):
        grad_at = grad_gate_up + (position.to(tl.int64)[:, None] * NUM_PARTS + g) * intermediate_size + i[None, :]
        w_at = w13 + expert.to(tl.int64) * stride_w_E + g * stride_w_G + h.to(tl.int64)[None, :] * stride_w_H
        w_at += i.to(tl.int64)[:, None] * stride_w_I
        for start in range(0, intermediate_size, BLOCK_I):
            in_inner = start + i < intermediate_size
            grad_tile = tl.load(grad_at, mask=in_rows[:, None] & in_inner[None, :], other=0.0)
            w_tile = tl.load(w_at, mask=in_inner[:, None] & in_columns[None, :], other=0.0)
            total = tl.dot(grad_tile, w_tile, total, input_precision="ieee")
            grad_at += BLOCK_I
            w_at += BLOCK_I * stride_w_I
    rows_at = grad_rows + row.to(tl.int64)[:, None] * hidden_size + h[None, :]
    tl.store(rows_at, total.to(grad_rows.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


def row_gradient(grad_gate_up_RGI: torch.Tensor, w13_EGIH: torch.Tensor, alignment: Alignment,
                 tile: Tile) -> torch.Tensor:
    """grad_rows_RH in (token, slot) order and the dtype of grad_gate_up_RGI, which is in expert order.

    Rows of no expert at hand stay unwritten; the combine kernel does not read them.
    """
    num_rows, (_, _, intermediate, hidden) = len(grad_gate_up_RGI), w13_EGIH.shape
    grad_rows_RH = torch.empty(num_rows, hidden, dtype=grad_gate_up_RGI.dtype, device=grad_gate_up_RGI.device)
    stride_E, stride_G, stride_I, stride_H = w13_EGIH.stride()
    launch(row_gradient_kernel, (alignment.num_blocks * triton.cdiv(hidden, tile.block_n),), grad_rows_RH.device,
           grad_gate_up=grad_gate_up_RGI, w13=w13_EGIH, grad_rows=grad_rows_RH, sorted_rows=alignment.sorted_rows_R,
           block_expert=alignment.block_expert, block_row=alignment.block_row,
           block_row_end=alignment.block_row_end, num_blocks=alignment.num_blocks, hidden_size=hidden,
           intermediate_size=intermediate, stride_w_E=stride_E, stride_w_G=stride_G, stride_w_I=stride_I,
           stride_w_H=stride_H, NUM_PARTS=w13_EGIH.shape[1], BLOCK_M=tile.block_m, BLOCK_H=tile.block_n,
           BLOCK_I=tile.block_k, GROUP=tile.group, num_warps=tile.num_warps, num_stages=tile.num_stages)
    return grad_rows_RH
