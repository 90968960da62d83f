"""What the kernels over rows grouped by expert share: the order of their tiles, and the rows of a block."""

import torch
import triton
import triton.language as tl

from moe_fast.architecture import multiprocessors
from moe_fast.kernels.align import Alignment
from moe_fast.launch import launch
from moe_fast.tiles import Tile


@triton.jit
def grouped_tile(tile, num_blocks, num_columns, GROUP: tl.constexpr):
    """(row block, column tile) of a tile; GROUP row blocks walk the columns together and share weights in L2."""
    group = tile // (GROUP * num_columns)
    first = group * GROUP
    size = tl.minimum(num_blocks - first, GROUP)
    inner = tile - group * GROUP * num_columns
    return first + inner % size, inner // size


@triton.jit
def block_rows(sorted_rows, block_expert, block_row, block_row_end, block, BLOCK_M: tl.constexpr):
    """Expert, positions, which of these are the block's own, and the routed row at each."""
    position = tl.load(block_row + block) + tl.arange(0, BLOCK_M)
    in_rows = position < tl.load(block_row_end + block)
    return tl.load(block_expert + block), position, in_rows, tl.load(sorted_rows + position, mask=in_rows, other=0)


def launch_grouped(kernel: triton.JITFunction, alignment: Alignment, num_columns: int, tile: Tile,
                   device: torch.device, **arguments: object) -> None:
    """Start `kernel` for every row block and each of `num_columns` column tiles.

    How many blocks there are is only known on the device: programs past the last tile do nothing, and persistent ones,
    one for each multiprocessor, take every so many-th tile.
    """
    programs = alignment.num_blocks * num_columns
    if tile.persistent:
        programs = min(programs, multiprocessors(device))
    launch(kernel, (programs,), device, sorted_rows=alignment.sorted_rows_R, block_expert=alignment.block_expert,
           block_row=alignment.block_row, block_row_end=alignment.block_row_end, block_count=alignment.block_count,
           BLOCK_M=tile.block_m, GROUP=tile.group, PERSISTENT=tile.persistent, num_warps=tile.num_warps,
           num_stages=tile.num_stages, **arguments)
