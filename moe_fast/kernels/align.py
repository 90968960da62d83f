"""Grouping routed rows by expert: a counting sort in three kernels with fixed grids, or one for few rows.

No torch.sort and no host synchronisation, so that it can be captured in a CUDA graph. A routed row is
r = token * K + slot; rows of one expert keep that order, which makes every later sum repeatable. The first
step also finds the place of every id among the experts at hand, which may be some of all, in any order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moe_fast.launch import launch
from moe_ref.contract.errors import raise_faults

CHUNK = 128
"""Rows counted by one program; ranks inside a chunk come from a CHUNK x CHUNK comparison."""
CHUNKS_AT_ONCE = 16
BLOCKS_AT_ONCE = 64
SINGLE_WARPS = 8
"""Of a kernel that is one program, with an element for every block and expert in registers."""
EXPERTS_AT_ONCE = 32
"""Experts a chunk is compared with at a time: CHUNK x 32 fits in the registers of a program."""
FEW_ROWS, FEW_ROWS_INTERPRETED, ROWS_AT_ONCE = 256, 32, 32
"""Rows up to which one program does it all: starts of kernels cost more than its work, as in decoding.

The interpreter's limit is low, so that layers of a few dozen tokens run both ways. ROWS_AT_ONCE: rows that each is
compared with at a time.
"""

MOST_ROWS = 2**31 - 2**16
"""Rows are numbered in 32 bits, and a block may count past the last."""


@dataclass(frozen=True)
class Alignment:
    """Rows sorted by expert, and the row blocks that a grouped GEMM walks over.

    local_ids_R: place of each routed row's expert in the weights at hand, -1 where they do not hold it.
    sorted_rows_R: routed row of each sorted position; positions past offsets[-1] are undefined.
    offsets: first position of each expert, padded to a power of two, then the number of valid rows.
    block_expert, block_row, block_row_end: per row block its expert and [start, end) positions; block_count: how many
    blocks there are, those past them are undefined.
    """

    local_ids_R: torch.Tensor
    sorted_rows_R: torch.Tensor
    offsets: torch.Tensor
    block_expert: torch.Tensor
    block_row: torch.Tensor
    block_row_end: torch.Tensor
    block_count: torch.Tensor

    @property
    def num_blocks(self) -> int:
        """Upper bound of block_count: known without looking at the routing."""
        return self.block_expert.numel()


@triton.jit
def hosted_place(ids, hosted, row, num_rows, num_experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
                 EXPERTS_AT_ONCE: tl.constexpr):
    """Place of each row's id in `hosted`, EXPERTS where it has none."""
    # Compared in 64 bits, so that no id wraps into range.
    wide = tl.load(ids + row, mask=row < num_rows, other=-1).to(tl.int64)
    expert = tl.full((ROWS,), EXPERTS, tl.int32)
    for first in range(0, num_experts, EXPERTS_AT_ONCE):
        place = first + tl.arange(0, EXPERTS_AT_ONCE)
        held = tl.load(hosted + place, mask=place < num_experts, other=-1)
        is_held = (wide[:, None] == held[None, :]) & (wide >= 0)[:, None]
        expert = tl.minimum(expert, tl.min(tl.where(is_held, place[None, :], EXPERTS), axis=1))
    return expert


