"""Products of matrices without negative entries: upper bounds at half the cost, since they are summed in fp32."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moe_ref.numerics.formats import power_of_two

_FP32_UNIT = 2.0**-24
_BLOCK = 2**20
"""Elements of a matrix that are converted at once: a block stays in the cache, and its memory is used again."""


@dataclass(frozen=True)
class Left:
    """A left factor without negative entries, (M, K): in fp32, rows scaled to 1 at the largest, and their scales.

    whole: the factor itself where an entry is not finite, for which fp64 is taken.
    """

    power: int
    scaled_MK: torch.Tensor
    scale_M1: torch.Tensor
    whole: torch.Tensor | None

    @classmethod
    def of(cls, a_MK: torch.Tensor, power: int) -> "Left":
        """power: of |w|, that it will be multiplied with."""
        a_MK = a_MK.detach().double()
        largest_M1 = a_MK.amax(-1, keepdim=True) if a_MK.numel() else a_MK.new_zeros(len(a_MK), 1)
        if not bool(torch.isfinite(largest_M1).all()):
            return cls(power, a_MK, largest_M1, a_MK)
        # Scales stay within what fp64 can scale by.
        exponent = torch.frexp(largest_M1).exponent.clamp(min=-1000)
        return cls(power, (a_MK * power_of_two(-exponent)).float(), power_of_two(exponent), None)


@dataclass(frozen=True)
class Block:
    """Some rows [start, stop) of a right factor w (N, K), and their magnitudes in fp32 times 2^-exponent.

    exponent: NaN where an entry is not finite. largest: of the scaled magnitudes.
    """

    start: int
    stop: int
    rows_NK: torch.Tensor
    absolute_NK: torch.Tensor
    exponent: float
    largest: float

    def product(self, left: Left) -> torch.Tensor:
        """An upper bound of left @ (|rows|^power)^T, (M, stop - start) fp64."""
        if left.whole is not None or math.isnan(self.exponent):
            whole_MK = left.scaled_MK.double() * left.scale_M1 if left.whole is None else left.whole
            return whole_MK @ self.rows_NK.double().abs().pow(left.power).T
        magnitudes_NK = self.absolute_NK.square() if left.power == 2 else self.absolute_NK
        terms = max(1, self.rows_NK.shape[1])
        product = (left.scaled_MK @ magnitudes_NK.T).double()
        # Rounding of both operands and of a square, of each product and each addition; and what underflowed.
        underflow = 4 * terms * 2.0**-149 * max(1.0, self.largest**left.power)
        product.mul_(1 + (terms + 6) * 2 * _FP32_UNIT).add_(underflow)
        return product.mul_(left.scale_M1).mul_(2.0 ** (left.power * self.exponent))


def blocks(w_NK: torch.Tensor) -> Iterator[Block]:
    """The rows of a matrix, so many at once that conversions of them are small."""
    count = max(1, _BLOCK // max(1, w_NK.shape[1]))
    for start in range(0, len(w_NK), count):
        rows_NK = w_NK[start:start + count].detach()
        wide_NK = rows_NK if rows_NK.dtype is torch.float64 else rows_NK.float()
        absolute_NK = wide_NK.abs()
        largest = float(absolute_NK.amax()) if absolute_NK.numel() else 0.0
        exponent = 0.0 if math.isfinite(largest) else math.nan
        # Scaled by its largest entry where that is far from 1, so that no square leaves fp32; fp32 has room to do it.
        if math.isfinite(largest) and not 2.0**-20 < largest < 2.0**20 and largest > 0:
            exponent = float(max(-100, math.frexp(largest)[1]))
            absolute_NK, largest = absolute_NK * 2.0**-exponent, 1.0
        yield Block(start, start + len(rows_NK), rows_NK, absolute_NK.float(), exponent, largest)


def nonnegative_product(a_MK: torch.Tensor, w_NK: torch.Tensor, power: int) -> torch.Tensor:
    """An upper bound of a @ (|w|^power)^T for a without negative entries, (M, N) fp64, larger by about K 2^-22.

    It is summed in fp32, at half the cost, with rows of a and of w scaled by powers of two, so that nothing overflows;
    what underflows is covered by adding the most that it can be.
    """
    left = Left.of(a_MK, power)
    product_MN = torch.empty(len(a_MK), len(w_NK), dtype=torch.float64, device=a_MK.device)
    for block in blocks(w_NK):
        product_MN[:, block.start:block.stop] = block.product(left)
    return product_MN
