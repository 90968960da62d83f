"""How far one subject's result is from the truth at one length, in the measures that growth is judged by."""

import math
from dataclasses import dataclass

import torch

from moe_ref.contract.vocabulary import Format
from moe_ref.diverge.accumulators import Declared
from moe_ref.diverge.truth import Truth
from moe_ref.numerics.formats import cell_distance, round_to, unit_in_last_place

NARROW = (Format.FP16, Format.BF16)
"""Formats so coarse that the store hides the error of the sum; it is then measured by which stores flipped."""

FEW_FLIPS = 8
"""Fewer flipped stores say how large the error is at most, not how large it is."""

_ALL_FLIPPED = 0.7
"""Above this share flips say no more how large an error is, but its square exceeds that of the store."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One subject at one length. relative: rms error / rms value, of the sum before a 16-bit store.

    bits: -log2 of the error in units of what rounding to nearest costs in a sequential sum: 24 is fp32's. resolved:
    False where too few stores flipped, so that relative and bits are limits, the error being at most so large. ratio:
    largest error / deterministic bound of what is declared. z: rms of (distance to the rounding cell / predicted sigma)
    from the truth of the declared operands. share: sum of e sign(truth) / sum of |e|: -1 where everything is too small.
    flips, flips_expected: stores that differ from the truth's, found and predicted. one_bit: relative error at 0 bits;
    predicted: relative error that the declared accumulator predicts. spread: root of summed squares / value, both rms.
    """

    terms: int
    relative: float
    bits: float
    resolved: bool
    ratio: float
    z: float
    share: float
    flips: int
    flips_expected: float
    one_bit: float
    predicted: float
    spread: float


def rms(values: torch.Tensor) -> float:
    """Root of the mean square."""
    return float(values.double().square().mean().sqrt())


def cell_error(y_RN: torch.Tensor, target_RN: torch.Tensor, stored: Format | None) -> torch.Tensor:
    """Signed distance of the target from the reals that round to y: at most the error before the store."""
    return cell_distance(target_RN, y_RN, stored) * (y_RN - target_RN).sign()


def measure(y_RN: torch.Tensor, truth: Truth, declared_truth: Truth, declared: Declared, stored: Format) -> Point:
    """All measures of a result y_RN (fp64 numbers of the format `stored`).

    truth is that of the operands as they are, declared_truth that of the operands as the subject says it converts them.
    """
    value_RN, terms = truth.value_RN, truth.terms
    one_bit = 2.0**24 * rms(truth.nearest_RN.sqrt()) / rms(value_RN)
    square_RN, between_RN = declared_truth.between_ranks(stored)
    variance_RN = declared.accumulation.variance(declared_truth.gauges, terms) + square_RN
    bound_RN = declared.bound(declared_truth.absolute_RN, terms) + between_RN
    # Between ranks a store is not the last rounding, so that the cell of the result says nothing of the sums.
    hidden = stored in NARROW and len(truth.partials) == 1
    residual_RN = cell_error(y_RN, declared_truth.value_RN, stored) if hidden else y_RN - declared_truth.value_RN
    if hidden:
        estimate = _before_store(y_RN, truth, stored)
        error, resolved, share = estimate.error, estimate.flips >= FEW_FLIPS, estimate.share
        expected = float(_flip_chances(declared_truth.value_RN, variance_RN.sqrt(), stored).sum())
        flips = int((y_RN != round_to(declared_truth.value_RN, stored)).sum())
    else:
        error_RN, resolved, flips, expected = y_RN - value_RN, True, 0, 0.0
        error, share = rms(error_RN), signed_share(error_RN, value_RN)
    relative = error / rms(value_RN)
    return Point(terms=terms, relative=relative, bits=math.log2(one_bit / relative) if relative else math.inf,
                 resolved=resolved, ratio=float((residual_RN.abs() / bound_RN).max()),
                 z=rms(residual_RN / variance_RN.sqrt()), share=share, flips=flips, flips_expected=expected,
                 one_bit=one_bit, predicted=rms(variance_RN.sqrt()) / rms(value_RN),
                 spread=rms(truth.gauges.squares.sqrt()) / rms(value_RN))


def signed_share(error_RN: torch.Tensor, value_RN: torch.Tensor) -> float:
    """Sum of e sign(value) over sum of |e|; 0 where nothing differs."""
    total = float(error_RN.abs().sum())
    return float((error_RN * value_RN.sign()).sum()) / total if total else 0.0


@dataclass(frozen=True)
class _BeforeStore:
    error: float
    flips: int
    share: float


def _before_store(y_RN: torch.Tensor, truth: Truth, stored: Format) -> _BeforeStore:
    """The rms error of the sum before the store, from how many stores flipped; with too few, what few would mean."""
    wanted_RN = round_to(truth.value_RN, stored)
    flipped_RN = y_RN != wanted_RN
    flips, sigma_RN = int(flipped_RN.sum()), truth.nearest_RN.sqrt()
    share = float(((y_RN - wanted_RN) * truth.value_RN.sign()).sign()[flipped_RN].mean()) if flips else 0.0
    if flips > _ALL_FLIPPED * y_RN.numel():
        store = rms(unit_in_last_place(truth.value_RN, stored)) ** 2 / 12
        return _BeforeStore(math.sqrt(max(rms(y_RN - truth.value_RN) ** 2 - store, store / 12)), flips, share)
    low, high = -20.0, 30.0
    for _ in range(30):
        middle = (low + high) / 2
        below = float(_flip_chances(truth.value_RN, sigma_RN * 2.0**middle, stored).sum()) < max(flips, FEW_FLIPS)
        low, high = (middle, high) if below else (low, middle)
    return _BeforeStore(rms(sigma_RN) * 2.0**low, flips, share)


def _flip_chances(value_RN: torch.Tensor, sigma_RN: torch.Tensor, stored: Format) -> torch.Tensor:
    """Chance that a normal error of deviation sigma carries each value across a border of its rounding cell."""
    if stored not in NARROW:
        return torch.zeros_like(value_RN)
    unit_RN, off_RN = unit_in_last_place(value_RN, stored), (value_RN - round_to(value_RN, stored)).abs()
    near, far = unit_RN / 2 - off_RN, unit_RN / 2 + off_RN
    root = sigma_RN * math.sqrt(2)
    return (torch.erfc(near / root) + torch.erfc(far / root)) / 2
