"""Products of codes under scales, as DeepGEMM has them: the sum of each block along K joins an fp32 register.

Codes are multiplied as they are, on units for 8 bits where an architecture has them. Those of sm_90 keep about 14 bits
of a sum, hence no sum in them is longer than a block (DeepSeek-V3, arXiv 2412.19437, section 3.3.2). Blocks are those
of the weight's own grid, in which a rank's part may begin anywhere; both operands' scales change where one ends.
"""

import torch
import triton
import triton.language as tl

from moe_fast.kernels.e4m3 import operand, scale_in_single
from moe_fast.kernels.round_rows import RoundedRows, as_operand
from moe_fast.tiles import Load, Tile, gemm_tile
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.schemes import ENCODINGS

LONGEST_SUM = 128
"""Products that a sum in a matrix unit has where scales do not change along K."""


@triton.jit
def codes_at(codes, row, k, row_size):
    """Addresses of the (row, k) elements of rows that lie side by side."""
    return codes + row.to(tl.int64)[:, None] * row_size + k[None, :]


@triton.jit
def scales_of_rows(scales, row, in_rows, block, stride_B):
    """Each row's scale of a block along K."""
    return tl.load(scales + row.to(tl.int64) + tl.cast(block, tl.int64) * stride_B, mask=in_rows, other=0.0)


@triton.jit
def scales_of_columns(scales, expert, n, in_columns, block, row_start, stride_E, stride_N, stride_K,
                      SCALE_ROWS: tl.constexpr):
    """Each result column's scale of a block along K: that of a row of the weight, which begins `row_start` inside."""
    row = ((n + row_start) // SCALE_ROWS).to(tl.int64)
    at = scales + expert.to(tl.int64) * stride_E + row * stride_N + tl.cast(block, tl.int64) * stride_K
    return scale_in_single(tl.load(at, mask=in_columns, other=0))


@triton.jit
def joined(total, rows, weights, row_scale, column_scale, IN_BLOCKS: tl.constexpr):
    """total + rows @ weights, times their scales where these change along K."""
    part = tl.dot(operand(rows), operand(weights))
    if IN_BLOCKS:
        part = part * row_scale[:, None] * column_scale[None, :]
    return total + part


def scaled_tile(device: torch.device, load: Load, encoded: Encoded, accumulators: int, kernel: str,
                block_m: int | None = None) -> Tile:
    """The tile of a product of codes: as that of bf16, with blocks of the scheme along the sum.

    Beside every accumulator there is the sum of a block, so that columns are half as many.
    """
    (num_rows, num_columns), size = encoded.shape[-2:], ENCODINGS[encoded.scheme].columns or LONGEST_SUM
    tile = gemm_tile(device, torch.bfloat16, load, num_rows, num_columns, accumulators, kernel=kernel, block_m=block_m)
    columns = tile.block_n if device.type == "cpu" else min(tile.block_n, 128 // accumulators)
    return Tile(tile.block_m, columns, size, tile.num_warps, tile.num_stages, tile.group)


def product_arguments(rounded: RoundedRows, encoded: Encoded, name: str) -> dict[str, object]:
    """What of a launch the operands need; `name`: of the weight's argument, w13 or w2."""
    encoding, strides = ENCODINGS[encoded.scheme], list(encoded.scales.stride())
    for axis, size in ((-2, encoding.rows), (-1, encoding.columns)):
        if size is None:
            strides[axis] = 0  # one for all
    letters = {"w13": "EGIH", "w2": "EHI"}[name]
    return {"codes": rounded.codes_RK, "scales": rounded.scales_RB, name: as_operand(encoded.codes.view(torch.uint8)),
            f"{name}_scales": encoded.scales, "row_start": encoded.row_start, "column_start": encoded.column_start,
            "stride_scales_B": rounded.scales_RB.stride(1), "SCALE_ROWS": encoding.rows or 1,
            "IN_BLOCKS": encoding.columns is not None,
            **{f"stride_w_{letter}": stride for letter, stride in zip(letters, encoded.codes.stride(), strict=True)},
            **{f"stride_s_{letter}": stride for letter, stride in zip(letters, strides, strict=True)}}
