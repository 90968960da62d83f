"""Products whose operands are rounded to 8 bits under scales: the truth is that of the rounded operands.

Weights and tokens are given, so what is multiplied is known, and so it is where a subject shows its activation, but for
two things. Two right quantisers differ in the last bit of a quotient and of a scale that is no power of two, so that a
number next to a rounding border may become either neighbour. And an operand with an error of its own may lie on the
other side of a border, or be the largest of its block, whose scale then is another one. What it becomes is known all
the same wherever no border is within reach; elsewhere it is one of the numbers between those at both ends.
"""

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

LARGEST_LOSS, SUBNORMAL = 2.0**-4 + QUOTIENT, 2.0**-9
"""Of e4m3: half the distance of its numbers relative to them, and the distance of the smallest."""

MANY_BORDERS = 1.25
"""Mean square of the difference of two rounded numbers over that of their own, where those of e4m3 lie closer."""

FAR = 0.25
"""What a scale moves by that is no small part of it."""

REACHES = ((0.5, 0.5), (1.0, 0.31), (2.0, 0.16), (8.0, 0.025))
"""Standard deviations of an operand's error, beside its last store -> the chance that a border so far off is crossed.

A store in 16 bits puts what lies next to a border upon it, and half of that goes to the other side. The chance is that
of a Gaussian error beyond the reach before. What lies between two and eight deviations rarely does go wrong; its chance
is that of two, so that the few that do are within what is likely however few terms a sum has.
"""

_SMALLEST = 2.0**-126
"""Smallest normal number of fp32, and so the smallest scale."""


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

RULES = {"mxfp8": MXFP8, "fp8_row": OperandRule(None), "fp8_row_e8m0": OperandRule(None, power_of_two=True),
         "fp8_block": OperandRule(128), "fp8_tensor": OperandRule(None), "int8_row": OperandRule(None, is_integer=True)}
"""Words of `Numerics.products` -> how operands are rounded; blocks are those of the tensor as a rank holds it, or those
of encoded weights where these are cut inside one."""


def _exact_scales(values_RK: torch.Tensor, rule: OperandRule) -> torch.Tensor:
    """Every block's largest finite number over the largest code, (R, blocks)."""
    finite = torch.where(torch.isfinite(values_RK), values_RK, 0.0).abs()
    size = rule.columns or max(1, values_RK.shape[1])
    start = rule.start if rule.columns else 0
    blocks = torch.nn.functional.pad(finite, (start, -(start + values_RK.shape[1]) % size)).unflatten(1, (-1, size))
    return blocks.amax(2) / rule.largest


def operand_scales(values_RK: torch.Tensor, rule: OperandRule) -> torch.Tensor:
    """(R, blocks) in fp64; what is not finite has no part in its block's scale."""
    if rule.fixed is not None:
        return torch.full((len(values_RK), 1), rule.fixed, dtype=torch.float64, device=values_RK.device)
    exact = _exact_scales(values_RK, rule)
    if rule.power_of_two:
        mantissa, exponent = torch.frexp(exact)
        scales = torch.ldexp(torch.ones_like(exact), exponent - (mantissa == 0.5).int())
    else:
        scales = round_to(exact, Format.FP32)
    # A subnormal scale has too few bits to keep codes in range, and one of zero would divide by it.
    return torch.where(scales < _SMALLEST, 1.0, scales)


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
    """Codes of rows under given scales, and which others a right quantiser may have; nothing is predicted of them.

    A quotient by a power of two is exact, so that a tie is one, and goes to the even code.
    """
    quotient, error = rows.value / scale_RK, rows.bound / scale_RK
    slack = 0.0 if rule.power_of_two else QUOTIENT * (quotient.abs() + error)
    low, high = (codes_of(quotient + sign * (error + slack), rule) for sign in (-1, 1))
    value = codes_of(quotient, rule)
    value = torch.where(_as_codes(rows.value, rule), value, rows.value)
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
    nothing = _exact_scales((magnitude - rows.bound).clamp(min=0), rule) < _SMALLEST
    bound = torch.where(nothing, torch.inf, bound)
    return Rows(scales, bound if rule.power_of_two else bound + SCALE * (scales + bound))


def rounded_operand(values_RK: torch.Tensor, rule: OperandRule) -> torch.Tensor:
    """Each number as it is multiplied, in fp64; what is not finite stays, without a part in its block's scale."""
    values_RK = values_RK.double()
    if not values_RK.numel():
        return values_RK
    scale_RK = over_columns(operand_scales(values_RK, rule), values_RK.shape[1], rule)
    quotient = values_RK / scale_RK
    rounded_RK = codes_of(quotient if rule.is_integer else round_to(quotient, Format.FP32), rule) * scale_RK
    return torch.where(_as_codes(values_RK, rule), rounded_RK, values_RK)


def _as_codes(values_RK: torch.Tensor, rule: OperandRule) -> torch.Tensor:
    """Which numbers become codes: a scale that is fixed lets infinities saturate."""
    return ~torch.isnan(values_RK) if rule.fixed is not None else torch.isfinite(values_RK)


def rounded_rows(rows: Rows, rule: OperandRule, scale_apart: bool = False) -> Rows:
    """Rows as they are multiplied, with what their own errors become and what two right quantisers differ by.

    scale_apart: of an error of a scale the variance has what crosses borders alone, the rest is the product's to add.
    Sharper, for what is judged number by number: few errors that are shared by whole rows make a mean square uncertain.
    """
    value = rounded_operand(rows.value, rule)
    if not value.numel():
        return Rows(value, rows.bound, rows.variance, drift=rows.drift)
    low, high = _ends(rows.value, rows.bound, rule)
    bound = torch.maximum(high - value, value - low).nan_to_num(torch.inf)
    if rows.variance is None:
        return Rows(value, bound, drift=rows.drift)
    crossed = _crossed_apart if scale_apart else _crossed
    variance = crossed(rows, value, rule) if bool(rows.bound.any()) else (high - low).square() / 2
    variance = variance.nan_to_num(torch.inf)
    if not scale_apart:
        variance = variance + scale_variance(rows, rule) * value.square()
    return Rows(value, bound, variance, drift=rows.drift)


