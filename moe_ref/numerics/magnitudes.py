"""Products of matrices without negative entries: upper bounds at half the cost, since they are summed in fp32."""

import math
from dataclasses import dataclass, field

import torch

from moe_ref.numerics.formats import power_of_two

_FP32_UNIT = 2.0**-24


@dataclass(frozen=True)
class Magnitudes:
    """|w|^power in fp32, (N, K), times 2^-(power * exponent); NaN as exponent where w is not finite."""

    scaled_NK: torch.Tensor
    exponent: float

    @classmethod
    def of(cls, w_NK: torch.Tensor, power: int) -> "Magnitudes":
        """Of the whole matrix, scaled by its largest entry; the exponent stays within what fp32 can scale by."""
        if w_NK.numel() == 0:
            return cls(w_NK.float(), 0.0)
        low, high = (float(one) for one in torch.aminmax(w_NK))
        if not math.isfinite(low + high):
            return cls(w_NK, math.nan)
        exponent = float(max(-100, math.frexp(max(-low, high))[1]))
        wide_NK = w_NK if w_NK.dtype is torch.float64 else w_NK.float()
        scaled_NK = (wide_NK * 2.0**-exponent).float()
        return cls(scaled_NK.square_() if power == 2 else scaled_NK.abs_(), exponent)


@dataclass
class KnownMagnitudes:
    """Magnitudes of the matrices last asked for: several sums with one expert follow each other."""

    latest: list[tuple[torch.Tensor, int, Magnitudes]] = field(default_factory=list)

    def of(self, w_NK: torch.Tensor, power: int) -> Magnitudes:
        """Magnitudes.of, made once for the same memory, not written to since."""
        for known, known_power, found in self.latest:
            if known_power == power and known.data_ptr() == w_NK.data_ptr() and known.shape == w_NK.shape and (
                    known.stride() == w_NK.stride() and known.dtype == w_NK.dtype and known._version == w_NK._version):
                return found
        found = Magnitudes.of(w_NK, power)
        # The matrix is held too, so that its memory cannot be another's; two: both powers of one matrix.
        self.latest = [*self.latest[-1:], (w_NK, power, found)]
        return found


def nonnegative_product(a_MK: torch.Tensor, w_NK: torch.Tensor, power: int,
                        known: KnownMagnitudes | None = None) -> torch.Tensor:
    """An upper bound of a @ (|w|^power)^T for a without negative entries, (M, N) fp64, larger by about K 2^-22.

    It is summed in fp32, at half the cost, with rows of a and the whole of w scaled by powers of two, so that nothing
    overflows; what underflows is covered by adding the most that it can be.
    """
    terms, a_MK = max(1, a_MK.shape[1]), a_MK.double()
    largest_M1 = a_MK.amax(-1, keepdim=True) if a_MK.numel() else a_MK.new_zeros(len(a_MK), 1)
    of_w = known.of(w_NK, power) if known else Magnitudes.of(w_NK, power)
    if math.isnan(of_w.exponent) or not bool(torch.isfinite(largest_M1).all()):
        return a_MK @ w_NK.double().abs().pow(power).T
    # Scales stay within what fp64 can scale by.
    a_exponent = torch.frexp(largest_M1).exponent.clamp(min=-1000)
    product = (a_MK * power_of_two(-a_exponent)).float() @ of_w.scaled_NK.T
    # Rounding of both operands and of a square, of each product and each addition; and what underflowed.
    widened = product.double().mul_(1 + (terms + 6) * 2 * _FP32_UNIT).add_(4 * terms * 2.0**-149)
    return widened.mul_(power_of_two(a_exponent)).mul_(2.0 ** (power * of_w.exponent))
