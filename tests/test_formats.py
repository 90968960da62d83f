"""The unit in the last place, taken from the bits of a number, is the one that the definition gives."""

import math

import pytest
import torch

from moe_ref.contract.vocabulary import Format
from moe_ref.numerics.formats import entry, unit_in_last_place


def by_definition(value: float, stored: Format) -> float:
    """2^(exponent - fraction bits) by Python's own frexp; no smaller than the smallest normal number of fp64."""
    one = entry(stored)
    exponent = math.frexp(value)[1] - 1 if value else one.min_exponent
    return math.ldexp(1.0, max(max(exponent, one.min_exponent) - (one.significand_bits - 1), -1022))


@pytest.mark.parametrize("stored", Format)
def test_units_of_every_binade(stored: Format) -> None:
    """Powers of two, their neighbours on both sides, zeros and numbers that are subnormal in fp64 itself."""
    powers = [math.ldexp(1.0, exponent) for exponent in range(-1074, 1024)]
    near = [one for power in powers for one in (power, math.nextafter(power, 0), math.nextafter(power, math.inf))]
    values = [*near, *(-one for one in near), 0.0, -0.0]
    found = unit_in_last_place(torch.tensor(values, dtype=torch.float64), stored)
    assert found.tolist() == [by_definition(value, stored) for value in values]


def test_what_is_not_finite_leaves_its_neighbours_finite() -> None:
    """The units' squares are summed over tiles, in which one NaN must not hide what the others say."""
    found = unit_in_last_place(torch.tensor([math.inf, -math.inf, math.nan, 0.5], dtype=torch.float64), Format.BF16)
    assert found.tolist() == [2.0**-8] * 4
