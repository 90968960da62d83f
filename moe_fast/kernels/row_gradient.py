"""Gradients of the routed rows of x: back through w13, row by row."""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from moe_fast.kernels.align import Alignment
from moe_fast.kernels.described import row_operand, row_tile, rows_at, weight_operand, weight_tile, weights_at
from moe_fast.kernels.grouped import block_rows, grouped_tile, launch_grouped
from moe_fast.tiles import Load, Tile, gemm_tile


@triton.jit
def row_gradient_kernel(grad_gate_up, w13, grad_rows, sorted_rows, block_expert, block_row, block_row_end, block_count,
                        hidden_size, intermediate_size, stride_grad_R, stride_w_E, stride_w_G, stride_w_I, stride_w_H,
                        NUM_PARTS: tl.constexpr, GRAD_LOADS: tl.constexpr, W13_LOADS: tl.constexpr,
                        BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr, GROUP: tl.constexpr,
                        PERSISTENT: tl.constexpr):
    """grad_rows[row] = grad_gate[position] @ w1 (+ grad_up[position] @ w3), accumulated in fp32, rounded once."""
    num_blocks, num_columns = tl.load(block_count), tl.cdiv(hidden_size, BLOCK_H)
    for tile in tl.range(tl.program_id(0), num_blocks * num_columns, tl.num_programs(0), flatten=PERSISTENT):
        block, column = grouped_tile(tile, num_blocks, num_columns, GROUP)
        expert, position, in_rows, row = block_rows(sorted_rows, block_expert, block_row, block_row_end, block, BLOCK_M)
        first = tl.load(block_row + block)
        h = column * BLOCK_H + tl.arange(0, BLOCK_H)
        in_columns = h < hidden_size
        i = tl.arange(0, BLOCK_I)
        total = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        # Gate, then up: one loop over both would keep four tiles in shared memory instead of two.
        for g in tl.static_range(NUM_PARTS):
            grad_at = rows_at(grad_gate_up, position, i, stride_grad_R, GRAD_LOADS) + g * intermediate_size
            w_at = weights_at(w13, expert, h, i, stride_w_E, stride_w_H, stride_w_I, W13_LOADS) + g * stride_w_G
            for start in range(0, intermediate_size, BLOCK_I):
                in_inner = start + i < intermediate_size
                grad_tile = row_tile(grad_gate_up, grad_at, in_rows[:, None] & in_inner[None, :], first, g, start,
                                     GRAD_LOADS, BLOCK_M, BLOCK_I)
                w_tile = weight_tile(w13, w_at, in_inner[:, None] & in_columns[None, :], expert, g, column * BLOCK_H,
                                     start, W13_LOADS, BLOCK_H, BLOCK_I)
                total = tl.dot(grad_tile, w_tile, total, input_precision="ieee")
                grad_at += BLOCK_I
                w_at += BLOCK_I * stride_w_I
        rows_at_row = grad_rows + row.to(tl.int64)[:, None] * hidden_size + h[None, :]
        tl.store(rows_at_row, total.to(grad_rows.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


def row_gradient_tile(device: torch.device, dtype: torch.dtype, load: Load, w13_EGIH: torch.Tensor,
                      block_m: int | None = None) -> Tile:
    """The tile of the product back to H; two loops, one for gate and one for up, spill with steps of more than 64."""
    (_, _, intermediate, hidden) = w13_EGIH.shape
    tile = gemm_tile(device, dtype, load, hidden, intermediate, kernel="row_gradient", block_m=block_m)
    return tile if device.type == "cpu" else replace(tile, block_k=min(tile.block_k, 64))


def row_gradient(grad_gate_up_RGI: torch.Tensor, w13_EGIH: torch.Tensor, alignment: Alignment,
                 tile: Tile) -> torch.Tensor:
    """grad_rows_RH in (token, slot) order and the dtype of grad_gate_up_RGI, which is in expert order.

    Rows of no expert at hand stay unwritten; the combine kernel does not read them.
    """
    num_rows, (_, num_parts, intermediate, hidden) = len(grad_gate_up_RGI), w13_EGIH.shape
    grad_rows_RH = torch.empty(num_rows, hidden, dtype=grad_gate_up_RGI.dtype, device=grad_gate_up_RGI.device)
    grad_gate_up, grad_loads = row_operand(grad_gate_up_RGI, tile)
    # What this product sums over is I, so that I is its inner axis.
    w13, w13_loads = weight_operand(w13_EGIH.transpose(2, 3), tile)
    stride_E, stride_G, stride_I, stride_H = w13_EGIH.stride()
    launch_grouped(row_gradient_kernel, alignment, triton.cdiv(hidden, tile.block_n), tile, grad_rows_RH.device,
                   grad_gate_up=grad_gate_up, GRAD_LOADS=grad_loads, w13=w13, W13_LOADS=w13_loads,
                   grad_rows=grad_rows_RH, hidden_size=hidden, intermediate_size=intermediate,
                   stride_grad_R=grad_gate_up_RGI.stride(0), stride_w_E=stride_E, stride_w_G=stride_G,
                   stride_w_I=stride_I, stride_w_H=stride_H, NUM_PARTS=num_parts, BLOCK_H=tile.block_n,
                   BLOCK_I=tile.block_k)
    return grad_rows_RH
