"""What a matrix product's rounding errors are measured with: its value, and how large its partial sums are."""

from dataclasses import dataclass

import torch

CHUNKS, CHUNK = 16, 64
"""Long sums are looked at every so many terms, in so many places at most."""
FEW_CHUNKS, SHORT_CHUNK = 8, 4
"""The same of short ones, whose single paths differ more from the usual one."""

_FP32_UNIT = 2.0**-24


@dataclass(frozen=True)
class Gauges:
    """Of value = a @ w^T, each (M, N) in fp64.

    squares: sum of the squared products. path: mean square of the partial sums, the largest over the natural order, its
    reverse and random ones. What a long sum rounds is its partial sums, so path is what its rounding errors grow with.
    absolute: sum of absolute products; None where nobody asked for it.
    """

    value: torch.Tensor
    squares: torch.Tensor
    path: torch.Tensor
    absolute: torch.Tensor | None = None


def gauges(a_MK: torch.Tensor, w_NK: torch.Tensor, absolute: bool = False) -> Gauges:
    """Gauges of a @ w^T; any floating dtype.

    A random order has partial sums of mean square value^2 / 3 + squares / 6 (a bridge from 0 to the value); in the natural
    order they are followed in at most CHUNKS steps, linear within a step, and with the bridge's part of it.
    """
    a_MK, terms = a_MK.double(), a_MK.shape[1]
    squares = nonnegative_product(a_MK * a_MK, w_NK, 2)
    of_absolute = nonnegative_product(a_MK.abs(), w_NK, 1) if absolute else None
    w_NK = w_NK.double()
    steps = max(1, min(CHUNKS, terms // CHUNK), min(FEW_CHUNKS, terms // SHORT_CHUNK))
    cuts = [round(terms * step / steps) for step in range(steps + 1)]
    value = torch.zeros(len(a_MK), len(w_NK), dtype=torch.float64, device=a_MK.device)
    natural, ends = torch.zeros_like(value), torch.zeros_like(value)
    for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
        after = torch.addmm(value, a_MK[:, start:stop], w_NK[:, start:stop].T)
        natural += (value * (value + after)).addcmul_(after, after)
        ends += value
        value = after
    if steps == 1:
        return Gauges(value, squares, value * value / 3 + squares / 6, of_absolute)
    bridge, square = squares / 6, value * value
    # The reversed order has partial sums value - s: each step's ends are value - s of the other's.
    backwards = 3 * steps * square - 3 * value * (2 * ends + value) + natural
    path = torch.maximum(natural, backwards) / (3 * steps) + bridge / steps
    return Gauges(value, squares, torch.maximum(path, square / 3 + bridge), of_absolute)


def nonnegative_product(a_MK: torch.Tensor, w_NK: torch.Tensor, power: int) -> torch.Tensor:
    """An upper bound of a @ (|w|^power)^T for a without negative entries, (M, N) fp64, larger by about K 2^-22.

    It is summed in fp32, at half the cost, with rows of a and the whole of w scaled by powers of two, so that nothing
    overflows; what underflows is covered by adding the most that it can be.
    """
    terms = max(1, a_MK.shape[1])
    # Scales stay within what the arithmetic with them can hold: fp64 for a, fp32 for w.
    a_exponent, w_exponent = _exponents(a_MK.double(), -1).clamp(min=-1000), _exponents(w_NK.abs(), None).clamp(min=-100)
    if not bool(torch.isfinite(a_exponent).all() & torch.isfinite(w_exponent).all()):
        return a_MK.double() @ w_NK.double().abs().pow(power).T
    wide_NK = w_NK if w_NK.dtype is torch.float64 else w_NK.float()
    w_scaled = (wide_NK * 2.0 ** -float(w_exponent)).float()
    w_scaled = w_scaled.square_() if power == 2 else w_scaled.abs_()
    product = torch.ldexp(a_MK.double(), -a_exponent).float() @ w_scaled.T
    # Rounding of both operands and of a square, of each product and each addition; and what underflowed.
    widened = product.double() * (1 + (terms + 6) * 2 * _FP32_UNIT) + 4 * terms * 2.0**-149
    return torch.ldexp(widened, a_exponent + power * w_exponent)


def _exponents(magnitudes: torch.Tensor, dim: int | None) -> torch.Tensor:
    """Exponent of the largest entry, of each row or of all, as whole fp64; NaN where an entry is not finite."""
    if magnitudes.shape[-1] == 0 or len(magnitudes) == 0:
        return torch.zeros((len(magnitudes), 1) if dim is not None else (), dtype=torch.float64)
    largest = magnitudes.amax(dim, keepdim=True) if dim is not None else magnitudes.amax()
    exponent = torch.frexp(largest.double()).exponent.double()
    return torch.where(torch.isfinite(largest), exponent, torch.nan)
