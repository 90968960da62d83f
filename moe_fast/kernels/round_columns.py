"""Columns of each expert's rows as 8-bit codes: what a gradient of its weights, a sum over rows, multiplies."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moe_fast.kernels.align import Alignment
from moe_fast.kernels.round_rows import as_operand, code_under, magnitude, scale_of
from moe_fast.launch import launch
from moe_fast.tiles import ALIGNED

_BLOCK, _BLOCK_INTERPRETED, _WARPS = (64, 32), (64, 512), 4


@dataclass(frozen=True)
class RoundedColumns:
    """codes_NP (N, P): e4m3 as as_operand has it; scales_EN (E, N): fp32. Places along P are those of `Places`."""

    codes_NP: torch.Tensor
    scales_EN: torch.Tensor


@dataclass(frozen=True)
class Places:
    """Where rows of experts lie along an axis P: in their order, each expert's first at a multiple of ALIGNED.

    starts: (E + 1,) int32, the last one past the end of all. count: an upper bound of it that needs no device.
    """

    starts: torch.Tensor
    count: int


def places_of(alignment: Alignment, num_experts: int) -> Places:
    """Vectors of codes are loaded at multiples of 16 bytes, wherever an expert's rows begin."""
    offsets = alignment.offsets[:num_experts + 1]
    sizes = (offsets.diff() + ALIGNED - 1) // ALIGNED * ALIGNED
    starts = torch.nn.functional.pad(sizes.cumsum(0, dtype=torch.int32), (1, 0))
    count = alignment.sorted_rows_R.numel() + num_experts * (ALIGNED - 1)
    return Places(starts, triton.cdiv(count, ALIGNED) * ALIGNED)


@triton.jit
def row_values(rows, row_weights, sorted_rows, position, inside, n, width, top_k, stride_rows_R, stride_rows_N,
               BY_TOKEN: tl.constexpr, HAS_WEIGHTS: tl.constexpr):
    """(rows, columns) in fp32: rows[position], or rows[token], times the row's weight; 0 outside."""
    source = position
    if BY_TOKEN or HAS_WEIGHTS:
        row = tl.load(sorted_rows + position, mask=inside, other=0)
        if BY_TOKEN:
            source = row // top_k
    at = rows + source.to(tl.int64)[:, None] * stride_rows_R + n.to(tl.int64)[None, :] * stride_rows_N
    value = tl.load(at, mask=inside[:, None] & (n < width)[None, :], other=0.0).to(tl.float32)
    if HAS_WEIGHTS:
        value *= tl.load(row_weights + row, mask=inside, other=0.0)[:, None]
    return value


@triton.jit
def round_columns_kernel(rows, row_weights, codes, scales, sorted_rows, offsets, starts, width, num_places, top_k,
                         stride_rows_R, stride_rows_N, BY_TOKEN: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
                         BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """codes[n, place] = e4m3(value / scales[e, n]) of row_values, the scale over all rows of e; 0 past its rows."""
    expert = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    largest = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(first, end, BLOCK_R):
        position = start + tl.arange(0, BLOCK_R)
        value = row_values(rows, row_weights, sorted_rows, position, position < end, n, width, top_k, stride_rows_R,
                           stride_rows_N, BY_TOKEN, HAS_WEIGHTS)
        largest = tl.maximum(largest, tl.max(magnitude(value), axis=0))
    scale = scale_of(largest, False)
    tl.store(scales + expert.to(tl.int64) * width + n, scale, mask=n < width)
    # As in scaled_weight_gradient.py: stored 16 at a time.
    place, last = tl.multiple_of(tl.load(starts + expert), 16), tl.multiple_of(tl.load(starts + expert + 1), 16)
    codes_at = codes + n.to(tl.int64)[None, :] * num_places
    for start in range(0, last - place, BLOCK_R):
        ahead = start + tl.arange(0, BLOCK_R)
        position = first + ahead
        value = row_values(rows, row_weights, sorted_rows, position, position < end, n, width, top_k, stride_rows_R,
                           stride_rows_N, BY_TOKEN, HAS_WEIGHTS)
        tl.store(codes_at + (place + ahead)[:, None], code_under(value, scale[None, :]),
                 mask=(place + ahead < last)[:, None] & (n < width)[None, :])


def round_columns(rows_RN: torch.Tensor, row_weights_R: torch.Tensor | None, places: Places, num_experts: int,
                  alignment: Alignment, top_k: int | None = None) -> RoundedColumns:
    """Codes of each expert's columns. top_k: rows are tokens, (T, N), gathered; else they lie in expert order, (R, N).

    row_weights_R: fp32, in (token, slot) order; if given, what is rounded is the product. Of experts without rows
    scales are 1.
    """
    width, device = rows_RN.shape[1], rows_RN.device
    codes_NP = torch.empty(width, places.count, dtype=torch.uint8, device=device)
    scales_EN = torch.empty(num_experts, width, dtype=torch.float32, device=device)
    block_r, block_n = _BLOCK_INTERPRETED if device.type == "cpu" else _BLOCK
    launch(round_columns_kernel, (num_experts, triton.cdiv(width, block_n)), device, rows=rows_RN, codes=codes_NP,
           row_weights=scales_EN if row_weights_R is None else row_weights_R.contiguous(), scales=scales_EN,
           sorted_rows=alignment.sorted_rows_R, offsets=alignment.offsets, starts=places.starts, width=width,
           num_places=places.count, top_k=top_k or 1, stride_rows_R=rows_RN.stride(0),
           stride_rows_N=rows_RN.stride(1), BY_TOKEN=top_k is not None, HAS_WEIGHTS=row_weights_R is not None,
           BLOCK_R=block_r, BLOCK_N=block_n, num_warps=_WARPS)
    return RoundedColumns(as_operand(codes_NP), scales_EN)
