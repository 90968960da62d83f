"""Products of codes under scales, as DeepGEMM has them: the sum of each block along K joins an fp32 register.

Codes are multiplied as they are, on units for 8 bits where an architecture has them. Those of sm_90 keep about 14 bits
of a sum, hence no sum in them is longer than a block (DeepSeek-V3, arXiv 2412.19437, section 3.3.2). Blocks are those
of the weight's own grid, in which a rank's part may begin anywhere; both operands' scales change where one ends.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from moe_fast.capabilities import LONGEST_SUM
from moe_fast.kernels.e4m3 import operand, scale_in_single
from moe_fast.kernels.round_rows import RoundedRows, as_operand, multiplies_codes
from moe_fast.tiles import Load, Tile, gemm_tile
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.vocabulary import Scheme


@triton.jit
def codes_at(codes, row, k, row_size):
    """Addresses of the (row, k) elements of rows that lie side by side."""
    return codes + row.to(tl.int64)[:, None] * row_size + k[None, :]


@triton.jit
def scales_of_rows(scales, row, in_rows, block, stride_B):
    """Each row's scale of a block along K."""
    return tl.load(scales + row.to(tl.int64) + tl.cast(block, tl.int64) * stride_B, mask=in_rows, other=0.0)


@triton.jit
def scales_of_columns(scales, expert, column, block, num_columns, row_start, stride_E, stride_N, stride_K,
                      SCALE_ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Each result column's scale of a block along K: that of a row of the weight, which begins `row_start` inside."""
    first = column * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    at = scales + expert.to(tl.int64) * stride_E + tl.cast(block, tl.int64) * stride_K
    if SCALE_ROWS >= BLOCK_N:
        # Two scalars at most, where a vector of scales would take a register of its own for every column.
        row = (first + row_start) // SCALE_ROWS
        border = (row + 1) * SCALE_ROWS - row_start
        at += row.to(tl.int64) * stride_N
        upper = tl.load(at + stride_N, mask=border < tl.minimum(first + BLOCK_N, num_columns), other=0)
        return tl.where(n < border, scale_in_single(tl.load(at)), scale_in_single(upper))
    else:
        row = ((n + row_start) // SCALE_ROWS).to(tl.int64)
        return scale_in_single(tl.load(at + row * stride_N, mask=n < num_columns, other=0))


@triton.jit
def block_sum(rows, weights):
    """rows @ weights of codes, in a sum of its own."""
    return tl.dot(operand(rows), operand(weights))


def scaled_tile(device: torch.device, load: Load, encoded: Encoded, accumulators: int, kernel: str,
                block_m: int | None = None) -> Tile:
    """The tile of a product of codes: as that of bf16, with no more than a block of the scheme along the sum.

    Beside every accumulator there are the sum of a block and its scales, so that columns are fewer, and fewest where
    every row of the weight has scales along K. Codes that are decoded first take registers too: fewer along the sum,
    more warps and fewer stages. `moe-ref compile` says what spills.
    """
    (num_rows, num_columns), size = encoded.shape[-2:], ENCODINGS[encoded.scheme].columns or LONGEST_SUM
    tile = gemm_tile(device, torch.bfloat16, load, num_rows, num_columns, accumulators, kernel=kernel, block_m=block_m)
    return of_codes(tile, device, size, accumulators, 32 if encoded.scheme is Scheme.MXFP8 else 128)


def of_codes(tile: Tile, device: torch.device, size: int, accumulators: int, most_columns: int = 128) -> Tile:
    """A tile of bf16 as one of codes, with `size` of them along a sum."""
    if device.type == "cpu":
        return replace(tile, block_k=size)
    columns = 128 // accumulators
    if not multiplies_codes(device):
        columns, size = columns // 2, min(size, 64)
        if tile.block_m >= 64:
            tile = replace(tile, num_warps=8, num_stages=2)
    return replace(tile, block_n=min(tile.block_n, columns, most_columns), block_k=size, descriptors=False,
                   persistent=False)


def product_arguments(rounded: RoundedRows, encoded: Encoded, name: str) -> dict[str, object]:
    """What of a launch the operands need; `name`: of the weight's argument, w13 or w2."""
    encoding, strides = ENCODINGS[encoded.scheme], list(encoded.scales.stride())
    for axis, size in ((-2, encoding.rows), (-1, encoding.columns)):
        if size is None:
            strides[axis] = 0  # one for all
    column_start = encoded.column_start if encoded.num_columns else 0  # no columns have no block to read a scale of
    letters = {"w13": "EGIH", "w2": "EHI"}[name]
    return {"codes": rounded.codes_RK, "scales": rounded.scales_RB, name: as_operand(encoded.codes.view(torch.uint8)),
            f"{name}_scales": encoded.scales, "row_start": encoded.row_start, "column_start": column_start,
            "stride_scales_B": rounded.scales_RB.stride(1), "SCALE_ROWS": encoding.rows or 1,
            "SCALE_COLUMNS": encoding.columns or 0,
            **{f"stride_w_{letter}": stride for letter, stride in zip(letters, encoded.codes.stride(), strict=True)},
            **{f"stride_s_{letter}": stride for letter, stride in zip(letters, strides, strict=True)}}
