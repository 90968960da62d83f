"""Gradients of the experts' weights from codes: one product over the rows of each expert, without atomics."""

import torch
import triton
import triton.language as tl

from moe_fast.capabilities import LONGEST_SUM
from moe_fast.kernels.round_columns import Places, RoundedColumns
from moe_fast.kernels.scaled import block_sum, of_codes
from moe_fast.launch import launch
from moe_fast.tiles import ALIGNED, Load, gemm_tile


@triton.jit
def scaled_weight_gradient_kernel(rows, row_scales, tokens, token_scales, result, starts, num_features, width,
                                  num_places, stride_result_E, stride_result_G, stride_result_I, stride_result_H,
                                  NUM_PARTS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr,
                                  BLOCK_P: tl.constexpr):
    """result[e, g, i, h] = sum over places of e of rows[g, i, place] * tokens[h, place], times both scales."""
    tiles_i = tl.cdiv(num_features, BLOCK_I)
    tiles_h = tl.cdiv(width, BLOCK_H)
    program = tl.program_id(0)
    part = program // tiles_h // tiles_i
    expert = (part // NUM_PARTS).to(tl.int64)
    g = (part % NUM_PARTS).to(tl.int64)
    i = program // tiles_h % tiles_i * BLOCK_I + tl.arange(0, BLOCK_I)
    h = program % tiles_h * BLOCK_H + tl.arange(0, BLOCK_H)
    in_features, in_width = i < num_features, h < width
    feature, wide_h = g * num_features + i, h.to(tl.int64)
    # Codes are loaded 16 at a time, which the compiler does where it knows that first place and mask allow it.
    start, end = tl.multiple_of(tl.load(starts + expert), 16), tl.multiple_of(tl.load(starts + expert + 1), 16)
    total = tl.zeros((BLOCK_I, BLOCK_H), tl.float32)
    for first in range(start, end, BLOCK_P):
        place = first + tl.arange(0, BLOCK_P)
        inside = place < end
        rows_tile = tl.load(rows + feature[:, None] * num_places + place[None, :],
                            mask=in_features[:, None] & inside[None, :], other=0.0)
        tokens_tile = tl.load(tokens + wide_h[None, :] * num_places + place[:, None],
                              mask=inside[:, None] & in_width[None, :], other=0.0)
        total += block_sum(rows_tile, tokens_tile)
    row_scale = tl.load(row_scales + expert * (NUM_PARTS * num_features) + feature, mask=in_features, other=0.0)
    token_scale = tl.load(token_scales + expert * width + wide_h, mask=in_width, other=0.0)
    total = total * row_scale[:, None] * token_scale[None, :]
    at = result + expert * stride_result_E + g * stride_result_G + i.to(tl.int64)[:, None] * stride_result_I
    tl.store(at + wide_h[None, :] * stride_result_H, total.to(result.dtype.element_ty),
             mask=in_features[:, None] & in_width[None, :])


def scaled_weight_gradient(rows: RoundedColumns, tokens: RoundedColumns, result_EGIH: torch.Tensor,
                           places: Places) -> None:
    """Write every element of result_EGIH, of any strides: for experts without rows exact zeros.

    rows: G * I columns; tokens: H columns.
    """
    (num_experts, num_parts, num_features, width), device = result_EGIH.shape, result_EGIH.device
    inner = triton.cdiv(places.count // max(num_experts, 1), ALIGNED) * ALIGNED
    # Every projection of every expert is a product of its own, whose rows are the features.
    load = Load(num_features * num_experts * num_parts, num_experts * num_parts)
    tile = gemm_tile(device, torch.bfloat16, load, width, inner, kernel="scaled_weight_gradient")
    tile = of_codes(tile, device, LONGEST_SUM, 1)
    num_tiles = triton.cdiv(num_features, tile.block_m) * triton.cdiv(width, tile.block_n)
    launch(scaled_weight_gradient_kernel, (num_experts * num_parts * num_tiles,), device, rows=rows.codes_NP,
           row_scales=rows.scales_EN, tokens=tokens.codes_NP, token_scales=tokens.scales_EN, result=result_EGIH,
           starts=places.starts, num_features=num_features, width=width, num_places=places.count,
           **{f"stride_result_{axis}": stride for axis, stride in zip("EGIH", result_EGIH.stride(), strict=True)},
           NUM_PARTS=num_parts, BLOCK_I=tile.block_m, BLOCK_H=tile.block_n, BLOCK_P=tile.block_k,
           num_warps=tile.num_warps, num_stages=tile.num_stages)
