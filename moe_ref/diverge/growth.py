"""The law by which a subject's error grows with the length of its sums, and what kind of accumulation has that law.

An exponent alone does not tell: a split sum rounded to nearest grows as K^0.16, a pairwise fp16 sum not at all, a
truncating fp8 one as K^0.6. What tells is the level in effective bits and positive data: errors of sums rounded to
nearest have both signs there, a cut sum is too small everywhere, and operands rounded to nearest average out as K^-1/2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from moe_ref.diverge.measure import Point
from moe_ref.tolerances.load import load_tolerances
from moe_ref.tolerances.schema import GrowthRules

_LENGTHS = 3
"""Lengths of which a law is told."""


class GrowthClass(StrEnum):
    """What limits the accuracy of a subject."""

    INPUT_LIMITED = "input_limited"
    NEAREST = "nearest"
    TRUNCATING = "truncating"
    LOW_PRECISION = "low_precision_accumulation"
    UNCLEAR = "unclear"


@dataclass(frozen=True)
class Growth:
    """exponent, positive_exponent: of the relative error over K >= 1024, on symmetric and on positive data; nan where
    fewer than two lengths tell. bits: range of the effective bits there, symmetric data, nan where stores hide all of
    them. evidence: why the class, in words.
    """

    exponent: float
    positive_exponent: float
    bits: tuple[float, float]
    growth_class: GrowthClass
    evidence: str


def exponent(points: Sequence[Point]) -> float:
    """Least squares slope of log(relative error) over log(length); nan with fewer than two."""
    if len(points) < 2:
        return math.nan
    lengths, errors = [math.log2(one.terms) for one in points], [math.log2(one.relative) for one in points]
    middle, mean = sum(lengths) / len(lengths), sum(errors) / len(errors)
    return (sum((length - middle) * (error - mean) for length, error in zip(lengths, errors, strict=True))
            / sum((length - middle) ** 2 for length in lengths))


def growth(symmetric: Sequence[Point], positive: Sequence[Point]) -> Growth:
    """The law of growth and its class, from the points of one subject on both kinds of data."""
    rules = load_tolerances().file.growth.rules
    slope, positive_slope = (exponent(_telling(points, least=rules.long)) for points in (symmetric, positive))
    long = [one for one in symmetric if one.terms >= rules.long]
    level = min((one.bits for one in long), default=math.nan)
    kind, evidence = _classify(symmetric, positive, slope, positive_slope, level, rules)
    seen = [one.bits for one in long if one.resolved]
    return Growth(slope, positive_slope, (min(seen), max(seen)) if seen else (math.nan, math.nan), kind, evidence)


def _telling(points: Sequence[Point], least: int = 0, most: float = math.inf) -> list[Point]:
    """Those in a range of lengths whose error was seen: not hidden by a store, and not zero."""
    return [one for one in points if least <= one.terms <= most and one.resolved and one.relative > 0]


def _averaging(symmetric: Sequence[Point], positive: Sequence[Point], rules: GrowthRules) -> float:
    """Error on positive over that on symmetric data, each in roots of summed squares, at the longest short sum.

    Rounded operands make errors that are independent from product to product, so that it is 1; rounded additions follow
    the sum, which is larger where nothing cancels. nan where no short sum tells.
    """
    of = [{one.terms: one.relative / one.spread for one in _telling(points, most=rules.short)}
          for points in (symmetric, positive)]
    both = sorted(set(of[0]) & set(of[1]))
    return of[1][both[-1]] / of[0][both[-1]] if both else math.nan


def _classify(symmetric: Sequence[Point], positive: Sequence[Point], slope: float, positive_slope: float,
              bits: float, rules: GrowthRules) -> tuple[GrowthClass, str]:
    """The rules in the order in which they exclude each other."""
    if not symmetric or not positive:
        return GrowthClass.UNCLEAR, "needs both symmetric and positive data (--data unit,positive)"
    if min(len(symmetric), len(positive)) < _LENGTHS:
        return GrowthClass.UNCLEAR, f"needs {_LENGTHS} lengths, since two always lie on a line (--k 64:16384)"
    everywhere = _telling(positive)
    highest_share = max((one.share for one in everywhere), default=math.nan)
    lowest = min([bits] + [one.bits for one in positive if one.terms >= rules.long])
    too_small = f"on positive data every sum is too small (signed share {highest_share:+.2f} at most)"
    if everywhere and highest_share <= rules.one_sided and positive_slope >= rules.growing:
        return GrowthClass.TRUNCATING, (
            f"{too_small} and the error grows as K^{positive_slope:.2f}: what is cut off adds up")
    if everywhere and highest_share <= rules.one_sided and abs(positive_slope) <= rules.flat:
        return GrowthClass.INPUT_LIMITED, (
            f"{too_small}, but no more so for longer sums (K^{positive_slope:.2f}): operands are cut off, or a cut sum "
            "is flushed at fixed lengths")
    if lowest >= rules.nearest_bits:
        return GrowthClass.NEAREST, (
            f"at least {lowest:.1f} effective bits on symmetric and positive data, errors of both signs "
            f"(signed share up to {highest_share:+.2f}): fp32 additions rounded to nearest")
    everywhere_slope, averaging = exponent(_telling(symmetric)), _averaging(symmetric, positive, rules)
    if abs(everywhere_slope) <= rules.flat and averaging <= rules.averaging:
        later = f"; longer positive sums are too small, since what is added up is cut off (K^{positive_slope:.2f})"
        return GrowthClass.INPUT_LIMITED, (
            f"the error does not grow (K^{everywhere_slope:.2f}), and on positive data it averages out "
            f"({averaging:.2f} times what it is on symmetric data, in roots of summed squares), as that of rounded "
            f"operands does{later * (positive_slope > 0)}")
    if bits <= rules.narrow_bits and averaging > rules.averaging:
        return GrowthClass.LOW_PRECISION, (
            f"{bits:.1f} effective bits, where fp32 has 24; errors of short positive sums have both signs and do not "
            f"average out ({averaging:.1f} times those on symmetric data, in roots of summed squares), so it is the "
            "additions that are rounded")
    return GrowthClass.UNCLEAR, _why_unclear(symmetric, positive, bits, rules)


def _why_unclear(symmetric: Sequence[Point], positive: Sequence[Point], bits: float, rules: GrowthRules) -> str:
    if not any(one.terms <= rules.short for one in positive) or sum(one.terms >= rules.long for one in symmetric) < 2:
        return f"needs lengths up to {rules.short} and two from {rules.long} on (--k 64:16384)"
    hidden = sum(not one.resolved for one in (*symmetric, *positive))
    if hidden:
        return (f"16-bit stores hide the sum at {hidden} of {len(symmetric) + len(positive)} lengths: fewer than 8 "
                f"flipped, so at least {bits:.1f} effective bits; more outputs (--m, --n) see further")
    return f"{bits:.1f} effective bits and exponents that fit no class"
