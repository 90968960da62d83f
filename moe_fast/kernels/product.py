"""The dense product of the router, forward and backward: any strides, accumulated in fp32."""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from moe_fast.invariance import blocks_for_tiles
from moe_fast.launch import launch
from moe_fast.tiles import ALIGNED, Load, Tile, gemm_tile


@triton.jit
def inner_products(left, right, bias, m, n, num_rows, num_columns, inner_size, first, part_size, stride_left_M,
                   stride_left_K, stride_right_N, stride_right_K, stride_bias_N, HAS_BIAS: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sums of left[m, k] right[n, k] over part_size of k from `first` on, in fp32; the bias with those from 0 on."""
    k = first + tl.arange(0, BLOCK_K)
    left_at = left + m.to(tl.int64)[:, None] * stride_left_M + k.to(tl.int64)[None, :] * stride_left_K
    right_at = right + n.to(tl.int64)[None, :] * stride_right_N + k.to(tl.int64)[:, None] * stride_right_K
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, tl.minimum(first + part_size, inner_size), BLOCK_K):
        in_inner = start + tl.arange(0, BLOCK_K) < inner_size
        left_tile = tl.load(left_at, mask=(m < num_rows)[:, None] & in_inner[None, :], other=0.0)
        right_tile = tl.load(right_at, mask=in_inner[:, None] & (n < num_columns)[None, :], other=0.0)
        # Gradients of logits, and routers kept precise, are fp32 beside tokens of another dtype; fp32 holds both.
        if left_tile.dtype != right_tile.dtype:
            left_tile = left_tile.to(tl.float32)
            right_tile = right_tile.to(tl.float32)
        total = tl.dot(left_tile, right_tile, total, input_precision="ieee")
        left_at += BLOCK_K * stride_left_K
        right_at += BLOCK_K * stride_right_K
    if HAS_BIAS:
        total += tl.load(bias + n * stride_bias_N, mask=(n < num_columns) & (first == 0),
                         other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def product_kernel(left, right, bias, result, num_rows, num_columns, inner_size, part_size, stride_left_M,
                   stride_left_K, stride_right_N, stride_right_K, stride_bias_N, stride_result_P, stride_result_M,
                   HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """result[p] = the sums over part p of the inner size in left @ right^T (+ bias), accumulated in fp32."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    total = inner_products(left, right, bias, m, n, num_rows, num_columns, inner_size, part * part_size, part_size,
                           stride_left_M, stride_left_K, stride_right_N, stride_right_K, stride_bias_N, HAS_BIAS,
                           BLOCK_M, BLOCK_N, BLOCK_K)
    result_at = result + part.to(tl.int64) * stride_result_P + m.to(tl.int64)[:, None] * stride_result_M + n[None, :]
    tl.store(result_at, total.to(result.dtype.element_ty), mask=(m < num_rows)[:, None] & (n < num_columns)[None, :])


def product(left_MK: torch.Tensor, right_NK: torch.Tensor, dtype: torch.dtype,
            bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """left_MK @ right_NK^T + bias_N, (M, N) in `dtype`; operands of different dtypes are multiplied in fp32."""
    (num_rows, inner), num_columns = left_MK.shape, right_NK.shape[0]
    operands = torch.promote_types(left_MK.dtype, right_NK.dtype)
    # As if a block of rows were an expert's; columns are aligned, since none of them is a row in memory.
    load = Load(num_rows, blocks_for_tiles(triton.cdiv(num_rows, 32)))
    columns = triton.cdiv(num_columns, ALIGNED) * ALIGNED
    tile = gemm_tile(left_MK.device, operands, load, columns, inner, kernel="product")
    block_n = max(16, min(tile.block_n, triton.next_power_of_2(num_columns)))
    return product_parts(left_MK, right_NK, bias_N, replace(tile, block_n=block_n), 1, max(inner, 1), dtype)[0]


def product_parts(left_MK: torch.Tensor, right_NK: torch.Tensor, bias_N: torch.Tensor | None, tile: Tile,
                  num_parts: int, part_size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(P, M, N) in `dtype`: what each part of K, `part_size` long, adds to the product, the bias with the first.

    part_size: a multiple of the tile's where there are several.
    """
    (num_rows, inner), num_columns, device = left_MK.shape, right_NK.shape[0], left_MK.device
    result_PMN = torch.empty(num_parts, num_rows, num_columns, dtype=dtype, device=device)
    launch(product_kernel, (triton.cdiv(num_rows, tile.block_m), triton.cdiv(num_columns, tile.block_n), num_parts),
           device, left=left_MK, right=right_NK, bias=left_MK if bias_N is None else bias_N, result=result_PMN,
           num_rows=num_rows, num_columns=num_columns, inner_size=inner, part_size=part_size,
           stride_left_M=left_MK.stride(0), stride_left_K=left_MK.stride(1), stride_right_N=right_NK.stride(0),
           stride_right_K=right_NK.stride(1), stride_bias_N=0 if bias_N is None else bias_N.stride(0),
           stride_result_P=result_PMN.stride(0), stride_result_M=result_PMN.stride(1), HAS_BIAS=bias_N is not None,
           BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, num_warps=tile.num_warps,
           num_stages=tile.num_stages)
    return result_PMN


def column_sums(parts_TN: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(N,) in `dtype`: rows added up in fp32 and in fixed order, as a product with ones."""
    ones_1T = torch.ones(1, 1, dtype=parts_TN.dtype, device=parts_TN.device).expand(1, len(parts_TN))
    return product(ones_1T, parts_TN.T, dtype)[0]
