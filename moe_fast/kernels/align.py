"""Grouping routed rows by expert: a counting sort in three kernels with fixed grids.

No torch.sort and no host synchronisation, so that it can be captured in a CUDA graph. A routed row is
r = token * K + slot; rows of one expert keep that order, which makes every later sum repeatable.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moe_fast.launch import launch

CHUNK = 128
"""Rows counted by one program; ranks inside a chunk come from a CHUNK x CHUNK comparison."""
CHUNKS_AT_ONCE = 16
BLOCKS_AT_ONCE = 64


@dataclass(frozen=True)
class Alignment:
    """Rows sorted by expert, and the row blocks that a grouped GEMM walks over.

    sorted_rows_R: routed row of each sorted position; positions past offsets[-1] are undefined.
    offsets: first position of each expert, padded to a power of two, then the number of valid rows.
    block_expert, block_row, block_row_end: per row block its expert (-1: unused) and [start, end) positions.
    """

    sorted_rows_R: torch.Tensor
    offsets: torch.Tensor
    block_expert: torch.Tensor
    block_row: torch.Tensor
    block_row_end: torch.Tensor

    @property
    def num_blocks(self) -> int:
        """Upper bound of used blocks: known without looking at the routing."""
        return self.block_expert.numel()


@triton.jit
def load_ids(ids, row, num_rows, num_experts):
    """Ids as int32 and which of them are experts; judged before the cast, so that no int64 wraps into range."""
    wide = tl.load(ids + row, mask=row < num_rows, other=-1)
    valid = (wide >= 0) & (wide < num_experts)
    return tl.where(valid, wide, -1).to(tl.int32), valid


@triton.jit
def count_kernel(ids, counts, num_rows, num_experts, CHUNK: tl.constexpr, EXPERTS: tl.constexpr):
    """counts[chunk, e] = rows of chunk that go to e; ids outside [0, num_experts) are not counted."""
    chunk = tl.program_id(0)
    row = chunk * CHUNK + tl.arange(0, CHUNK)
    expert, valid = load_ids(ids, row, num_rows, num_experts)
    histogram = tl.histogram(tl.where(valid, expert, 0), EXPERTS, mask=valid)
    tl.store(counts + chunk * EXPERTS + tl.arange(0, EXPERTS), histogram)


@triton.jit
def layout_kernel(counts, bases, offsets, block_expert, block_row, block_row_end, num_chunks, num_blocks,
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
    end_E = tl.cumsum(rows_E, axis=0)
    start_E = end_E - rows_E
    tl.store(offsets + expert, start_E)
    tl.store(offsets + 1 + expert, end_E, mask=expert == EXPERTS - 1)
    blocks_E = (rows_E + BLOCK_M - 1) // BLOCK_M
    last_block_E = tl.cumsum(blocks_E, axis=0)
    for first in range(0, num_blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        owner = tl.sum((last_block_E[None, :] <= block[:, None]).to(tl.int32), axis=1)
        is_owner = expert[None, :] == owner[:, None]
        inner = block[:, None] - (last_block_E - blocks_E)[None, :]
        row = tl.sum(tl.where(is_owner, start_E[None, :] + inner * BLOCK_M, 0), axis=1)
        row_end = tl.sum(tl.where(is_owner, end_E[None, :], 0), axis=1)
        inside = block < num_blocks
        tl.store(block_expert + block, tl.where(owner < EXPERTS, owner, -1), mask=inside)
        tl.store(block_row + block, row, mask=inside)
        tl.store(block_row_end + block, row_end, mask=inside)


@triton.jit
def scatter_kernel(ids, bases, offsets, sorted_rows, num_rows, num_experts, CHUNK: tl.constexpr,
                   EXPERTS: tl.constexpr):
    """sorted_rows[start of e + rows of e in earlier chunks + rank in this chunk] = row."""
    chunk = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    row = chunk * CHUNK + lane
    expert, valid = load_ids(ids, row, num_rows, num_experts)
    earlier = (expert[None, :] == expert[:, None]) & (lane[None, :] < lane[:, None])
    rank = tl.sum(earlier.to(tl.int32), axis=1)
    start = tl.load(offsets + expert, mask=valid, other=0)
    base = tl.load(bases + chunk * EXPERTS + expert, mask=valid, other=0)
    tl.store(sorted_rows + start + base + rank, row, mask=valid)


def align(ids_TK: torch.Tensor, num_experts: int, block_m: int) -> Alignment:
    """Group the rows of ids_TK (int32 or int64, any value) by expert, in blocks of `block_m` rows.

    The number of blocks is bounded by the shapes alone: every expert that has rows wastes less than one block.
    """
    num_rows, device = ids_TK.numel(), ids_TK.device
    ids_R = ids_TK.contiguous()
    experts = triton.next_power_of_2(num_experts)
    num_chunks = triton.cdiv(num_rows, CHUNK)
    num_blocks = (num_rows + min(num_experts, num_rows) * (block_m - 1)) // block_m

    def table(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device=device)

    counts, bases = table(num_chunks * experts), table(num_chunks * experts)
    result = Alignment(table(num_rows), table(experts + 1), table(num_blocks), table(num_blocks), table(num_blocks))
    launch(count_kernel, (num_chunks,), device, ids=ids_R, counts=counts, num_rows=num_rows,
           num_experts=num_experts, CHUNK=CHUNK, EXPERTS=experts)
    launch(layout_kernel, (1,), device, counts=counts, bases=bases, offsets=result.offsets,
           block_expert=result.block_expert, block_row=result.block_row, block_row_end=result.block_row_end,
           num_chunks=num_chunks, num_blocks=num_blocks, BLOCK_M=block_m, EXPERTS=experts,
           CHUNKS=CHUNKS_AT_ONCE, BLOCKS=BLOCKS_AT_ONCE)
    launch(scatter_kernel, (num_chunks,), device, ids=ids_R, bases=bases, offsets=result.offsets,
           sorted_rows=result.sorted_rows_R, num_rows=num_rows, num_experts=num_experts, CHUNK=CHUNK, EXPERTS=experts)
    return result
