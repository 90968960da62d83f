"""The tile of a grouped product.

On a GPU the sizes follow the rows per expert, as vLLM's Triton path does: few rows want small tiles and more of them.
`moe-ref compile` finds no product among them that spills registers or takes more shared memory than a block may have.
The interpreter pays per program and per tile operation, so its tiles are as large as a small shape allows while every
shape above 64 still crosses a tile border in each direction.
"""

from dataclasses import replace

import torch

from moe_fast.architecture import architecture
from moe_fast.invariance import rows_for_tiles
from moe_fast.tiles.tables import Product, Table, table_of
from moe_fast.tiles.tile import ALIGNED, Load, Tile

INTERPRETER_TILE = 64
INTERPRETER_LARGE_TILE = 1024
WORTHWHILE = 0.85
"""Of the columns with padding: what half the width must leave to be taken."""
NEAR = 2
"""A tuned entry speaks for half to twice its rows."""
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def gemm_tile(device: torch.device, dtype: torch.dtype, load: Load, out_features: int, in_features: int,
              accumulators: int = 1, *, kernel: str, block_m: int | None = None) -> Tile:
    """The tile of a grouped GEMM of `kernel`, as gate_up; `accumulators` is 2 for the fused gate/up product.

    block_m: of the alignment, where another kernel of the same call has chosen it.
    """
    load = Load(rows_for_tiles(load.rows, load.experts), load.experts)
    block_of_rows = block_m or _power_of_two_at_least(load.per_expert, 16, 64)
    if device.type == "cpu":
        return _interpreter_tile(block_of_rows, out_features, in_features)
    table = table_of(architecture(device))
    product = Product(kernel, _DTYPES[dtype], out_features, in_features, accumulators, load.experts)
    if tile := _tuned(table, product, load.rows, block_m):
        return tile
    if dtype == torch.float32:
        # IEEE fp32 products run on the plain FMA units: registers, not shared memory, are the limit. A deeper tile
        # spills in gate and up on sm_80, and in down on sm_100; with two stages gate and up of a shared expert,
        # whose rows are the tokens, do there.
        num_stages = 3 if accumulators == 2 and load.experts == 1 else 2
        return Tile(block_of_rows, 64, 16, num_warps=8, num_stages=num_stages)
    if _is_odd(out_features) or _is_odd(in_features):
        # Loaded element by element, with an address in registers for each.
        return Tile(block_of_rows, min(64, 128 // accumulators), 64, num_warps=8, num_stages=2)
    return _heuristic(table, load, out_features, accumulators, block_m)


def _tuned(table: Table, product: Product, rows: int, block_m: int | None) -> Tile | None:
    """Of the entry with the nearest number of rows, if that is near."""
    entries = [one for one in table.by_product.get(product, ()) if block_m in (None, one.tile.block_m)]
    if not entries:
        return None
    nearest = min(entries, key=lambda one: abs(one.rows - rows))
    return nearest.tile if nearest.rows <= NEAR * rows and rows <= NEAR * nearest.rows else None


def _heuristic(table: Table, load: Load, out_features: int, accumulators: int, block_m: int | None) -> Tile:
    """The entry of these rows, with narrower columns, or of fewer, while programs would leave multiprocessors idle."""
    place = next(place for place, entry in enumerate(table.heuristic)
                 if (load.per_expert <= entry.rows if block_m is None else entry.tile.block_m == block_m))
    while True:
        entry = table.heuristic[place]
        for block_n in entry.widths(accumulators):
            if block_n > entry.narrowest and _pads(out_features, block_n):
                continue
            programs = load.blocks(entry.tile.block_m) * -(-out_features // block_n)
            if programs >= entry.programs * table.multiprocessors:
                return replace(entry.tile, block_n=block_n)
        if block_m or not place:
            return replace(entry.tile, block_n=block_n)
        place -= 1


def _pads(out_features: int, block_n: int) -> bool:
    """Whether half the columns would leave out a good part of the padding, as of 192 columns in tiles of 128."""
    padded, with_half = (-(-out_features // width) * width for width in (block_n, block_n // 2))
    return with_half <= WORTHWHILE * padded


def _power_of_two_at_least(value: int, low: int, high: int) -> int:
    size = low
    while size < min(value, high):
        size *= 2
    return size


def _is_odd(size: int) -> bool:
    """Whether rows of that size start anywhere; up to 64, as the router's gradient has, one step loads them."""
    return size > 64 and size % ALIGNED != 0


def _interpreter_tile(block_m: int, out_features: int, in_features: int) -> Tile:
    def width(size: int) -> int:
        return INTERPRETER_TILE if size <= 4 * INTERPRETER_TILE else INTERPRETER_LARGE_TILE

    return Tile(block_m, width(out_features), width(in_features), group=1)
