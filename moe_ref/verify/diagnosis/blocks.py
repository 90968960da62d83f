"""Terms that a sum loses with its last block."""

import torch


def blocks(size: int) -> tuple[int, ...]:
    """How many terms a kernel may lose at the end of a sum: a block, what is left for the last one, or for a limit."""
    sizes = {block for width in (16, 32, 64, 128) for block in (width, size % width)}
    sizes |= {size - 2**power for power in range(8, size.bit_length())}
    return tuple(sorted(block for block in sizes if 0 < block < size))


def without_last(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Rows with zeros for their last columns."""
    rows = rows.clone()
    rows[..., rows.shape[-1] - count:] = 0.0
    return rows
