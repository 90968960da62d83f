"""Down product of the activated rows, with bias and routing weight in its epilogue."""

import torch
import triton
import triton.language as tl

from moe_fast.kernels.align import Alignment
from moe_fast.kernels.described import row_operand, row_tile, rows_at, weight_operand, weight_tile, weights_at
from moe_fast.kernels.grouped import block_rows, grouped_tile, launch_grouped
from moe_fast.tiles import Tile


@triton.jit
def down_kernel(act, w2, w2_bias, down, row_weights, sorted_rows, block_expert, block_row, block_row_end, block_count,
                hidden_size, intermediate_size, stride_act_R, stride_w_E, stride_w_H, stride_w_I, stride_bias_E,
                stride_bias_H, HAS_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, ACT_LOADS: tl.constexpr,
                W2_LOADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr,
                GROUP: tl.constexpr, PERSISTENT: tl.constexpr):
    """down[row] = weight[row] * (act[position] @ w2^T + b2), in fp32, rounded once."""
    num_blocks, num_columns = tl.load(block_count), tl.cdiv(hidden_size, BLOCK_H)
    for tile in tl.range(tl.program_id(0), num_blocks * num_columns, tl.num_programs(0), flatten=PERSISTENT):
        block, column = grouped_tile(tile, num_blocks, num_columns, GROUP)
        expert, position, in_rows, row = block_rows(sorted_rows, block_expert, block_row, block_row_end, block, BLOCK_M)
        first = tl.load(block_row + block)
        h = column * BLOCK_H + tl.arange(0, BLOCK_H)
        in_columns = h < hidden_size
        i = tl.arange(0, BLOCK_I)
        act_at = rows_at(act, position, i, stride_act_R, ACT_LOADS)
        w_at = weights_at(w2, expert, h, i, stride_w_E, stride_w_H, stride_w_I, W2_LOADS)
        total = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        for start in range(0, intermediate_size, BLOCK_I):
            in_inner = start + i < intermediate_size
            act_tile = row_tile(act, act_at, in_rows[:, None] & in_inner[None, :], first, 0, start, ACT_LOADS, BLOCK_M,
                                BLOCK_I)
            w_tile = weight_tile(w2, w_at, in_inner[:, None] & in_columns[None, :], expert, 0, column * BLOCK_H, start,
                                 W2_LOADS, BLOCK_H, BLOCK_I)
            total = tl.dot(act_tile, w_tile, total, input_precision="ieee")
            act_at += BLOCK_I
            w_at += BLOCK_I * stride_w_I
        if HAS_BIAS:
            bias_at = w2_bias + expert.to(tl.int64) * stride_bias_E + h.to(tl.int64) * stride_bias_H
            total += tl.load(bias_at, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        if HAS_WEIGHTS:
            total *= tl.load(row_weights + row, mask=in_rows, other=0.0)[:, None]
        down_at = down + row.to(tl.int64)[:, None] * hidden_size + h[None, :]
        tl.store(down_at, total.to(down.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


def down(act_RI: torch.Tensor, w2_EHI: torch.Tensor, w2_bias_EH: torch.Tensor | None,
         row_weights_R: torch.Tensor | None, alignment: Alignment, tile: Tile) -> torch.Tensor:
    """down_RH in (token, slot) order and act's dtype, weighted by row_weights_R (fp32, (token, slot) order) if given.

    Rows of ids outside [0, E) stay unwritten; the combine kernel does not read them.
    """
    num_rows, (_, hidden, intermediate) = alignment.local_ids_R.numel(), w2_EHI.shape
    down_RH = torch.empty(num_rows, hidden, dtype=act_RI.dtype, device=act_RI.device)
    act, act_loads = row_operand(act_RI[:, None], tile)
    w2, w2_loads = weight_operand(w2_EHI[:, None], tile)
    stride_E, stride_H, stride_I = w2_EHI.stride()
    stride_bias_E, stride_bias_H = (0, 0) if w2_bias_EH is None else w2_bias_EH.stride()
    launch_grouped(down_kernel, alignment, triton.cdiv(hidden, tile.block_n), tile, act_RI.device, act=act,
                   ACT_LOADS=act_loads, w2=w2, W2_LOADS=w2_loads, w2_bias=act_RI if w2_bias_EH is None else w2_bias_EH,
                   HAS_BIAS=w2_bias_EH is not None, down=down_RH, HAS_WEIGHTS=row_weights_R is not None,
                   row_weights=act_RI if row_weights_R is None else row_weights_R.contiguous(),  # it knows no stride
                   hidden_size=hidden, intermediate_size=intermediate, stride_act_R=act_RI.stride(0),
                   stride_w_E=stride_E, stride_w_H=stride_H, stride_w_I=stride_I, stride_bias_E=stride_bias_E,
                   stride_bias_H=stride_bias_H, BLOCK_H=tile.block_n, BLOCK_I=tile.block_k)
    return down_RH
