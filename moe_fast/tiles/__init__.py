"""Tile sizes as data: a file per architecture with a heuristic and, for the shapes that a GPU has tuned, what it found.

    tile     a tile, and the rows that it is chosen for
    tables   the files, checked strictly
    choose   the tile of a product

Of a shape that was tuned the entry with the nearest number of rows counts, as in vLLM's files; of any other the
heuristic's. Nothing is tuned while a layer runs.
"""

from moe_fast.tiles.choose import gemm_tile
from moe_fast.tiles.tile import ALIGNED, Load, Tile

__all__ = ["ALIGNED", "Load", "Tile", "gemm_tile"]
