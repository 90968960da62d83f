"""Products whose operands are rounded to 8 bits under scales: the truth is that of the rounded operands.

Weights and tokens are given, so what is multiplied is known, and so it is where a subject shows its activation, but for
two things. Two right quantisers differ in the last bit of a quotient and of a scale that is no power of two, so that a
number next to a rounding border may become either neighbour. And an operand that has an error e of its own may be
rounded to another number, by d(a + e) - d(a) where d rounds. That is at most e and twice the largest error of a
rounding, and what is expected of it follows from the chance, of the size of e / q with q the distance of numbers, that
a rounding border lies between the two.
"""

import math
from dataclasses import dataclass, replace

import torch

from moe_ref.contract.vocabulary import Format
from moe_ref.numerics.formats import entry, round_to, unit_in_last_place
from moe_ref.verify.bounds.rows import Rows

QUOTIENT = 2.0**-22
"""What two right quotients of a number and its scale may differ by, relative to them: the scale, its reciprocal, the
quotient and a number in fp32 are rounded, each by half a unit of 2^-23."""

SCALE = 2.0**-22
"""What two right scales may differ by, relative to them: a quotient by 448, or a product with its reciprocal."""

FLUSH = 2.0**-252
"""Keeps the square of a row's largest number above zero."""

_CROSSES = math.sqrt(3)
"""Chance of a border between value and error, in standard deviations of the error over the distance of borders.

A store in 16 bits errs by up to h, evenly, and its numbers hold the borders of 4 bits, where half of them go the wrong
way: h / q.
"""


