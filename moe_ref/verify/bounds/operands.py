"""Products whose operands are rounded to e4m3 under a scale per block: the truth is that of the rounded operands.

Weights and tokens are given, so what is multiplied is known to the bit, and so it is where a subject shows its
activation. Only an operand that has an error e of its own may be rounded to another number, by d(a + e) - d(a) where d
rounds. That is at most e and twice the largest error of a rounding, and what is expected of it follows from the chance,
of the size of e / q with q the distance of numbers, that a rounding border lies between the two.
"""

import math

import torch

from moe_ref.contract.vocabulary import Format
from moe_ref.numerics.formats import entry, unit_in_last_place
from moe_ref.numerics.scaled import ScaleRule, decode, quantise
from moe_ref.verify.bounds.rows import Rows

MXFP8 = ScaleRule(rows=1, columns=32, power_of_two=True)
"""32 elements along the sum, the scale rounded up to a power of two (OCP Microscaling 1.0; torchao's RCEIL)."""

RULES = {"mxfp8": MXFP8}
"""Words of `Numerics.products` -> how both operands are rounded; blocks are those of the tensor as a rank holds it."""

_CROSSES = math.sqrt(3)
"""Chance of a border between value and error, in standard deviations of the error over the distance of borders.

A store in 16 bits errs by up to h, evenly, and its numbers hold the borders of 4 bits, where half of them go the wrong
way: h / q.
"""


def rounded_operand(values_RK: torch.Tensor, rule: ScaleRule) -> torch.Tensor:
    """Each number as it is multiplied, in fp64; what is not finite stays, without a part in its block's scale."""
    values_RK = values_RK.double()
    if not values_RK.numel():
        return values_RK
    finite = torch.isfinite(values_RK)
    rounded_RK = decode(*quantise(torch.where(finite, values_RK, 0.0), rule), rule)
    return torch.where(finite, rounded_RK, values_RK)


def rounded_rows(rows: Rows, rule: ScaleRule) -> Rows:
    """Rows as they are multiplied, with what their own errors become."""
    value = rounded_operand(rows.value, rule)
    if not value.numel() or not bool(rows.bound.any()):
        return Rows(value, rows.bound, rows.variance, drift=rows.drift)
    codes = entry(rule.stored)
    # No scale of a row is larger: its largest over the largest code, rounded up to a power of two.
    scale_R1 = 2 * rows.largest.amax(1, keepdim=True) / codes.max
    subnormal_R1 = scale_R1 * 2.0 ** (codes.min_exponent - codes.significand_bits + 1)
    # That of 24 bits times 2^20 is that of 4 bits, under whatever power of two.
    normal = unit_in_last_place(rows.largest, Format.FP32) * 2.0 ** (
        entry(Format.FP32).significand_bits - codes.significand_bits)
    distance = torch.maximum(normal, subnormal_R1)
    bound = rows.bound + distance
    if rows.variance is None:
        return Rows(value, bound, drift=rows.drift)
    crossed = torch.minimum(_CROSSES * rows.variance.sqrt() * distance, distance.square() / 4)
    return Rows(value, bound, rows.variance + crossed, drift=rows.drift)
