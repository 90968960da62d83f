"""Tiles of encoded matrices as numbers: codes and scales are read and decoded where a product takes them.

    weight = (code - zero[block]) * scale[block]          in fp32, which is exact, rounded to the tokens' dtype

A scale that a whole row shares, and a second scale, multiply the sums instead: what is left of a weight, a code of int8
or one of e2m1 times a scale of e4m3, is exact in every dtype.

e2m1, e4m3 and e8m0 are decoded by their bits, so that no format has to be one of the compiler's. Blocks are one row
high; along the columns a tile has BLOCK_K / RUN runs of columns that share a block: the columns of a whole block, fewer
where a rank's part begins inside one, one where columns have their group in no order.
"""

from dataclasses import replace
from math import gcd

import torch
import triton
import triton.language as tl

from moe_fast.tiles import Load, Tile, gemm_tile
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.schemes import ENCODINGS


@triton.jit
def e2m1_number(code):
    """fp32 of the 4-bit floats: as the highest bits of an fp32 they are 2^126 too small, also where they are subnormal.
    """
    bits = ((code & 7).to(tl.int32) << 22) | ((code & 8).to(tl.int32) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def e4m3_number(code):
    """fp32 of the 8-bit floats without infinity, in the same way; all ones is NaN."""
    bits = ((code & 127).to(tl.int32) << 20) | ((code & 128).to(tl.int32) << 24)
    number = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where((code & 127) == 127, float("nan"), number)


@triton.jit
def e8m0_number(code):
    """2^(code - 127); of 0 the one that is subnormal in fp32, of 255 NaN."""
    exponent = code.to(tl.int32)
    bits = tl.where(exponent == 0, 0x400000, exponent << 23)
    return tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def scale_number(scale, SCALES: tl.constexpr):
    """A scale as it is stored, in fp32."""
    if SCALES == "e8m0":
        return e8m0_number(scale)
    elif SCALES == "e4m3":
        return e4m3_number(scale)
    else:
        return scale.to(tl.float32)


@triton.jit
def code_tile(codes_at, in_rows, start, num_columns, stride_K, CODES: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_N, BLOCK_K) codes of columns from `start`, 0 outside; of two in a byte the even column is the low half."""
    if CODES == "int8":
        column = start + tl.arange(0, BLOCK_K)
        inside = in_rows[:, None] & (column < num_columns)[None, :]
        return tl.load(codes_at[:, None] + column.to(tl.int64)[None, :] * stride_K, mask=inside, other=0)
    else:
        byte = start // 2 + tl.arange(0, BLOCK_K // 2)
        inside = in_rows[:, None] & (2 * byte < num_columns)[None, :]
        pair = tl.load(codes_at[:, None] + byte.to(tl.int64)[None, :] * stride_K, mask=inside, other=0)
        return tl.interleave(pair & 15, pair >> 4)


@triton.jit
def each_column(value, RUN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_N, BLOCK_K), or what broadcasts to it, from one value for each run of columns."""
    if RUN == 1 or RUN == BLOCK_K:
        return value
    else:
        runs = tl.broadcast_to(value[:, :, None], (BLOCK_N, BLOCK_K // RUN, RUN))
        return runs.reshape(BLOCK_N, BLOCK_K)


@triton.jit
def decoded_tile(codes_at, scales, zeros, groups, matrix, blocks_at, in_rows, start, num_columns, column_start,
                 stride_K, DTYPE: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr, COLUMNS: tl.constexpr,
                 RUN: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_TAIL: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_K, BLOCK_N) in DTYPE of columns from `start`: 0 past the last one.

    codes_at: where the rows' codes begin; blocks_at: the place of their first scale among all; matrix: which one it is.
    """
    weight = code_tile(codes_at, in_rows, start, num_columns, stride_K, CODES, BLOCK_K)
    if COLUMNS != 0:
        first = start + RUN * tl.arange(0, BLOCK_K // RUN)
        if HAS_ORDER:
            block = tl.load(groups + matrix * num_columns + first, mask=first < num_columns, other=0)
        else:
            block = (column_start + first) // COLUMNS
        inside = in_rows[:, None] & (first < num_columns)[None, :]
        scale_at = blocks_at[:, None] + block[None, :]
        scale = scale_number(tl.load(scales + scale_at, mask=inside, other=0), SCALES)
        if CODES == "e2m1":
            number = e2m1_number(weight)
        elif HAS_ZEROS:
            zero = tl.load(zeros + scale_at, mask=inside, other=0).to(tl.float32)
            number = weight.to(tl.float32) - each_column(zero, RUN, BLOCK_N, BLOCK_K)
        else:
            number = weight.to(tl.float32) - 8.0
        weight = number * each_column(scale, RUN, BLOCK_N, BLOCK_K)
        if HAS_TAIL:
            # A code of 0 is -8, or less a zero point, and with a huge scale none that a 0 of the rows takes away.
            weight = tl.where((start + tl.arange(0, BLOCK_K) < num_columns)[None, :], weight, 0.0)
    return tl.trans(weight.to(DTYPE))


@triton.jit
def with_joined_scale(total, scales, second, matrix, blocks_at, in_rows, COLUMNS: tl.constexpr,
                      HAS_SECOND: tl.constexpr):
    """Sums times the scale that their rows of the matrix share, or the second scale, where there is one."""
    if COLUMNS == 0:
        return total * tl.load(scales + blocks_at, mask=in_rows, other=0.0)[None, :]
    elif HAS_SECOND:
        return total * tl.load(second + matrix)
    else:
        return total


def decoded_gemm_tile(device: torch.device, dtype: torch.dtype, load: Load, encoded: Encoded, accumulators: int = 1, *,
                      kernel: str, block_m: int | None = None) -> Tile:
    """The tile of a product whose weights are decoded: not so wide, as they pass through registers.

    Where columns have their group in no order each weight has the address of a scale there as well: two products of 32
    columns of those spill on sm_80 (Triton 3.6).
    """
    *_, num_rows, num_columns = encoded.shape
    tile = gemm_tile(device, dtype, load, num_rows, num_columns, accumulators, kernel=kernel, block_m=block_m)
    if device.type == "cpu":
        return tile
    widest = 16 if encoded.groups is not None and accumulators > 1 else 64
    return replace(tile, block_n=min(tile.block_n, widest), block_k=min(tile.block_k, 64), num_stages=2,
                   descriptors=False, persistent=False)


def encoded_operand(encoded: Encoded, tile: Tile) -> dict[str, object]:
    """What of a launch an encoded matrix is; what a scheme has not is another pointer, and is not read.

    Codes may have any strides; what goes with them is small, and is copied where it is not contiguous.
    """
    encoding, scales = ENCODINGS[encoded.scheme], _bytes(encoded.scales).contiguous()
    assert encoding.rows == 1
    zeros, groups, second = (None if one is None else one.contiguous()
                             for one in (encoded.zeros, encoded.groups, encoded.second_scale))
    return {"codes": encoded.codes, "scales": scales, "zeros": scales if zeros is None else zeros,
            "groups": scales if groups is None else groups, "second": scales if second is None else second,
            "num_blocks_K": scales.shape[-1], "column_start": encoded.column_start, "CODES": encoding.codes.value,
            "SCALES": encoding.scales.value, "COLUMNS": encoding.columns or 0, "RUN": run_of(encoded, tile.block_k),
            "HAS_ZEROS": zeros is not None, "HAS_ORDER": groups is not None, "HAS_SECOND": second is not None,
            "HAS_TAIL": encoded.num_columns % tile.block_k != 0}


def run_of(encoded: Encoded, block_k: int) -> int:
    """How many neighbouring columns of a tile have one block, wherever the tile is."""
    encoding = ENCODINGS[encoded.scheme]
    if encoding.order:
        return 1
    return block_k if encoding.columns is None else gcd(encoding.columns, encoded.column_start, block_k)


def _bytes(scales: torch.Tensor) -> torch.Tensor:
    """8-bit floats as bytes, which every architecture loads."""
    return scales.view(torch.uint8) if scales.dtype == torch.float8_e4m3fn else scales
