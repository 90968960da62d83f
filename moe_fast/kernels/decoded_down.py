"""Down product of the activated rows with encoded weights, decoded inside the kernel; the rest as in down.py."""

import torch
import triton
import triton.language as tl

from moe_fast.kernels.align import Alignment
from moe_fast.kernels.decoded_tile import decoded_tile, encoded_operand, with_joined_scale
from moe_fast.kernels.grouped import block_rows, grouped_tile, launch_grouped
from moe_fast.tiles import Tile
from moe_ref.contract.encoded import Encoded


@triton.jit
def decoded_down_kernel(act, codes, scales, zeros, groups, second, w2_bias, down, row_weights, sorted_rows,
                        block_expert, block_row, block_row_end, block_count, hidden_size, intermediate_size,
                        num_blocks_K, column_start, stride_act_R, stride_w_E, stride_w_H, stride_w_I, stride_bias_E,
                        stride_bias_H, HAS_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, CODES: tl.constexpr,
                        SCALES: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr, HAS_ZEROS: tl.constexpr,
                        HAS_ORDER: tl.constexpr, HAS_SECOND: tl.constexpr, HAS_TAIL: tl.constexpr,
                        BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr, GROUP: tl.constexpr,
                        PERSISTENT: tl.constexpr):
    """down[row] = weight[row] * (act[position] @ w2^T + b2), in fp32, rounded once."""
    dtype: tl.constexpr = act.dtype.element_ty
    num_blocks, num_columns = tl.load(block_count), tl.cdiv(hidden_size, BLOCK_H)
    for tile in tl.range(tl.program_id(0), num_blocks * num_columns, tl.num_programs(0), flatten=PERSISTENT):
        block, column = grouped_tile(tile, num_blocks, num_columns, GROUP)
        expert, position, in_rows, row = block_rows(sorted_rows, block_expert, block_row, block_row_end, block, BLOCK_M)
        h, i = column * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_I)
        in_columns = h < hidden_size
        wide_h, matrix = h.to(tl.int64), expert.to(tl.int64)
        act_at = act + position.to(tl.int64)[:, None] * stride_act_R + i[None, :]
        codes_at = codes + matrix * stride_w_E + wide_h * stride_w_H
        blocks_at = (matrix * hidden_size + wide_h) * num_blocks_K
        total = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        for start in range(0, intermediate_size, BLOCK_I):
            act_tile = tl.load(act_at, mask=in_rows[:, None] & (start + i < intermediate_size)[None, :], other=0.0)
            w_tile = decoded_tile(codes_at, scales, zeros, groups, matrix, blocks_at, in_columns, start,
                                  intermediate_size, column_start, stride_w_I, dtype, CODES, SCALES, COLUMNS, RUN,
                                  HAS_ZEROS, HAS_ORDER, HAS_TAIL, BLOCK_H, BLOCK_I)
            total = tl.dot(act_tile, w_tile, total, input_precision="ieee")
            act_at += BLOCK_I
        total = with_joined_scale(total, scales, second, matrix, blocks_at, in_columns, COLUMNS, HAS_SECOND)
        if HAS_BIAS:
            bias_at = w2_bias + matrix * stride_bias_E + wide_h * stride_bias_H
            total += tl.load(bias_at, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        if HAS_WEIGHTS:
            total *= tl.load(row_weights + row, mask=in_rows, other=0.0)[:, None]
        down_at = down + row.to(tl.int64)[:, None] * hidden_size + h[None, :]
        tl.store(down_at, total.to(dtype), mask=in_rows[:, None] & in_columns[None, :])


def decoded_down(act_RI: torch.Tensor, w2: Encoded, w2_bias_EH: torch.Tensor | None,
                 row_weights_R: torch.Tensor | None, alignment: Alignment, tile: Tile) -> torch.Tensor:
    """down_RH in (token, slot) order and act's dtype, of w2 with L = (E,); the arguments are otherwise those of down.
    """
    num_rows, (_, hidden, intermediate) = alignment.local_ids_R.numel(), w2.shape
    down_RH = torch.empty(num_rows, hidden, dtype=act_RI.dtype, device=act_RI.device)
    stride_bias_E, stride_bias_H = (0, 0) if w2_bias_EH is None else w2_bias_EH.stride()
    stride_E, stride_H, stride_I = w2.codes.stride()
    launch_grouped(decoded_down_kernel, alignment, triton.cdiv(hidden, tile.block_n), tile, act_RI.device, act=act_RI,
                   **encoded_operand(w2, tile), down=down_RH, w2_bias=act_RI if w2_bias_EH is None else w2_bias_EH,
                   HAS_BIAS=w2_bias_EH is not None, HAS_WEIGHTS=row_weights_R is not None,
                   row_weights=act_RI if row_weights_R is None else row_weights_R.contiguous(),
                   hidden_size=hidden, intermediate_size=intermediate, stride_act_R=act_RI.stride(0),
                   stride_w_E=stride_E, stride_w_H=stride_H, stride_w_I=stride_I, stride_bias_E=stride_bias_E,
                   stride_bias_H=stride_bias_H, BLOCK_H=tile.block_n, BLOCK_I=tile.block_k)
    return down_RH
