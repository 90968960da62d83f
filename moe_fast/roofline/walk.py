"""The programs of a product in the order in which they start, and the bytes that they bring from memory.

A program reads one stripe of rows (block_m of them, the whole inner dimension) and one of weights (block_n columns).
Programs that run side by side read a stripe at about the same time, so that it comes from memory once; later ones find
it in L2 while less than that holds has been read since.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from moe_fast.roofline.product import Product


@dataclass(frozen=True)
class Wave:
    """Programs that run side by side, and the bytes they bring from memory: weights, rows, results.

    asked: bytes of operands that they ask L2 for; rows of padding are masked and asked for by nobody.
    """

    programs: int
    weights: int
    rows: int
    results: int
    asked: int

    @property
    def num_bytes(self) -> int:
        return self.weights + self.rows + self.results


def order(product: Product) -> Iterator[tuple[int, int]]:
    """(row block, column) of every program: as kernels.gate_up.grouped_tile."""
    for first in range(0, len(product.blocks), product.group):
        size = min(product.group, len(product.blocks) - first)
        for column in range(product.columns):
            for inner in range(size):
                yield first + inner, column


def waves(product: Product, at_once: int, l2_bytes: int) -> list[Wave]:
    """Groups of `at_once` programs."""
    cache, found, programs = _Cache(l2_bytes), [], list(order(product))
    rows_left = product.rows_bytes
    for start in range(0, len(programs), at_once):
        weights = rows = results = asked = 0
        for block, column in programs[start:start + at_once]:
            expert, filled = product.blocks[block]
            weights += cache.missing(("w", expert, column), product.weight_stripe)
            row_bytes = filled * product.inner * product.itemsize
            missing = cache.missing(("x", block), row_bytes)
            # Rows of one token that several experts read are one row of memory, as long as L2 holds them all.
            if product.rows_bytes < l2_bytes // 2:
                missing, rows_left = min(missing, rows_left), max(0, rows_left - missing)
            rows += missing
            width = min(product.block_n, product.out - column * product.block_n)
            results += filled * width * product.itemsize
            asked += row_bytes + product.weight_stripe
        found.append(Wave(len(programs[start:start + at_once]), weights, rows, results, asked))
    return found


class _Cache:
    """Least recently used stripes go first."""

    def __init__(self, size: int) -> None:
        self._left, self._held = size, OrderedDict[tuple, int]()

    def missing(self, stripe: tuple, num_bytes: int) -> int:
        """Bytes that have to be brought: none where the stripe is held."""
        if stripe in self._held:
            self._held.move_to_end(stripe)
            return 0
        self._held[stripe] = num_bytes
        self._left -= num_bytes
        while self._left < 0 and len(self._held) > 1:
            self._left += self._held.popitem(last=False)[1]
        return num_bytes
