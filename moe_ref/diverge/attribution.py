"""What one subject's error is made of: never told from a difference of two, always from a residual against the truth.

The oracle executes what a subject may have done to its operands and stores (counterfactuals); what is left of the error
is measured by what rounding to nearest in fp32 costs in a long sum.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch

from moe_ref.contract.vocabulary import Format
from moe_ref.diverge.conversion import COUNTERFACTUALS, Conversion
from moe_ref.diverge.growth import GrowthClass
from moe_ref.diverge.measure import NARROW, cell_error, rms, signed_share
from moe_ref.diverge.mistakes import EXPLAINED, Fit, Mistake, find_mistake, locate, regress
from moe_ref.diverge.truth import Bench
from moe_ref.numerics.accumulation import Accumulation
from moe_ref.numerics.formats import is_representable, round_to, unit_in_last_place

ORDER = 1.5
"""rms residual / rms predicted that an order of fp32 additions may reach: the longest chain measures 1.0."""

_BETTER = 0.5
"""A counterfactual is believed if it takes away half of the residual."""

_SAME = 0.9
"""Share of elements that must equal a counterfactual store bit by bit."""

WORST_CUT = Accumulation(unit=2.0**-24, truncates=True, products_per_step=4, kept_bits=23)
"""The truncating fp32 accumulator that loses most: fewest products at once, fewest bits kept."""

_CUT_SHARE = -0.6
_SMALL = 2.0**-4
"""Relative error above which additions of low precision are no explanation."""


class Cause(StrEnum):
    """What a subject's error is made of."""

    ORDER = "order of summation"
    OPERANDS = "operands of lower precision"
    STORE = "rounding of the output"
    PARTIAL_SUMS = "rounding of partial sums"
    TRUNCATION = "truncating accumulation"
    LOW_PRECISION = "low-precision accumulation"
    NONE = "none"
    MISTAKE = "bug"
    UNEXPLAINED = "unexplained"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """causes: all that have part, the largest first. relative: rms error / rms value. words, evidence: for a reader.

    conversion, operands: what was made of the operands, and the fit of the error on it. inputs_tell: whether tf32
    copies of the operands differ from them. sigmas: rms of what is left, in predicted sigmas of fp32 rounded to
    nearest; bits, share: its level and signed share. grid: coarsest format that holds every output.
    """

    causes: tuple[Cause, ...]
    relative: float
    words: str
    evidence: str
    conversion: Conversion
    operands: Fit
    inputs_tell: bool
    sigmas: float
    bits: float
    share: float
    grid: Format
    mistake: Mistake | None = None

    @property
    def is_mistake(self) -> bool:
        """Whether it is no kind of rounding."""
        return self.causes[0] in (Cause.MISTAKE, Cause.UNEXPLAINED)


def output_grid(y_RN: torch.Tensor) -> Format:
    """The coarsest of bf16 and fp16 that holds every number; fp32 where neither does."""
    return next((one for one in (Format.BF16, Format.FP16) if bool(is_representable(y_RN, one).all())), Format.FP32)


def attribute(y_RN: torch.Tensor, bench: Bench, growth_class: GrowthClass = GrowthClass.UNCLEAR) -> Finding:
    """The causes of y_RN's error, (R, N) fp64, from counterfactuals, output grid, level, signs and place.

    growth_class: that of the subject's curve, which tells a cut narrow accumulator from a rounded one.
    """
    truth, grid = bench.truth(), output_grid(y_RN)
    error_RN, sigma = y_RN - truth.value_RN, rms(truth.nearest_RN.sqrt())
    story = _best_story(y_RN, bench, grid)
    converted = bench.truth(story.conversion)
    sigmas, share = rms(story.residual_RN) / sigma, signed_share(story.residual_RN, converted.value_RN)
    noise = float(unit_in_last_place(y_RN, grid).square().sum()) / 12
    operands = regress(error_RN, converted.value_RN - truth.value_RN, noise)
    last, words, mistake = _rest(y_RN, story, bench, grid, sigmas, share, growth_class)
    # Largest first; what explains next to nothing of the error is not named.
    sizes = {Cause.OPERANDS: rms(converted.value_RN - truth.value_RN), story.store: rms(story.store_error_RN),
             last: rms(story.residual_RN)}
    told = {Cause.OPERANDS: f"it multiplies {story.conversion.words}", story.store: story.store_words, last: words}
    causes = sorted((one for one in sizes if sizes[one] > 0 and one is not Cause.NONE),
                    key=lambda one: -sizes[one]) or [last]
    if last is Cause.LOW_PRECISION:
        # A narrow accumulator hands on its own numbers: the grid is evidence of it, not a store.
        causes = [one for one in causes if one is not Cause.STORE]
    if mistake or last is Cause.UNEXPLAINED:
        causes = [last, *(one for one in causes if one is not last)]
    bits = 24 - math.log2(sigmas) if sigmas else math.inf
    evidence = [f"what is left is {sigmas:.2g} of what a sequential fp32 sum costs"]
    if Cause.OPERANDS in causes:
        evidence.insert(0, f"rho^2 {operands.rho2:.4f} and beta {operands.beta:.3f} with {story.conversion.words}")
    if last in (Cause.TRUNCATION, Cause.LOW_PRECISION):
        evidence.append(f"{bits:.1f} effective bits, signed share {share:+.2f}")
    if mistake:
        evidence.append(f"rho^2 {mistake.fit.rho2:.4f} and beta {mistake.fit.beta:.3f}")
    if grid in NARROW:
        evidence.append(f"every output is a {grid} number, which hides what is smaller")
    return Finding(causes=tuple(causes), relative=rms(error_RN) / rms(truth.value_RN),
                   words="; ".join(told[one] for one in causes), evidence=", ".join(evidence),
                   conversion=story.conversion, operands=operands, inputs_tell=bench.problem.dtype is Format.FP32,
                   sigmas=sigmas, bits=bits, share=share, grid=grid, mistake=mistake)


