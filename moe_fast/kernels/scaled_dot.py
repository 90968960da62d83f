"""Dot products of rows with those that a product of codes makes: gradients of routing weights. No row is stored."""

import torch
import triton
import triton.language as tl

from moe_fast.kernels.align import Alignment
from moe_fast.kernels.grouped import block_rows, grouped_tile, launch_grouped
from moe_fast.kernels.round_rows import RoundedRows
from moe_fast.kernels.scaled import product_arguments
from moe_fast.kernels.scaled_down import scaled_sums
from moe_fast.tiles import Tile
from moe_ref.contract.encoded import Encoded


@triton.jit
def scaled_dot_kernel(codes, scales, w2, w2_scales, w2_bias, tokens, parts, sorted_rows, block_expert, block_row,
                      block_row_end, block_count, hidden_size, intermediate_size, top_k, row_start, column_start,
                      stride_scales_B, stride_w_E, stride_w_H, stride_w_I, stride_s_E, stride_s_H, stride_s_I,
                      stride_bias_E, stride_bias_H, stride_tokens_T, stride_tokens_H, HAS_BIAS: tl.constexpr,
                      SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr,
                      BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr, GROUP: tl.constexpr, PERSISTENT: tl.constexpr):
    """parts[row, tile] = sum of tokens[token] * (scaled_down_kernel's sums + b2), codes of rows by position."""
    num_blocks, num_columns = tl.load(block_count), tl.cdiv(hidden_size, BLOCK_H)
    for tile in tl.range(tl.program_id(0), num_blocks * num_columns, tl.num_programs(0), flatten=PERSISTENT):
        block, column = grouped_tile(tile, num_blocks, num_columns, GROUP)
        expert, position, in_rows, row = block_rows(sorted_rows, block_expert, block_row, block_row_end, block, BLOCK_M)
        total = scaled_sums(codes, scales, w2, w2_scales, position, in_rows, expert, column, hidden_size,
                            intermediate_size, row_start, column_start, stride_scales_B, stride_w_E, stride_w_H,
                            stride_w_I, stride_s_E, stride_s_H, stride_s_I, SCALE_ROWS, SCALE_COLUMNS, BLOCK_M, BLOCK_H,
                            BLOCK_I)
        h = column * BLOCK_H + tl.arange(0, BLOCK_H)
        in_columns, wide_h = h < hidden_size, h.to(tl.int64)
        if HAS_BIAS:
            bias_at = w2_bias + expert.to(tl.int64) * stride_bias_E + wide_h * stride_bias_H
            total += tl.load(bias_at, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        tokens_at = tokens + (row // top_k).to(tl.int64)[:, None] * stride_tokens_T + wide_h[None, :] * stride_tokens_H
        other = tl.load(tokens_at, mask=in_rows[:, None] & in_columns[None, :], other=0.0).to(tl.float32)
        tl.store(parts + row.to(tl.int64) * num_columns + column, tl.sum(total * other, axis=1), mask=in_rows)


def scaled_dot(rounded: RoundedRows, w2: Encoded, w2_bias_EH: torch.Tensor | None, tokens_TH: torch.Tensor,
               alignment: Alignment, top_k: int, tile: Tile) -> torch.Tensor:
    """(R,) in fp32 and (token, slot) order: the token of each row times rounded @ w2^T (+ bias), summed over H.

    rounded: rows of I codes in expert order. 0 for rows of no expert at hand.
    """
    num_rows, (_, hidden, intermediate), device = alignment.local_ids_R.numel(), w2.shape, w2.codes.device
    num_columns = triton.cdiv(hidden, tile.block_n)
    parts = torch.zeros(num_rows, num_columns, dtype=torch.float32, device=device)
    stride_E, stride_H = (0, 0) if w2_bias_EH is None else w2_bias_EH.stride()
    launch_grouped(scaled_dot_kernel, alignment, num_columns, tile, device, **product_arguments(rounded, w2, "w2"),
                   w2_bias=parts if w2_bias_EH is None else w2_bias_EH, HAS_BIAS=w2_bias_EH is not None,
                   tokens=tokens_TH, parts=parts, hidden_size=hidden, intermediate_size=intermediate, top_k=top_k,
                   stride_bias_E=stride_E, stride_bias_H=stride_H, stride_tokens_T=tokens_TH.stride(0),
                   stride_tokens_H=tokens_TH.stride(1), BLOCK_H=tile.block_n, BLOCK_I=tile.block_k)
    return parts.sum(1)
