"""The two tables of a counting sort: which row stands at a position, and at which position a row stands."""

import torch
import triton
import triton.language as tl

from moe_fast.kernels.align import Alignment
from moe_fast.launch import launch

BLOCK = 1024


@triton.jit
def order_kernel(sorted_rows, num_sorted, row_at, place, num_rows, BLOCK: tl.constexpr):
    """row_at[position] = row, -1 past the end; place[row] = position, for rows that have one."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = position < tl.load(num_sorted)
    row = tl.load(sorted_rows + position, mask=is_row, other=-1)
    tl.store(row_at + position, row.to(tl.int64), mask=position < num_rows)
    tl.store(place + row, position.to(tl.int64), mask=is_row)


def order(alignment: Alignment) -> tuple[torch.Tensor, torch.Tensor]:
    """row_at_R, the routed row at each sorted position, and place_R, its inverse; int64, -1 where there is none."""
    num_rows, device = alignment.sorted_rows_R.numel(), alignment.sorted_rows_R.device
    row_at_R = torch.empty(num_rows, dtype=torch.int64, device=device)
    place_R = torch.full((num_rows,), -1, dtype=torch.int64, device=device)
    launch(order_kernel, (triton.cdiv(num_rows, BLOCK),), device, sorted_rows=alignment.sorted_rows_R,
           num_sorted=alignment.offsets[-1:], row_at=row_at_R, place=place_R, num_rows=num_rows, BLOCK=BLOCK)
    return row_at_R, place_R
