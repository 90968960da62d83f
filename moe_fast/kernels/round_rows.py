"""Rows as 8-bit codes under scales: what a product of 8-bit operands takes in place of tokens and activations."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moe_fast.architecture import architecture
from moe_fast.kernels.align import Alignment
from moe_fast.kernels.e4m3 import e4m3_of
from moe_fast.launch import launch
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.vocabulary import Scheme

WHOLE_ROW, FIXED = 0, -1
"""Sizes of blocks that are none: one scale for all of a row, and the scale that its expert fixes."""
SIZES = {Scheme.FP8_TENSOR: FIXED, Scheme.FP8_ROW: WHOLE_ROW,
         **{scheme: ENCODINGS[scheme].columns or WHOLE_ROW for scheme in (Scheme.FP8_BLOCK, Scheme.MXFP8)}}
"""Schemes whose products take rounded rows, and how many columns share a scale."""
_BLOCK_R, _BLOCK_R_INTERPRETED, _COLUMNS, _WARPS = 4, 64, 512, 4
NATIVE = ("sm_89", "sm_90", "sm_100", "sm_103", "sm_120")
"""Architectures for which Triton has e4m3, and multiplies it on matrix units."""


@dataclass(frozen=True)
class RoundedRows:
    """codes_RK (R, K): float8_e4m3fn, or uint8 where Triton has no such type; scales_RB (R, blocks): fp32.

    by_token: a row for each token, not for each position in expert order.
    """

    codes_RK: torch.Tensor
    scales_RB: torch.Tensor
    by_token: bool


@triton.jit
def scale_of(largest, POWER_OF_TWO: tl.constexpr):
    """largest / 448 in fp32, or the next power of two; 1 where that is no normal number."""
    scale = tl.div_rn(largest, tl.full(largest.shape, 448.0, tl.float32))
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        return tl.where(largest > 448 * 2.0**-127, scale, 1.0)
    else:
        return tl.where(scale < 2.0**-126, 1.0, scale)


@triton.jit
def magnitude(value):
    """What of a number counts for a scale: nothing where it is not finite."""
    size = tl.abs(value)
    return tl.where(size < float("inf"), size, 0.0)


@triton.jit
def code_under(value, scale):
    """Codes of value / scale; e4m3 has no infinity, so that under a scale made without it one is NaN."""
    return e4m3_of(tl.where(tl.abs(value) < float("inf"), tl.div_rn(value, scale), float("nan")))


@triton.jit
def round_rows_kernel(rows, row_weights, codes, scales, input_scales, sorted_rows, local_ids, num_sorted, num_rows,
                      num_columns, column_start, top_k, stride_rows_R, stride_rows_K, stride_scales_B,
                      SIZE: tl.constexpr, POWER_OF_TWO: tl.constexpr, SORTED: tl.constexpr, GATHERED: tl.constexpr,
                      HAS_WEIGHTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """codes[row] = e4m3(rows[row] / scales[row, block]), the scale from the largest magnitude of each block.

    SORTED: rows lie in expert order, and those past the last are none; GATHERED: they are read by token, HAS_WEIGHTS:
    and multiplied with the weight of the routed row.
    """
    BLOCKS: tl.constexpr = BLOCK_K // SIZE if SIZE > 0 else 1
    column_parts = tl.maximum(tl.cdiv(column_start + num_columns, BLOCK_K), 1) if SIZE != 0 else 1
    part = tl.program_id(0) % column_parts
    row = (tl.program_id(0) // column_parts) * BLOCK_R + tl.arange(0, BLOCK_R)
    limit = num_rows
    if SORTED:
        limit = tl.load(num_sorted)
    in_rows = row < limit
    source, weight = row, 1.0
    if GATHERED:
        sorted_row = tl.load(sorted_rows + row, mask=in_rows, other=0)
        source = sorted_row // top_k
        if HAS_WEIGHTS:
            weight = tl.load(row_weights + sorted_row, mask=in_rows, other=0.0)[:, None]
    rows_at = rows + source.to(tl.int64)[:, None] * stride_rows_R
    codes_at = codes + row.to(tl.int64)[:, None] * num_columns
    k = tl.arange(0, BLOCK_K)
    if SIZE == 0:
        largest = tl.zeros((BLOCK_R,), tl.float32)
        for start in range(0, num_columns, BLOCK_K):
            inside = in_rows[:, None] & (start + k < num_columns)[None, :]
            tile = tl.load(rows_at + (start + k).to(tl.int64)[None, :] * stride_rows_K, mask=inside, other=0.0)
            largest = tl.maximum(largest, tl.max(magnitude(tile.to(tl.float32) * weight), axis=1))
        scale = scale_of(largest, POWER_OF_TWO)
        tl.store(scales + row, scale, mask=in_rows)
        for start in range(0, num_columns, BLOCK_K):
            inside = in_rows[:, None] & (start + k < num_columns)[None, :]
            tile = tl.load(rows_at + (start + k).to(tl.int64)[None, :] * stride_rows_K, mask=inside, other=0.0)
            value = tile.to(tl.float32) * weight
            tl.store(codes_at + (start + k)[None, :], code_under(value, scale[:, None]), mask=inside)
    else:
        column = part * BLOCK_K + k - column_start
        inside = in_rows[:, None] & ((column >= 0) & (column < num_columns))[None, :]
        tile = tl.load(rows_at + column.to(tl.int64)[None, :] * stride_rows_K, mask=inside, other=0.0).to(tl.float32)
        tile *= weight
        if SIZE < 0:
            sorted_row = tl.load(sorted_rows + row, mask=in_rows, other=0)
            expert = tl.load(local_ids + sorted_row, mask=in_rows, other=0)
            scale = tl.load(input_scales + expert, mask=in_rows, other=1.0)
            if part == 0:
                tl.store(scales + row, scale, mask=in_rows)
            found = e4m3_of(tl.div_rn(tile, scale[:, None]))
        else:
            blocked = tile.reshape(BLOCK_R, BLOCKS, SIZE)
            scale = scale_of(tl.max(magnitude(blocked), axis=2), POWER_OF_TWO)
            block = part * BLOCKS + tl.arange(0, BLOCKS)
            in_blocks = block * SIZE < column_start + num_columns
            scales_at = scales + row.to(tl.int64)[:, None] + block.to(tl.int64)[None, :] * stride_scales_B
            tl.store(scales_at, scale, mask=in_rows[:, None] & in_blocks[None, :])
            found = code_under(blocked, scale[:, :, None]).reshape(BLOCK_R, BLOCK_K)
        tl.store(codes_at + column[None, :], found, mask=inside)


def round_rows(rows_RK: torch.Tensor, scheme: Scheme, column_start: int, input_scale_E: torch.Tensor | None,
               alignment: Alignment, top_k: int | None = None,
               row_weights_R: torch.Tensor | None = None) -> RoundedRows:
    """Codes and scales of rows: by the rules of Numerics.products that SIZES has, blocks from `column_start` on.

    top_k: rows are tokens, (T, K), and so are the codes, but where each expert fixes its scale: then there is a row
    for every position, as there is where row_weights_R (fp32, (token, slot) order) are given, which multiply tokens
    before these are rounded. Else they lie in expert order, (R, K), as their codes do; those past the last stay
    unwritten.
    What is not finite has no part in a block's scale; its code is NaN, which a product hands to all of the row. Under a
    fixed scale NaN is NaN too, but an infinity is 448, as all that is beyond.
    """
    size, (num_rows, num_columns), device = SIZES[scheme], rows_RK.shape, rows_RK.device
    by_token = top_k is not None and size != FIXED and row_weights_R is None
    column_start = column_start if num_columns else 0  # no columns have no block, wherever they begin
    num_codes = num_rows if by_token else alignment.sorted_rows_R.numel()
    num_blocks = -(-(column_start + num_columns) // size) if size > 0 else 1
    codes_RK = torch.empty(num_codes, num_columns, dtype=torch.uint8, device=device)
    # Of a block the scales of rows lie side by side, as a product reads them.
    scales_BR = torch.empty(num_blocks, num_codes, dtype=torch.float32, device=device)
    block_r = _BLOCK_R_INTERPRETED if device.type == "cpu" else _BLOCK_R
    # A fixed scale is written where there are no columns too: a product of none takes it, and 0 times NaN is NaN.
    parts = max(triton.cdiv(column_start + num_columns, _COLUMNS), 1) if size else 1
    launch(round_rows_kernel, (triton.cdiv(num_codes, block_r) * parts,), device, rows=rows_RK, codes=codes_RK,
           row_weights=scales_BR if row_weights_R is None else row_weights_R.contiguous(), scales=scales_BR,
           HAS_WEIGHTS=row_weights_R is not None,
           input_scales=scales_BR if input_scale_E is None else input_scale_E.contiguous(),
           sorted_rows=alignment.sorted_rows_R, local_ids=alignment.local_ids_R, num_sorted=alignment.offsets[-1:],
           num_rows=num_codes, num_columns=num_columns, column_start=column_start, top_k=top_k or 1,
           stride_rows_R=rows_RK.stride(0), stride_rows_K=rows_RK.stride(1), stride_scales_B=num_codes, SIZE=size,
           POWER_OF_TWO=scheme is Scheme.MXFP8, SORTED=not by_token, GATHERED=top_k is not None and not by_token,
           BLOCK_R=block_r, BLOCK_K=_COLUMNS, num_warps=_WARPS)
    return RoundedRows(as_operand(codes_RK), scales_BR.T, by_token)


def as_operand(codes: torch.Tensor) -> torch.Tensor:
    """Codes of e4m3 as kernels take them on that device: as such, or as bytes."""
    return codes.view(torch.float8_e4m3fn if multiplies_codes(codes.device) else torch.uint8)


def multiplies_codes(device: torch.device) -> bool:
    """Whether Triton has products of e4m3 there; elsewhere kernels decode it."""
    return device.type == "cpu" or architecture(device) in NATIVE
