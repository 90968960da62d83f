"""How large the rounding errors of a long sum are expected to be; docs/numerics.md has the derivation."""

import math
from dataclasses import dataclass

import torch

from moe_ref.numerics.gauges import Gauges

ROUNDING = 0.75 / (6 * math.log(2))
"""Mean square of the error of rounding s to nearest, in u^2 s^2, where significands are log-uniform: 0.1803."""

LOST = 1 / (4 * math.log(2))
"""Mean of half a unit in the last place over |s|, in units of 2^(1 - p): E[1 / m] / 2 = 0.3607."""

FLUSH = 2.0**-126
"""Smallest normal fp32 number: what flushing a subnormal product may cost."""


@dataclass(frozen=True)
class Accumulation:
    """An accumulator: unit roundoff, whether additions are cut towards zero, and what one instruction does.

    products_per_step: products added at once, 1 for a scalar sum. kept_bits: fraction bits that addends keep when they
    are aligned to the largest one, 0 where nothing is lost in that.
    """

    unit: float
    truncates: bool = False
    products_per_step: int = 1
    kept_bits: int = 0

    def variance(self, gauges: Gauges, terms: int) -> torch.Tensor:
        """Expected square of the error of a sum of `terms` products, (M, N), one after the other in any usual order.

        Blocked, pairwise and split sums have fewer roundings in sequence and stay below. A product that is rounded
        costs one more; so do products that are flushed.
        """
        per_addition = ROUNDING * self.unit**2
        # The mean over whole steps, whose last is the value, is larger than that over the path by half a value.
        path = max(1, terms) * gauges.path + gauges.value.square() / 2
        spread = per_addition * (path + gauges.squares) + (terms * FLUSH) ** 2
        if not self.truncates:
            return spread
        cut, largest = self._alignment(gauges)
        # Losses that do not agree in sign add up at random.
        return spread + self.drift(gauges, terms).square() + ROUNDING * cut**2 * terms * largest

    def drift(self, gauges: Gauges, terms: int) -> torch.Tensor:
        """What a sum that is cut loses at most on average, towards zero, (M, N); 0 of one that is rounded.

        LOST 2 u |s_j| in each step: by Cauchy and Schwarz at most steps LOST 2 u sqrt(path) over the sum. A product
        loses LOST of 2^-kept_bits of the largest addend, coherent as far as products have one sign.
        """
        if not self.truncates:
            return torch.zeros_like(gauges.path)
        steps = -(-terms // self.products_per_step)
        lost = LOST * 2 * self.unit * steps * gauges.path.sqrt()
        cut, largest = self._alignment(gauges)
        # As far as products have one sign; all of them, where their absolute sum is not known.
        agreement = 1.0 if gauges.absolute is None else gauges.value.abs() / gauges.absolute.clamp(min=1e-300)
        return -gauges.value.sign() * (lost + LOST * cut * terms * agreement * largest.sqrt())

    def _alignment(self, gauges: Gauges) -> tuple[float, torch.Tensor]:
        """The unit at which addends are cut, of the largest of a step, and the mean square of that."""
        cut = 2.0**-self.kept_bits if self.kept_bits else 0.0
        return cut, gauges.path + gauges.squares / self.products_per_step


def running_sum(total: torch.Tensor, squares: torch.Tensor, addends: int) -> torch.Tensor:
    """Sum over the additions of `addends` numbers of the mean square of what each rounds, averaged over all orders.

    The j-th partial sum of a random order has mean square S j (n - j) / (n (n - 1)) + t^2 j (j - 1) / (n (n - 1)), with
    t the total and S the sum of squares.
    """
    n = addends
    if n < 2:
        return torch.zeros_like(total)
    squares_share = (n * (n * (n + 1) / 2 - 1) - (n * (n + 1) * (2 * n + 1) / 6 - 1)) / (n * (n - 1))
    return squares_share * squares + (n + 1) / 3 * total.square()


def sorted_sum(total: torch.Tensor, squares: torch.Tensor, addends: int) -> torch.Tensor:
    """The same where the largest addends may come first, as rows in the order of their routing weights do.

    Every partial sum may then have about the mean square of the whole: the sum of squares where signs are random, the
    square of the total where they agree.
    """
    return max(0, addends - 1) * torch.maximum(squares, total.square())
