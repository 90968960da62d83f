"""How large the errors of sums in a matrix unit with few bits are expected to be, step by step; docs/numerics.md, 4."""

from collections.abc import Iterator
from itertools import pairwise

import torch

from moe_ref.numerics.accumulation import LOST, ROUNDING, Accumulation
from moe_ref.numerics.formats import power_of_two

_HELD = 2**18
"""Elements of a result that are followed at once."""


def narrow_errors(a_MK: torch.Tensor, w_NK: torch.Tensor, unit: Accumulation, every: int,
                  start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Expected square and drift of what a unit loses in a @ w^T, (M, N) fp64, which begins anew after `every` products.

    start: how far inside such a block the first product lies. What is added between blocks is not in it. Partial sums
    are followed in fp32, in the order of the columns, an instruction at a time.
    """
    a_MK, scale_M1 = _scaled(a_MK)
    w_NK, scale_N1 = _scaled(w_NK)
    variance, drift = (torch.empty(len(a_MK), len(w_NK), dtype=torch.float64, device=a_MK.device) for _ in range(2))
    rows = max(1, _HELD // max(1, len(a_MK)))
    for first in range(0, len(w_NK), rows):
        at = slice(first, first + rows)
        variance[:, at], drift[:, at] = _followed(a_MK, w_NK[at], unit, every, start)
    scale_MN = scale_M1 * scale_N1.T
    return variance * scale_MN.square(), drift * scale_MN


def _followed(a_MK: torch.Tensor, w_NK: torch.Tensor, unit: Accumulation, every: int,
              start: int) -> tuple[torch.Tensor, torch.Tensor]:
    variance, drift, total = (a_MK.new_zeros(len(a_MK), len(w_NK)) for _ in range(3))
    cut = 2.0**-unit.kept_bits
    for first, stop, is_new in _instructions(a_MK.shape[1], unit.products_per_step, every, start):
        a_Mk, w_kN, count = a_MK[:, first:stop], w_NK[:, first:stop].T, stop - first
        if is_new:
            total.zero_()
        # The largest addend is the sum before, or a product: no larger than the fourth root of the sum of their powers.
        largest_square = (a_Mk.square().square() @ w_kN.square().square()).sqrt_().addcmul_(total, total)
        total_of_step, absolute = a_Mk @ w_kN, a_Mk.abs() @ w_kN.abs()
        by_number, by_size = a_Mk.sign() @ w_kN.sign(), total_of_step / absolute.clamp_(min=1e-38) * count
        agreeing = torch.where(by_number.abs() > by_size.abs(), by_number, by_size)
        total += total_of_step
        drift -= largest_square.sqrt().mul_(agreeing).mul_(LOST * cut).add_(total, alpha=LOST * 2 * unit.unit)
        # About its mean, which is the drift, a cut spreads as a rounding does, by a twelfth of its unit squared.
        variance.add_(largest_square, alpha=ROUNDING * (cut / 2) ** 2 * (count + 1))
        variance.addcmul_(total, total, value=ROUNDING * unit.unit**2)
    return variance.addcmul_(drift, drift), drift


def _instructions(columns: int, products: int, every: int, start: int) -> Iterator[tuple[int, int, bool]]:
    """The columns of each instruction, and whether it begins a sum."""
    cuts = [0, *range(every - start % every, columns, every), columns] if columns else []
    for block_first, block_stop in pairwise(cuts):
        for first in range(block_first, block_stop, products):
            yield first, min(first + products, block_stop), first == block_first


def _scaled(values_RK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in fp32 under powers of two, so that no square leaves it, and these (R, 1) in fp64."""
    values_RK = values_RK.detach().double()
    if not values_RK.shape[1]:
        return values_RK.float(), values_RK.new_ones(len(values_RK), 1)
    largest_R1 = torch.nan_to_num(values_RK.abs().amax(1, keepdim=True), nan=1.0, posinf=1.0)
    exponent_R1 = torch.frexp(largest_R1).exponent.clamp(min=-1000, max=1000)
    return (values_RK * power_of_two(-exponent_R1)).float(), power_of_two(exponent_R1)
