"""Products whose operands are rounded to e4m3 under a scale per block of the sum: what that may cost, and does cost.

A block holds 32 or 128 elements along the sum (and may hold several rows of a matrix); its scale s is at least amax / 448,
so that nothing saturates, and at most twice that, as a power of two is. An element a becomes a (1 + d) + f with abs(d) at
most UNIT, or where a / s is below the smallest normal number of e4m3, abs(f) at most half the distance of subnormals,
s 2^-10. Which elements share a block is not declared: the largest of the whole row of tokens, and of the whole matrix of
an expert, stand for amax.
"""

import torch

from moe_ref.numerics.accumulation import ROUNDING
from moe_ref.verify.bounds.rows import Rows

UNIT = 2.0**-4 + 2.0**-18
"""Half a unit in the last place of 4 significant bits, and the roundings of scale, quotient and product in fp32."""
FLOOR = 2.0**-10 * 2 / 448 * (1 + 2.0**-18)
"""Half the distance of subnormals, over the largest element of the block."""
RELATIVE = 2 * UNIT + UNIT**2
"""What a product of two such operands may be off by, relative to it."""


def underflow(rows: Rows, w_NK: torch.Tensor) -> torch.Tensor:
    """What elements too small for their block cost sums of rows @ w^T at most, (R, N), beside RELATIVE."""
    a_RK, w_NK = rows.largest, w_NK.double().abs()
    if a_RK.shape[1] == 0:
        return a_RK.new_zeros(len(a_RK), len(w_NK))
    lost_R1, lost = FLOOR * a_RK.amax(1, keepdim=True), FLOOR * w_NK.amax()
    one = lost_R1 * w_NK.sum(1) + lost * a_RK.sum(1, keepdim=True)
    return (1 + UNIT) * one + a_RK.shape[1] * lost_R1 * lost


def operands_variance(rows: Rows, w_NK: torch.Tensor, squares_RN: torch.Tensor) -> torch.Tensor:
    """Expected square of what the rounding of both operands costs sums of rows @ w^T, (R, N).

    squares_RN: sums of squared products. Uniform between numbers of e4m3, also below the smallest normal one.
    """
    relative = 2 * ROUNDING * UNIT**2 * squares_RN
    a_RK, w_NK = rows.value, w_NK.double()
    if a_RK.shape[1] == 0:
        return relative
    lost_R1, lost = FLOOR * a_RK.abs().amax(1, keepdim=True), FLOOR * w_NK.abs().amax()
    absolute = lost_R1.square() * w_NK.square().sum(1) + lost.square() * a_RK.square().sum(1, keepdim=True)
    return relative + absolute / 3
