"""Tile sizes per device, dtype and shape, as data.

On a GPU the sizes follow the rows per expert, as vLLM's Triton path does: few rows want small tiles and
more of them. The interpreter pays per program and per tile operation, so its tiles are as large as a
small shape allows while every shape above 64 still crosses a tile border in each direction.
"""

from dataclasses import dataclass

import torch

INTERPRETER_TILE = 64
INTERPRETER_LARGE_TILE = 1024


@dataclass(frozen=True)
class Tile:
    """A GEMM tile (rows, output features, inner) and the compiler's options; group: row blocks per L2 group."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    group: int = 8


def _power_of_two_at_least(value: int, low: int, high: int) -> int:
    size = low
    while size < min(value, high):
        size *= 2
    return size


def gemm_tile(device: torch.device, dtype: torch.dtype, rows_per_expert: int, out_features: int,
              in_features: int, accumulators: int = 1) -> Tile:
    """The tile of a grouped GEMM; `accumulators` is 2 for the fused gate/up product."""
    if device.type == "cpu":
        return _interpreter_tile(rows_per_expert, out_features, in_features)
    if dtype == torch.float32:
        # IEEE fp32 products run on the plain FMA units: registers, not shared memory, are the limit.
        return Tile(_power_of_two_at_least(rows_per_expert, 16, 64), 64, 32, num_warps=4, num_stages=2)
    if rows_per_expert <= 16:
        return Tile(16, 128 // accumulators, 128, num_warps=4, num_stages=4, group=1)
    if rows_per_expert <= 64:
        return Tile(_power_of_two_at_least(rows_per_expert, 16, 64), 128, 64, num_warps=4, num_stages=4, group=1)
    return Tile(128, 256 // accumulators, 64, num_warps=8, num_stages=3, group=8)


def _interpreter_tile(rows_per_expert: int, out_features: int, in_features: int) -> Tile:
    block_m = _power_of_two_at_least(rows_per_expert, 16, 64)

    def width(size: int) -> int:
        return INTERPRETER_TILE if size <= 4 * INTERPRETER_TILE else INTERPRETER_LARGE_TILE

    return Tile(block_m, width(out_features), width(in_features), group=1)