@dataclass(frozen=True)
class _Story:
    """A counterfactual: operands and store executed by the oracle, and the error that is left before the store."""

    conversion: Conversion
    store: Cause
    store_words: str
    store_error_RN: torch.Tensor
    residual_RN: torch.Tensor


def _best_story(y_RN: torch.Tensor, bench: Bench, grid: Format) -> _Story:
    """The mildest story that leaves no more than another order of sums would; else the one that leaves least.

    Other operands are believed only where they take away half of what is left without them.
    """
    limit = ORDER * rms(bench.truth().nearest_RN.sqrt())
    plain, *others = (min((story for story in _stories(y_RN, bench, grid, conversion)),
                          key=lambda story: rms(story.residual_RN)) for conversion in COUNTERFACTUALS)
    left = rms(plain.residual_RN)
    if left <= limit:
        return plain
    best = min(others, key=lambda story: rms(story.residual_RN))
    mildest = next((story for story in others if rms(story.residual_RN) <= limit), best)
    return mildest if rms(mildest.residual_RN) <= _BETTER * left else plain


def _stories(y_RN: torch.Tensor, bench: Bench, grid: Format, conversion: Conversion) -> Iterator[_Story]:
    """The ways in which sums of these operands may have been stored."""
    truth = bench.truth(conversion)
    value_RN = truth.value_RN
    if grid not in NARROW:
        yield _Story(conversion, Cause.NONE, "", torch.zeros_like(y_RN), y_RN - value_RN)
    else:
        residual_RN = cell_error(y_RN, value_RN, grid)
        yield _Story(conversion, Cause.STORE, f"it rounds the output to {grid}", y_RN - value_RN - residual_RN,
                     residual_RN)
        # y was cut off if the value lies between it and its neighbour away from zero.
        unit_RN, sign_RN = unit_in_last_place(y_RN, grid), torch.where(y_RN == 0, value_RN, y_RN).sign()
        beyond_RN = (value_RN - y_RN) * sign_RN
        cut_RN = -(beyond_RN - beyond_RN.clamp(torch.zeros_like(unit_RN), unit_RN)) * sign_RN
        if rms(cut_RN) <= _BETTER * rms(residual_RN):
            yield _Story(conversion, Cause.STORE, f"it cuts the output off to {grid}, not rounding it",
                         y_RN - value_RN - cut_RN, cut_RN)
    for stored in NARROW if len(truth.partials) > 1 else ():
        for added in dict.fromkeys((grid, Format.FP32)):
            sum_RN = torch.zeros_like(value_RN)
            for partial_RN in truth.partials:
                sum_RN = round_to(sum_RN + round_to(partial_RN, stored), added)
            residual_RN = cell_error(y_RN, sum_RN, grid if grid in NARROW else None)
            # A partial sum near a border may have been rounded to the other side, which costs a whole unit.
            same_RN = residual_RN.abs() <= 8 * truth.nearest_RN.sqrt()
            if float(same_RN.double().mean()) >= _SAME:
                yield _Story(conversion, Cause.PARTIAL_SUMS, f"the partial sums of ranks are rounded to {stored}",
                             sum_RN - value_RN, torch.where(same_RN, residual_RN, 0.0))


def _rest(y_RN: torch.Tensor, story: _Story, bench: Bench, grid: Format, sigmas: float, share: float,
          growth_class: GrowthClass) -> tuple[Cause, str, Mistake | None]:
    """What made the error that is left before the store."""
    if sigmas <= ORDER:
        return Cause.ORDER, "it adds up in fp32, in an order of its own", None
    truth = bench.truth(story.conversion)
    sigma_RN = truth.nearest_RN.sqrt()
    cut = rms(WORST_CUT.variance(truth.gauges, truth.terms).sqrt())
    scaled = regress(story.residual_RN, truth.value_RN).rho2
    if share <= _CUT_SHARE and rms(story.residual_RN) <= ORDER * cut and scaled < EXPLAINED:
        return Cause.TRUNCATION, "its accumulator cuts sums off, as tensor cores do", None
    region = locate(story.residual_RN / sigma_RN, bench)
    mistake = find_mistake(y_RN - truth.value_RN, region, bench, story.conversion, grid) if len(region.rows) else None
    if mistake:
        return Cause.MISTAKE, f"{mistake.words} ({region.words})", mistake
    relative = rms(story.residual_RN) / rms(truth.value_RN)
    if (not region.whole and region.filled > 0.5) or relative > _SMALL:
        words = f"errors of {relative:.2g} of the result that no hypothesis explains ({region.words})"
        return Cause.UNEXPLAINED, words, None
    bits = 24 - math.log2(sigmas)
    if growth_class is GrowthClass.TRUNCATING:
        return Cause.TRUNCATION, f"its accumulator has about {bits:.0f} bits and cuts sums off", None
    return Cause.LOW_PRECISION, f"it accumulates with about {bits:.0f} bits", None
