"""The tiles that are tried: the space of vLLM's tuner and a little more, without what cannot be good or cannot run."""

from dataclasses import MISSING, fields
from itertools import product as combinations

from moe_fast.tiles.tables import Product
from moe_fast.tiles.tile import Load, Tile

SPACE: dict[str, tuple[int | bool, ...]] = {
    "block_m": (16, 32, 64, 128), "block_n": (16, 32, 64, 128, 256), "block_k": (64, 128, 256), "group": (1, 8, 32),
    "num_warps": (4, 8), "num_stages": (2, 3, 4, 5)}
"""Of any other field of Tile, which are switches, both."""
_ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


def candidates(product: Product, load: Load, shared_memory: int) -> list[Tile]:
    """Those that fit shared memory, with blocks of not many times the rows of an expert, or the columns there are."""
    names = [field.name for field in fields(Tile)]
    assert all(name in SPACE or field.default is not MISSING for name, field in zip(names, fields(Tile), strict=True))
    values = [SPACE.get(name, (False, True)) for name in names]
    found = (Tile(**dict(zip(names, chosen, strict=True))) for chosen in combinations(*values))  # pyrefly: ignore
    return [tile for tile in found if _can_be_good(tile, product, load) and _fits(tile, product, shared_memory)]


def _can_be_good(tile: Tile, product: Product, load: Load) -> bool:
    # One row block of an expert has nothing to share with the next.
    groups = tile.group == 1 or load.per_expert > tile.block_m
    return (groups and tile.block_m < max(32, 4 * load.per_expert) and tile.block_n < max(32, 2 * product.out_features)
            and tile.block_m * tile.block_n * product.accumulators <= tile.num_warps * 32 * 160)


def _fits(tile: Tile, product: Product, shared_memory: int) -> bool:
    """Operand tiles of the stages in flight; the compiler says it exactly."""
    stage = (tile.block_m + product.accumulators * tile.block_n) * tile.block_k * _ITEMSIZE[product.dtype]
    return stage * (tile.num_stages - 1) <= shared_memory