@triton.jit
def write_layout(rows_E, offsets, block_expert, block_row, block_row_end, block_count, BLOCK_M: tl.constexpr,
                 EXPERTS: tl.constexpr, BLOCKS: tl.constexpr):
    """First position of each expert, and the block table, from the number of rows of each expert."""
    expert = tl.arange(0, EXPERTS)
    end_E = tl.cumsum(rows_E, axis=0)
    start_E = end_E - rows_E
    tl.store(offsets + expert, start_E)
    tl.store(offsets + 1 + expert, end_E, mask=expert == EXPERTS - 1)
    blocks_E = (rows_E + BLOCK_M - 1) // BLOCK_M
    last_block_E = tl.cumsum(blocks_E, axis=0)
    num_blocks = tl.sum(blocks_E)
    tl.store(block_count, num_blocks)
    for first in range(0, num_blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        owner = tl.sum((last_block_E[None, :] <= block[:, None]).to(tl.int32), axis=1)
        is_owner = expert[None, :] == owner[:, None]
        inner = block[:, None] - (last_block_E - blocks_E)[None, :]
        row = tl.sum(tl.where(is_owner, start_E[None, :] + inner * BLOCK_M, 0), axis=1)
        row_end = tl.sum(tl.where(is_owner, end_E[None, :], 0), axis=1)
        inside = block < num_blocks
        tl.store(block_expert + block, owner, mask=inside)
        tl.store(block_row + block, row, mask=inside)
        tl.store(block_row_end + block, row_end, mask=inside)


@triton.jit
def few_rows_kernel(ids, hosted, local_ids, sorted_rows, offsets, block_expert, block_row, block_row_end, block_count,
                    num_rows, num_experts, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
                    EXPERTS_AT_ONCE: tl.constexpr, BLOCKS: tl.constexpr, ROWS_AT_ONCE: tl.constexpr):
    """All of the three kernels below, by one program that holds every row."""
    row = tl.arange(0, ROWS)
    expert = hosted_place(ids, hosted, row, num_rows, num_experts, ROWS, EXPERTS, EXPERTS_AT_ONCE)
    valid = expert < EXPERTS
    tl.store(local_ids + row, tl.where(valid, expert, -1), mask=row < num_rows)
    rows_E = tl.histogram(tl.where(valid, expert, 0), EXPERTS, mask=valid)
    write_layout(rows_E, offsets, block_expert, block_row, block_row_end, block_count, BLOCK_M, EXPERTS, BLOCKS)
    # Threads read below what others of this program have written.
    tl.debug_barrier()
    position = tl.zeros((ROWS,), tl.int32)
    for first in range(0, num_rows, ROWS_AT_ONCE):
        other_row = first + tl.arange(0, ROWS_AT_ONCE)
        other = tl.load(local_ids + other_row, mask=other_row < num_rows, other=-1)[None, :]
        earlier = (other == expert[:, None]) & (other_row[None, :] < row[:, None])
        position += tl.sum(((other >= 0) & ((other < expert[:, None]) | earlier)).to(tl.int32), axis=1)
    tl.store(sorted_rows + position, row, mask=valid)


@triton.jit
def count_kernel(ids, hosted, local_ids, counts, num_rows, num_experts, CHUNK: tl.constexpr, EXPERTS: tl.constexpr,
                 EXPERTS_AT_ONCE: tl.constexpr):
    """local_ids[row] = place of its id in `hosted`, or -1; counts[chunk, e] = rows of chunk at place e."""
    chunk = tl.program_id(0)
    row = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = hosted_place(ids, hosted, row, num_rows, num_experts, CHUNK, EXPERTS, EXPERTS_AT_ONCE)
    valid = expert < EXPERTS
    tl.store(local_ids + row, tl.where(valid, expert, -1), mask=row < num_rows)
    histogram = tl.histogram(tl.where(valid, expert, 0), EXPERTS, mask=valid)
    tl.store(counts + chunk * EXPERTS + tl.arange(0, EXPERTS), histogram)


@triton.jit
def layout_kernel(counts, bases, offsets, block_expert, block_row, block_row_end, block_count, num_chunks,
                  BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr, CHUNKS: tl.constexpr, BLOCKS: tl.constexpr):
    """One program: prefix sums over chunks and experts, and the block table."""
    expert = tl.arange(0, EXPERTS)
    rows_E = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, num_chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        at = chunk[:, None] * EXPERTS + expert[None, :]
        inside = (chunk < num_chunks)[:, None] & (expert >= 0)[None, :]
        count = tl.load(counts + at, mask=inside, other=0)
        tl.store(bases + at, tl.cumsum(count, axis=0) - count + rows_E[None, :], mask=inside)
        rows_E += tl.sum(count, axis=0)
    write_layout(rows_E, offsets, block_expert, block_row, block_row_end, block_count, BLOCK_M, EXPERTS, BLOCKS)


@triton.jit
def scatter_kernel(local_ids, bases, offsets, sorted_rows, num_rows, CHUNK: tl.constexpr, EXPERTS: tl.constexpr):
    """sorted_rows[start of e + rows of e in earlier chunks + rank in this chunk] = row."""
    chunk = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    row = chunk * CHUNK + lane
    expert = tl.load(local_ids + row, mask=row < num_rows, other=-1)
    valid = expert >= 0
    earlier = (expert[None, :] == expert[:, None]) & (lane[None, :] < lane[:, None])
    rank = tl.sum(earlier.to(tl.int32), axis=1)
    start = tl.load(offsets + expert, mask=valid, other=0)
    base = tl.load(bases + chunk * EXPERTS + expert, mask=valid, other=0)
    tl.store(sorted_rows + start + base + rank, row, mask=valid)


def align(ids_TK: torch.Tensor, hosted_E: torch.Tensor, block_m: int) -> Alignment:
    """Group the rows of ids_TK (int32 or int64, any value) by place in hosted_E, in blocks of `block_m` rows.

    hosted_E: int64, the id of the expert at each place; the lower place counts where an id is there twice. The
    number of blocks is bounded by the shapes alone: every expert that has rows wastes less than one block. Raises
    UsageValueError for more rows than its tables can number.
    """
    num_rows, num_experts, device = ids_TK.numel(), hosted_E.numel(), ids_TK.device
    experts = triton.next_power_of_2(max(num_experts, 1))
    most_rows = min(MOST_ROWS, (2**31 // experts - CHUNKS_AT_ONCE) * CHUNK)
    if num_rows > most_rows:
        raise_faults("moe_fast", [f"{num_rows} routed rows of {num_experts} experts at once, but should be at most "
                                  f"{most_rows}"])
    ids_R, hosted_E = ids_TK.contiguous(), hosted_E.contiguous()
    num_blocks = (num_rows + min(num_experts, num_rows) * (block_m - 1)) // block_m

    def table(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device=device)

    result = Alignment(table(num_rows), table(num_rows), table(experts + 1), table(num_blocks), table(num_blocks),
                       table(num_blocks), table(1))
    ids = {"ids": ids_R, "hosted": hosted_E, "local_ids": result.local_ids_R, "num_rows": num_rows,
           "num_experts": num_experts, "EXPERTS": experts, "EXPERTS_AT_ONCE": min(experts, EXPERTS_AT_ONCE)}
    layout = {"offsets": result.offsets, "block_expert": result.block_expert, "block_row": result.block_row,
              "block_row_end": result.block_row_end, "block_count": result.block_count, "BLOCK_M": block_m,
              "BLOCKS": BLOCKS_AT_ONCE}
    if num_rows <= (FEW_ROWS_INTERPRETED if device.type == "cpu" else FEW_ROWS):
        rows = max(16, triton.next_power_of_2(num_rows))
        launch(few_rows_kernel, (1,), device, **ids, **layout, sorted_rows=result.sorted_rows_R, ROWS=rows,
               ROWS_AT_ONCE=min(rows, ROWS_AT_ONCE), num_warps=SINGLE_WARPS)
        return result
    num_chunks = triton.cdiv(num_rows, CHUNK)
    counts, bases = table(num_chunks * experts), table(num_chunks * experts)
    launch(count_kernel, (num_chunks,), device, **ids, counts=counts, CHUNK=CHUNK)
    launch(layout_kernel, (1,), device, **layout, counts=counts, bases=bases, num_chunks=num_chunks, EXPERTS=experts,
           CHUNKS=CHUNKS_AT_ONCE, num_warps=SINGLE_WARPS)
    launch(scatter_kernel, (num_chunks,), device, local_ids=result.local_ids_R, bases=bases, offsets=result.offsets,
           sorted_rows=result.sorted_rows_R, num_rows=num_rows, CHUNK=CHUNK, EXPERTS=experts)
    return result