def _crossed(rows: Rows, value: torch.Tensor, rule: OperandRule) -> torch.Tensor:
    """Mean square of what each becomes off by, since errors cross borders."""
    variance = torch.zeros_like(value)
    for reach, chance in REACHES:
        low, high = _ends(rows.value, torch.minimum(_reach(rows, reach), rows.bound), rule)
        variance = torch.maximum(variance, chance * (high - low).square())
    return variance


def _crossed_apart(rows: Rows, value: torch.Tensor, rule: OperandRule) -> torch.Tensor:
    """The same under a scale that stays: one in fp32 takes numbers across borders as errors of their own do."""
    assert rows.variance is not None
    variance = off = torch.zeros_like(value)
    for reach, chance in REACHES:
        error = torch.minimum(_reach(rows, reach), rows.bound)
        low, high = _ends(rows.value, error, rule)
        if not rule.power_of_two and rule.fixed is None:
            moved = over_columns(_relative_moves(rows.value, error, rule), rows.value.shape[1], rule)
            moved_by = rows.value.abs() * moved
            # Two errors seldom add up; of stores, which end at half a unit, they may.
            both = error + moved_by if reach == REACHES[-1][0] else torch.hypot(error, moved_by)
            at_scale = _ends(rows.value, both, rule, scale_moves=False)
            low, high = (torch.where(moved < FAR, near, end) for near, end in zip(at_scale, (low, high), strict=True))
        off = torch.maximum(high - value, value - low).square()
        variance = torch.maximum(variance, chance * off)
    # An error across many borders comes through as it is, with a rounding.
    return torch.maximum(variance, torch.minimum(off, MANY_BORDERS * rows.variance))


def _relative_moves(value: torch.Tensor, error: torch.Tensor, rule: OperandRule) -> torch.Tensor:
    """How far scales move at most while every number does by so much, relative to them; infinite from or to zeros."""
    scales, magnitude = operand_scales(value, rule), value.abs()
    low, high = (operand_scales((magnitude + sign * error).clamp(min=0), rule) for sign in (-1, 1))
    ends = (_exact_scales((magnitude + sign * error).clamp(min=0), rule) < _SMALLEST for sign in (-1, 1))
    zeros = next(ends) != next(ends)
    return (torch.maximum(high - scales, scales - low) / scales).masked_fill(zeros, torch.inf)


def _ends(value: torch.Tensor, error: torch.Tensor, rule: OperandRule,
          scale_moves: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest number that each may be multiplied as, up to so large an error.

    scale_moves: with the largest of its block, beside the roundings of a scale.
    """
    columns = value.shape[1]
    magnitude, error_of_largest = value.abs(), error if scale_moves else torch.zeros_like(error)
    scales = [over_columns(operand_scales((magnitude + sign * error_of_largest).clamp(min=0), rule), columns, rule)
              for sign in (-1, 1)]
    if not rule.power_of_two and rule.fixed is None:
        scales = [scales[0] * (1 - SCALE), scales[1] * (1 + SCALE)]
    lows, highs = ([(value + sign * error) / scale for scale in scales] for sign in (-1, 1))
    if rule.power_of_two:
        # Another power of two has codes of its own.
        low = torch.minimum(*(codes_of(one, rule) * scale for one, scale in zip(lows, scales, strict=True)))
        high = torch.maximum(*(codes_of(one, rule) * scale for one, scale in zip(highs, scales, strict=True)))
    else:
        # The scale itself, or any of its neighbours; codes rise with quotients.
        least = torch.minimum(*(one - QUOTIENT * one.abs() for one in lows))
        most = torch.maximum(*(one + QUOTIENT * one.abs() for one in highs))
        low = torch.minimum(*(codes_of(least, rule) * scale for scale in scales))
        high = torch.maximum(*(codes_of(most, rule) * scale for scale in scales))
    if rule.fixed is not None:
        return low, high
    # No rounding loses more than half a unit of the code, under whatever scale.
    lost = error + scales[1] / 2 if rule.is_integer else error + (
        LARGEST_LOSS * (magnitude + error) + scales[1] * SUBNORMAL / 2)
    return torch.maximum(low, value - lost), torch.minimum(high, value + lost)


def _reach(rows: Rows, deviations: float) -> torch.Tensor:
    """How far off each may be: by its last store, and by so many deviations of what was before it."""
    assert rows.variance is not None
    if rows.unrounded is None or rows.stored is None:
        return deviations * rows.variance.sqrt()
    return unit_in_last_place(rows.largest, rows.stored) / 2 + deviations * rows.unrounded.sqrt()


def scale_variance(rows: Rows, rule: OperandRule) -> torch.Tensor:
    """(R, 1): relative variance of the scales of a row, which the error of a block's largest number makes.

    It is the same in all products of a block. Of the row's largest; a power of two moves by no small amount.
    """
    if rule.power_of_two or rule.fixed is not None or rows.variance is None or not rows.value.shape[1]:
        return torch.zeros(len(rows.value), 1, dtype=torch.float64, device=rows.value.device)
    # From zeros, what becomes of the numbers themselves is all there is.
    moves = _relative_moves(rows.value, rows.variance.sqrt(), rule)
    return torch.where(torch.isfinite(moves), moves, 0.0).square().amax(1, keepdim=True)