@dataclass(frozen=True)
class OperandRule:
    """How rows are rounded: one scale for every `columns` of a row, None for all; codes in e4m3, or in int8.

    power_of_two: scales are rounded up to one. start: how far inside its first block the first column lies. fixed: a
    scale that was chosen before, for all rows.
    """

    columns: int | None
    power_of_two: bool = False
    is_integer: bool = False
    start: int = 0
    fixed: float | None = None

    @property
    def largest(self) -> float:
        """The largest code."""
        return 127.0 if self.is_integer else entry(Format.E4M3).max

    def num_blocks(self, num_columns: int) -> int:
        """How many scales a row of so many columns has."""
        return 1 if self.columns is None else -(-(self.start + num_columns) // self.columns)

    def at(self, start: int) -> "OperandRule":
        """The rule for a part that begins at that column of the blocks."""
        return self if self.columns is None else replace(self, start=start % self.columns)


MXFP8 = OperandRule(32, power_of_two=True)
"""32 elements along the sum, the scale rounded up to a power of two (OCP Microscaling 1.0; torchao's RCEIL)."""

RULES = {"mxfp8": MXFP8, "fp8_row": OperandRule(None), "fp8_block": OperandRule(128), "fp8_tensor": OperandRule(None),
         "int8_row": OperandRule(None, is_integer=True)}
"""Words of `Numerics.products` -> how operands are rounded; blocks are those of the tensor as a rank holds it, or those
of encoded weights where these are cut inside one."""


def operand_scales(values_RK: torch.Tensor, rule: OperandRule) -> torch.Tensor:
    """(R, blocks) in fp64; what is not finite has no part in its block's scale."""
    if rule.fixed is not None:
        return torch.full((len(values_RK), 1), rule.fixed, dtype=torch.float64, device=values_RK.device)
    finite = torch.where(torch.isfinite(values_RK), values_RK, 0.0).abs()
    size = rule.columns or max(1, values_RK.shape[1])
    missing = -(rule.start + values_RK.shape[1]) % size
    blocks = torch.nn.functional.pad(finite, (rule.start if rule.columns else 0, missing)).unflatten(1, (-1, size))
    exact = blocks.amax(2) / rule.largest
    if rule.power_of_two:
        mantissa, exponent = torch.frexp(exact)
        scales = torch.ldexp(torch.ones_like(exact), exponent - (mantissa == 0.5).int())
    else:
        scales = round_to(exact, Format.FP32)
    # A subnormal scale has too few bits to keep codes in range, and one of zero would divide by it.
    return torch.where(scales < 2.0 ** entry(Format.FP32).min_exponent, 1.0, scales)


def over_columns(scales: torch.Tensor, num_columns: int, rule: OperandRule) -> torch.Tensor:
    """The scale of every element, (R, K)."""
    if rule.columns is None or rule.fixed is not None:
        return scales[:, :1].expand(-1, num_columns)
    column_K = torch.arange(num_columns, device=scales.device) + rule.start
    return scales[:, column_K // rule.columns]


def codes_of(quotient: torch.Tensor, rule: OperandRule) -> torch.Tensor:
    """The code that each fp64 number is rounded to, ties to even, saturating."""
    rounded = torch.round(quotient) if rule.is_integer else round_to(quotient, Format.E4M3)
    return rounded.clamp(-rule.largest, rule.largest)


def code_rows(rows: Rows, scale_RK: torch.Tensor, rule: OperandRule) -> Rows:
    """Codes of rows under given scales, and which others a right quantiser may have; nothing is predicted of them."""
    quotient, error = rows.value / scale_RK, rows.bound / scale_RK
    slack = QUOTIENT * (quotient.abs() + error)
    low, high = (codes_of(quotient + sign * (error + slack), rule) for sign in (-1, 1))
    value = codes_of(quotient, rule)
    value = torch.where(torch.isfinite(rows.value), value, rows.value)
    return Rows(value, torch.maximum(high - value, value - low).nan_to_num(torch.inf))


def scale_rows(rows: Rows, rule: OperandRule) -> Rows:
    """Scales of rows, and how far off those of a right quantiser may be; nothing is predicted of them."""
    scales = operand_scales(rows.value, rule)
    if rule.fixed is not None:
        return Rows(scales, torch.zeros_like(scales))
    magnitude = rows.value.abs()
    low, high = (operand_scales((magnitude + sign * rows.bound).clamp(min=0), rule) for sign in (-1, 1))
    bound = torch.maximum(high - scales, scales - low)
    # That of a block of zeros, or of numbers below what fp32 scales reach, is of no consequence.
    bound = torch.where((scales == 1.0) | (low == 1.0), torch.inf, bound)
    return Rows(scales, bound if rule.power_of_two else bound + SCALE * (scales + bound))


def rounded_operand(values_RK: torch.Tensor, rule: OperandRule) -> torch.Tensor:
    """Each number as it is multiplied, in fp64; what is not finite stays, without a part in its block's scale."""
    values_RK = values_RK.double()
    if not values_RK.numel():
        return values_RK
    scale_RK = over_columns(operand_scales(values_RK, rule), values_RK.shape[1], rule)
    quotient = values_RK / scale_RK
    rounded_RK = codes_of(quotient if rule.is_integer else round_to(quotient, Format.FP32), rule) * scale_RK
    return torch.where(torch.isfinite(values_RK), rounded_RK, values_RK)


def rounded_rows(rows: Rows, rule: OperandRule) -> Rows:
    """Rows as they are multiplied, with what their own errors become and what two right quantisers differ by."""
    value = rounded_operand(rows.value, rule)
    if not value.numel():
        return Rows(value, rows.bound, rows.variance, drift=rows.drift)
    scale_RK = over_columns(operand_scales(rows.value, rule), value.shape[1], rule)
    bound, variance = _at_borders(rows, scale_RK, rule)
    if not bool(rows.bound.any()):
        return Rows(value, bound, None if rows.variance is None else variance, drift=rows.drift)
    distance = _distance(rows, rule)
    bound = bound + rows.bound + distance
    if rows.variance is None:
        return Rows(value, bound, drift=rows.drift)
    moved = rows.variance + _of_scale(rows, rule)
    crossed = torch.minimum(_CROSSES * moved.sqrt() * distance, distance.square() / 4)
    return Rows(value, bound, rows.variance + crossed + variance, drift=rows.drift)


def _at_borders(rows: Rows, scale_RK: torch.Tensor, rule: OperandRule) -> tuple[torch.Tensor, torch.Tensor]:
    """Bound and variance of what two right quantisers differ by, each element without an error of its own."""
    if rule.power_of_two:
        zero = torch.zeros_like(rows.value)
        return zero, zero
    quotient = torch.where(torch.isfinite(rows.value), rows.value / scale_RK, 0.0)
    low, high = (codes_of(quotient * (1 + sign * QUOTIENT), rule) for sign in (-1, 1))
    step = (high - low).abs() * scale_RK
    of_scale = torch.zeros_like(step) if rule.fixed is not None else SCALE * quotient.abs() * scale_RK
    # Either neighbour is as likely: half of the step is right for one half of the quantisers.
    return step + of_scale, step.square() / 2 + of_scale.square() / 12


def _of_scale(rows: Rows, rule: OperandRule) -> torch.Tensor | float:
    """Variance by which an element moves against its borders since its row's largest one, and so its scale, has errors.

    Of the largest in a row, which of a block is at least as exact. A power of two moves by no small amount.
    """
    if rule.power_of_two or rule.fixed is not None or rows.variance is None:
        return 0.0
    largest_R1, at_R1 = rows.value.nan_to_num(0.0, 0.0, 0.0).abs().max(1, keepdim=True)
    relative_R1 = rows.variance.gather(1, at_R1) / largest_R1.square().clamp(min=FLUSH)
    return relative_R1 * rows.value.square()


def _distance(rows: Rows, rule: OperandRule) -> torch.Tensor:
    """Of neighbouring numbers around each element, under the largest scale that its row may have."""
    scale_R1 = operand_scales(rows.largest, replace(rule, columns=None)) * (2.0 if rule.power_of_two else 1.0)
    if rule.is_integer:
        return scale_R1.expand_as(rows.value)
    codes = entry(Format.E4M3)
    subnormal_R1 = scale_R1 * 2.0 ** (codes.min_exponent - codes.significand_bits + 1)
    # That of 24 bits times 2^20 is that of 4 bits, under whatever power of two; under another scale the binade may be
    # the next one.
    normal = unit_in_last_place(rows.largest, Format.FP32) * 2.0 ** (
        entry(Format.FP32).significand_bits - codes.significand_bits)
    return torch.maximum(normal if rule.power_of_two else 2 * normal, subnormal_R1)
