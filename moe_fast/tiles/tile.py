"""A GEMM tile, and the rows that it is chosen for."""

from dataclasses import dataclass

ALIGNED = 16
"""Triton loads whole vectors only where it knows a stride to be a multiple of this."""


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
class Load:
    """R routed rows over `experts` at hand: what is known of a batch without looking at its routing."""

    rows: int
    experts: int = 1

    @property
    def per_expert(self) -> int:
        """The mean, rounded up."""
        return -(-self.rows // max(self.experts, 1))

    def blocks(self, block_m: int) -> int:
        """Row blocks that have rows if loads are even, and every expert that can have rows has some."""
        return min(self.rows, self.experts) * -(-self.per_expert // block_m)
