"""Rounding to a floating-point format, exactly, on fp64 tensors that hold the numbers."""

from typing import Literal

import torch

from moe_ref.contract.vocabulary import Format
from moe_ref.tolerances.load import load_tolerances
from moe_ref.tolerances.schema import FormatEntry

Mode = Literal["nearest", "truncate"]
"""To nearest with ties to even, or towards zero."""

_FRACTION_BITS, _EXPONENT, _BIAS = 52, 2**11 - 1, 1023
_FRACTION = 2**_FRACTION_BITS - 1
"""Of an fp64 number: the bits below its exponent, and its exponent, which is stored with a bias."""


def entry(stored: Format) -> FormatEntry:
    """Significand bits, smallest normal exponent and largest value, from tolerances.yaml."""
    return load_tolerances().file.formats[stored]


def unit_in_last_place(value: torch.Tensor, stored: Format) -> torch.Tensor:
    """Distance of the format's numbers in the binade of each fp64 value; that of subnormals below the smallest, that of
    infinity and NaN in the binade of 1/2.
    """
    one = entry(stored)
    # Of the bits, as biased exponents: a function of its own would pass over each tensor twice as often.
    biased = (value.view(torch.int64) >> _FRACTION_BITS).bitwise_and_(_EXPONENT)
    # What is not finite is judged as such; with the unit of 1/2 it leaves sums over its neighbours finite.
    biased.masked_fill_(biased == _EXPONENT, _BIAS - 1)
    biased.clamp_(min=one.min_exponent + _BIAS).sub_(one.significand_bits - 1).clamp_(min=1)
    return biased.bitwise_left_shift_(_FRACTION_BITS).view(torch.float64)


def round_to(value: torch.Tensor, stored: Format, mode: Mode = "nearest") -> torch.Tensor:
    """The format's number that each fp64 value is rounded to, in fp64; beyond the largest: infinity, cut off: that.

    e4m3 has no infinity: it saturates, as conversions in quantisers do.
    """
    if stored is Format.FP64:
        return value
    if stored is Format.FP32 and mode == "nearest":
        return value.float().double()  # the same bits; narrower formats are reached through fp32, with two roundings
    one = entry(stored)
    unit = unit_in_last_place(value, stored)
    scaled = value / unit
    whole = torch.round(scaled) if mode == "nearest" else torch.trunc(scaled)
    rounded = whole * unit
    over = rounded.abs() > one.max
    saturates = mode == "truncate" or stored is Format.E4M3
    limit = torch.full_like(value, one.max if saturates else torch.inf) * value.sign()
    return torch.where(over & torch.isfinite(value), limit, torch.where(torch.isfinite(value), rounded, value))


def is_representable(value: torch.Tensor, stored: Format) -> torch.Tensor:
    """Whether each fp64 value is a number of the format."""
    return round_to(value, stored) == value


def half_cell(target: torch.Tensor, stored_value: torch.Tensor, stored: Format) -> torch.Tensor:
    """How far the reals that round to a stored value reach towards a target: half a unit in the last place.

    A quarter of one towards zero at a power of two, where numbers lie twice as close on that side.
    """
    unit = unit_in_last_place(stored_value, stored)
    # A power of two has no fraction bits; 0 has none either, but no smaller unit.
    closer = (stored_value.view(torch.int64) & _FRACTION == 0) & (unit > 2.0 ** _smallest(stored))
    towards_zero = (stored_value - target) * stored_value.sign() > 0
    return torch.where(closer & towards_zero, 0.25, 0.5).mul(unit)


def cell_distance(target: torch.Tensor, stored_value: torch.Tensor, stored: Format | None) -> torch.Tensor:
    """How far a target is from the reals that round to a stored value: at most the error before the rounding.

    For every correctly rounded store y of t, t lies in the cell of y, so the distance never exceeds |t - target|; None:
    no store, the plain distance.
    """
    off = (stored_value - target).abs()
    if stored is None or stored is Format.FP64:
        return off
    return (off - half_cell(target, stored_value, stored)).clamp(min=0)


def _smallest(stored: Format) -> int:
    return entry(stored).min_exponent - (entry(stored).significand_bits - 1)


def power_of_two(exponent_of_two: torch.Tensor) -> torch.Tensor:
    """2^exponent in fp64 for whole exponents from -1022 to 1023, others are clamped.

    torch.ldexp takes the power in fp32 for integer exponents in some versions: https://github.com/pytorch/pytorch/issues/133267.
    """
    bits = (exponent_of_two.long().clamp(-1022, 1023) + 1023) << 52
    return bits.view(torch.float64)
