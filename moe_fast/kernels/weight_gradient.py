"""Gradients of the experts' weights: one product over the rows of each expert, in their order, without atomics."""

import torch
import triton
import triton.language as tl

from moe_fast.kernels.align import Alignment
from moe_fast.launch import launch
from moe_fast.tiles import ALIGNED, Load, gemm_tile


@triton.jit
def weight_gradient_kernel(rows, tokens, result, sorted_rows, offsets, num_features, width, top_k, stride_rows_R,
                           stride_rows_G, stride_tokens_T, stride_tokens_H, stride_result_E, stride_result_G,
                           stride_result_I, stride_result_H, NUM_PARTS: tl.constexpr, BLOCK_I: tl.constexpr,
                           BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr):
    """result[e, g, i, h] = sum over rows of e of rows[position, g, i] * tokens[token, h], in fp32, rounded once."""
    tiles_i = tl.cdiv(num_features, BLOCK_I)
    tiles_h = tl.cdiv(width, BLOCK_H)
    program = tl.program_id(0)
    part = program // tiles_h // tiles_i
    expert = (part // NUM_PARTS).to(tl.int64)
    g = (part % NUM_PARTS).to(tl.int64)
    i = program // tiles_h % tiles_i * BLOCK_I + tl.arange(0, BLOCK_I)
    h = program % tiles_h * BLOCK_H + tl.arange(0, BLOCK_H)
    wide_h = h.to(tl.int64)[None, :]
    end = tl.load(offsets + expert + 1)
    total = tl.zeros((BLOCK_I, BLOCK_H), tl.float32)
    for first in range(tl.load(offsets + expert), end, BLOCK_R):
        position = first + tl.arange(0, BLOCK_R)
        inside = position < end
        token = tl.load(sorted_rows + position, mask=inside, other=0) // top_k
        rows_at = rows + position.to(tl.int64)[None, :] * stride_rows_R + g * stride_rows_G + i[:, None]
        rows_tile = tl.load(rows_at, mask=(i < num_features)[:, None] & inside[None, :], other=0.0)
        tokens_at = tokens + token.to(tl.int64)[:, None] * stride_tokens_T + wide_h * stride_tokens_H
        tokens_tile = tl.load(tokens_at, mask=inside[:, None] & (h < width)[None, :], other=0.0)
        total = tl.dot(rows_tile, tokens_tile, total, input_precision="ieee")
    at = result + expert * stride_result_E + g * stride_result_G + i.to(tl.int64)[:, None] * stride_result_I
    tl.store(at + wide_h * stride_result_H, total.to(result.dtype.element_ty),
             mask=(i < num_features)[:, None] & (h < width)[None, :])


def weight_gradient(rows_RGI: torch.Tensor, tokens_TH: torch.Tensor, result_EGIH: torch.Tensor,
                    alignment: Alignment, top_k: int) -> None:
    """Write every element of result_EGIH, of any strides: for experts without rows exact zeros.

    rows_RGI: contiguous, in expert order. tokens_TH: gathered by the token of each row.
    """
    num_experts, num_parts, num_features, width = result_EGIH.shape
    rows_per_expert = -(-len(rows_RGI) // max(num_experts, 1))
    # The inner size counts rows, which are aligned however many they are.
    inner = triton.cdiv(rows_per_expert, ALIGNED) * ALIGNED
    # Every projection of every expert is a product of its own, whose rows are the features.
    load = Load(num_features * num_experts * num_parts, num_experts * num_parts)
    tile = gemm_tile(rows_RGI.device, rows_RGI.dtype, load, width, inner, accumulators=2, kernel="weight_gradient")
    num_tiles = triton.cdiv(num_features, tile.block_m) * triton.cdiv(width, tile.block_n)
    stride_E, stride_G, stride_I, stride_H = result_EGIH.stride()
    launch(weight_gradient_kernel, (num_experts * num_parts * num_tiles,), rows_RGI.device, rows=rows_RGI,
           tokens=tokens_TH, result=result_EGIH, sorted_rows=alignment.sorted_rows_R, offsets=alignment.offsets,
           num_features=num_features, width=width, top_k=top_k, stride_rows_R=rows_RGI.stride(0),
           stride_rows_G=rows_RGI.stride(1), stride_tokens_T=tokens_TH.stride(0),
           stride_tokens_H=tokens_TH.stride(1), stride_result_E=stride_E, stride_result_G=stride_G,
           stride_result_I=stride_I, stride_result_H=stride_H, NUM_PARTS=num_parts, BLOCK_I=tile.block_m,
           BLOCK_H=tile.block_n, BLOCK_R=tile.block_k, num_warps=tile.num_warps, num_stages=tile.num_stages)
