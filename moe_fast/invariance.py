"""Batch invariance: a token's result has the same bits whatever else is in the batch.

Sums over H and I are cut where tiles end, and tiles follow the number of rows. One fixed number instead makes every row
a function of its token alone, at the price of tiles that are too large for few rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

ROWS = 64
"""Rows per expert that tiles are then made for: a compromise between decoding and prefill."""
MANY_BLOCKS = 2**16

_invariant: ContextVar[bool] = ContextVar("invariant", default=False)


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Within it, outputs do not depend on the other tokens of a batch; a thread's own, and not for backward passes.

    Sums over ranks must not depend on them either: those of `TorchComm(ordered=True)` do not, a library's own may.
    """
    token = _invariant.set(True)
    try:
        yield
    finally:
        _invariant.reset(token)


def rows_for_tiles(rows: int, experts: int) -> int:
    """The number of routed rows that tiles follow."""
    return ROWS * experts if _invariant.get() else rows


def blocks_for_tiles(blocks: int) -> int:
    """The number of row blocks that tiles follow where rows are of no expert: as many as fill any GPU."""
    return MANY_BLOCKS if _invariant.get() else blocks
