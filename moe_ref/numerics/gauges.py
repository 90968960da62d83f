"""What a matrix product's rounding errors are measured with: its value, and how large its partial sums are."""

from dataclasses import dataclass
from itertools import pairwise

import torch

from moe_ref.numerics.magnitudes import Left, blocks

CHUNKS, CHUNK = 16, 64
"""Long sums are looked at every so many terms, in so many places at most."""
FEW_CHUNKS, SHORT_CHUNK = 8, 4
"""The same of short ones, whose single paths differ more from the usual one."""


@dataclass(frozen=True)
class Gauges:
    """Of value = a @ w^T, each (M, N) in fp64.

    squares: sum of the squared products. path: mean square of the partial sums, the largest over the natural order, its
    reverse and random ones. What a long sum rounds is its partial sums, so path is what its rounding errors grow with.
    absolute: sum of absolute products; None where nobody asked for it.
    """

    value: torch.Tensor
    squares: torch.Tensor
    path: torch.Tensor
    absolute: torch.Tensor | None = None


def gauges(a_MK: torch.Tensor, w_NK: torch.Tensor, absolute: bool = False) -> Gauges:
    """Gauges of a @ w^T; any floating dtype."""
    return gauges_and_products(a_MK, w_NK, [], absolute)[0]


def gauges_and_products(a_MK: torch.Tensor, w_NK: torch.Tensor, carried: list[Left],
                        absolute: bool = False) -> tuple[Gauges, list[torch.Tensor]]:
    """Gauges of a @ w^T, and upper bounds of carried @ (|w|^power)^T, with w converted once, block by block.

    A random order has partial sums of mean square value^2 / 3 + squares / 6 (a bridge from 0 to the value); in the
    natural order they are followed in at most CHUNKS steps, linear within a step, and with the bridge's part of it.
    """
    a_MK, w_NK = a_MK.detach().double(), w_NK.detach()
    lefts = [Left.of(a_MK.square(), 2), *carried] + ([Left.of(a_MK.abs(), 1)] if absolute else [])
    value, path, *products = (torch.empty(len(a_MK), len(w_NK), dtype=torch.float64, device=a_MK.device)
                              for _ in range(2 + len(lefts)))
    for block in blocks(w_NK):
        at = slice(block.start, block.stop)
        for product, left in zip(products, lefts, strict=True):
            product[:, at] = block.product(left)
        value[:, at], path[:, at] = _followed(a_MK, block.rows_NK.double(), products[0][:, at])
    found = Gauges(value, products[0], path, products[-1] if absolute else None)
    return found, products[1:1 + len(carried)]


def _followed(a_MK: torch.Tensor, w_NK: torch.Tensor, squares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The value and the mean square of its partial sums."""
    terms = a_MK.shape[1]
    steps = max(1, min(CHUNKS, terms // CHUNK), min(FEW_CHUNKS, terms // SHORT_CHUNK))
    cuts = [round(terms * step / steps) for step in range(steps + 1)]
    value = torch.zeros(len(a_MK), len(w_NK), dtype=torch.float64, device=a_MK.device)
    natural, ends = torch.zeros_like(value), torch.zeros_like(value)
    for start, stop in pairwise(cuts):
        after = torch.addmm(value, a_MK[:, start:stop], w_NK[:, start:stop].T)
        natural += (value * (value + after)).addcmul_(after, after)
        ends += value
        value = after
    square, bridge = value * value, squares / 6
    # The reversed order has partial sums value - s: each step's ends are value - s of the other's.
    backwards = 3 * steps * square - 3 * value * (2 * ends + value) + natural
    path = torch.maximum(natural, backwards) / (3 * steps) + bridge / steps
    return value, torch.maximum(path, square / 3 + bridge)
