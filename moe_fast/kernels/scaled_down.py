"""Down projection of codes, of rows of the activation that were rounded, written in the order of the routed rows."""

import torch
import triton
import triton.language as tl

from moe_fast.kernels.align import Alignment
from moe_fast.kernels.described import weights_at
from moe_fast.kernels.grouped import block_rows, grouped_tile, launch_grouped
from moe_fast.kernels.round_rows import RoundedRows
from moe_fast.kernels.scaled import block_sum, codes_at, product_arguments, scales_of_columns, scales_of_rows
from moe_fast.tiles import Tile
from moe_ref.contract.encoded import Encoded


@triton.jit
def scaled_sums(codes, scales, w2, w2_scales, source, in_rows, expert, column, hidden_size, intermediate_size,
                row_start, column_start, stride_scales_B, stride_w_E, stride_w_H, stride_w_I, stride_s_E, stride_s_H,
                stride_s_I, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr,
                BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr):
    """Rows of codes @ w2^T of one tile, with all scales, in fp32; `source`: where codes of rows lie."""
    h = column * BLOCK_H + tl.arange(0, BLOCK_H)
    in_columns = h < hidden_size
    i = tl.arange(0, BLOCK_I) - column_start
    act_at = codes_at(codes, source, i, intermediate_size)
    w_at = weights_at(w2, expert, h, i, stride_w_E, stride_w_H, stride_w_I, "addresses")
    total = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for start in range(0, column_start + intermediate_size, BLOCK_I):
        in_inner = (i + start >= 0) & (i + start < intermediate_size)
        act_tile = tl.load(act_at, mask=in_rows[:, None] & in_inner[None, :], other=0.0)
        w_tile = tl.load(w_at, mask=in_inner[:, None] & in_columns[None, :], other=0.0)
        part = block_sum(act_tile, w_tile)
        if SCALE_COLUMNS != 0:
            row_scale = scales_of_rows(scales, source, in_rows, start // SCALE_COLUMNS, stride_scales_B)
            w_scale = scales_of_columns(w2_scales, expert, column, start // SCALE_COLUMNS, hidden_size, row_start,
                                        stride_s_E, stride_s_H, stride_s_I, SCALE_ROWS, BLOCK_H)
            part = part * row_scale[:, None] * w_scale[None, :]
        total += part
        act_at += BLOCK_I
        w_at += BLOCK_I * stride_w_I
    if SCALE_COLUMNS == 0:
        row_scale = scales_of_rows(scales, source, in_rows, 0, stride_scales_B)
        w_scale = scales_of_columns(w2_scales, expert, column, 0, hidden_size, row_start, stride_s_E, stride_s_H,
                                    stride_s_I, SCALE_ROWS, BLOCK_H)
        total = total * row_scale[:, None] * w_scale[None, :]
    return total


@triton.jit
def scaled_down_kernel(codes, scales, w2, w2_scales, w2_bias, down, row_weights, sorted_rows, block_expert, block_row,
                       block_row_end, block_count, hidden_size, intermediate_size, top_k, row_start, column_start,
                       stride_scales_B, stride_w_E, stride_w_H, stride_w_I, stride_s_E, stride_s_H, stride_s_I,
                       stride_bias_E, stride_bias_H, HAS_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
                       GATHERED: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
                       BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr, GROUP: tl.constexpr,
                       PERSISTENT: tl.constexpr):
    """down[row] as down_kernel's, of codes times scales; GATHERED: codes of rows lie by token, not position."""
    num_blocks, num_columns = tl.load(block_count), tl.cdiv(hidden_size, BLOCK_H)
    for tile in tl.range(tl.program_id(0), num_blocks * num_columns, tl.num_programs(0), flatten=PERSISTENT):
        block, column = grouped_tile(tile, num_blocks, num_columns, GROUP)
        expert, position, in_rows, row = block_rows(sorted_rows, block_expert, block_row, block_row_end, block, BLOCK_M)
        h = column * BLOCK_H + tl.arange(0, BLOCK_H)
        in_columns = h < hidden_size
        source = row // top_k if GATHERED else position
        total = scaled_sums(codes, scales, w2, w2_scales, source, in_rows, expert, column, hidden_size,
                            intermediate_size, row_start, column_start, stride_scales_B, stride_w_E, stride_w_H,
                            stride_w_I, stride_s_E, stride_s_H, stride_s_I, SCALE_ROWS, SCALE_COLUMNS, BLOCK_M, BLOCK_H,
                            BLOCK_I)
        if HAS_BIAS:
            bias_at = w2_bias + expert.to(tl.int64) * stride_bias_E + h.to(tl.int64) * stride_bias_H
            total += tl.load(bias_at, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        if HAS_WEIGHTS:
            total *= tl.load(row_weights + row, mask=in_rows, other=0.0)[:, None]
        down_at = down + row.to(tl.int64)[:, None] * hidden_size + h[None, :]
        tl.store(down_at, total.to(down.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


def scaled_down(rounded: RoundedRows, dtype: torch.dtype, w2: Encoded, w2_bias_EH: torch.Tensor | None,
                row_weights_R: torch.Tensor | None, alignment: Alignment, tile: Tile, top_k: int = 1) -> torch.Tensor:
    """down_RH in (token, slot) order and `dtype`, weighted by row_weights_R (fp32, (token, slot) order) if given.

    rounded: rows of I codes, in expert order or of tokens. Rows of ids without an expert at hand stay unwritten;
    the combine kernel does not read them.
    """
    num_rows, (_, hidden, intermediate), device = alignment.local_ids_R.numel(), w2.shape, w2.codes.device
    down_RH = torch.empty(num_rows, hidden, dtype=dtype, device=device)
    stride_E, stride_H = (0, 0) if w2_bias_EH is None else w2_bias_EH.stride()
    launch_grouped(scaled_down_kernel, alignment, triton.cdiv(hidden, tile.block_n), tile, device,
                   **product_arguments(rounded, w2, "w2"), w2_bias=down_RH if w2_bias_EH is None else w2_bias_EH,
                   HAS_BIAS=w2_bias_EH is not None, down=down_RH, HAS_WEIGHTS=row_weights_R is not None,
                   row_weights=down_RH if row_weights_R is None else row_weights_R.contiguous(), hidden_size=hidden,
                   intermediate_size=intermediate, top_k=top_k, GATHERED=rounded.by_token,
                   stride_bias_E=stride_E, stride_bias_H=stride_H,
                   BLOCK_H=tile.block_n, BLOCK_I=tile.block_k)
    return down_RH
