"""Tile sizes per architecture, dtype and shape, as data.

On a GPU the sizes follow the rows per expert, as vLLM's Triton path does: few rows want small tiles and
more of them. `moe-ref compile` finds no product among them that spills registers or takes more shared
memory than a block may have. The interpreter pays per program and per tile operation, so its tiles are as
large as a small shape allows while every shape above 64 still crosses a tile border in each direction.
"""

from dataclasses import dataclass, replace

import torch

from moe_fast.architecture import architecture
from moe_fast.invariance import rows_for_tiles

INTERPRETER_TILE = 64
INTERPRETER_LARGE_TILE = 1024


@dataclass(frozen=True)
class Tile:
    """A GEMM tile (rows, output features, inner) and the compiler's options; group: row blocks per L2 group.

    descriptors: weights, and rows in expert order, are fetched by tensor descriptors where their strides allow that
    (kernels/described.py). persistent: one program for each multiprocessor, which takes tile after tile.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    group: int = 8
    descriptors: bool = False
    persistent: bool = False


@dataclass(frozen=True)
class Entry:
    """The tile up to so many rows per expert; its block_n is shared among `columns` of all accumulators."""

    rows: int
    tile: Tile
    columns: int = 512


_MANY = 2**62

HALF_TILES: dict[str, tuple[Entry, ...]] = {
    "sm_90": (Entry(16, Tile(16, 128, 128, num_stages=4, group=1), columns=128),
              Entry(32, Tile(32, 128, 64, num_stages=3, group=1)),
              Entry(64, Tile(64, 128, 64, num_stages=4, group=1)),
              Entry(_MANY, Tile(128, 256, 64, num_warps=8), columns=256)),
    # Operands and accumulators share the registers there.
    "sm_80": (Entry(16, Tile(16, 128, 128, num_stages=4, group=1), columns=128),
              Entry(32, Tile(32, 128, 64, num_stages=4, group=1)),
              Entry(64, Tile(64, 128, 64, num_stages=4, group=1), columns=128),
              Entry(_MANY, Tile(128, 128, 64, num_warps=8), columns=128)),
}
HALF_TILES["sm_100"] = HALF_TILES["sm_90"]
# 64 KiB of shared memory hold one stage in flight.
HALF_TILES["gfx942"] = tuple(replace(entry, tile=replace(entry.tile, num_stages=2)) for entry in HALF_TILES["sm_90"])
_ANY_OTHER = tuple(replace(entry, tile=replace(entry.tile, num_stages=2)) for entry in HALF_TILES["sm_80"])
ALIGNED = 16
"""Triton loads whole vectors only where it knows a stride to be a multiple of this."""


def _power_of_two_at_least(value: int, low: int, high: int) -> int:
    size = low
    while size < min(value, high):
        size *= 2
    return size


def gemm_tile(device: torch.device, dtype: torch.dtype, rows_per_expert: int, out_features: int,
              in_features: int, accumulators: int = 1) -> Tile:
    """The tile of a grouped GEMM; `accumulators` is 2 for the fused gate/up product."""
    rows_per_expert = rows_for_tiles(rows_per_expert)
    if device.type == "cpu":
        return _interpreter_tile(rows_per_expert, out_features, in_features)
    if dtype == torch.float32:
        # IEEE fp32 products run on the plain FMA units: registers, not shared memory, are the limit. Gate and up spill
        # a few bytes on eight warps, the three products of the activation gradient on four.
        warps = 4 if accumulators == 2 else 8
        return Tile(_power_of_two_at_least(rows_per_expert, 16, 64), 64, 32, num_warps=warps, num_stages=2)
    if _is_odd(out_features) or _is_odd(in_features):
        # Loaded element by element, with an address in registers for each.
        block_n = min(64, 128 // accumulators)
        return Tile(_power_of_two_at_least(rows_per_expert, 16, 64), block_n, 64, num_warps=8, num_stages=2)
    entries = HALF_TILES.get(architecture(device), _ANY_OTHER)
    entry = next(entry for entry in entries if rows_per_expert <= entry.rows)
    return replace(entry.tile, block_n=min(entry.tile.block_n, entry.columns // accumulators))


def _is_odd(size: int) -> bool:
    """Whether rows of that size start anywhere; the router passes no more than 64, which says nothing of its rows."""
    return size > 64 and size % ALIGNED != 0


def _interpreter_tile(rows_per_expert: int, out_features: int, in_features: int) -> Tile:
    block_m = _power_of_two_at_least(rows_per_expert, 16, 64)

    def width(size: int) -> int:
        return INTERPRETER_TILE if size <= 4 * INTERPRETER_TILE else INTERPRETER_LARGE_TILE

    return Tile(block_m, width(out_features), width(in_features), group=1)
