"""The grouped product in real arithmetic, with what its rounding errors are measured against."""

from dataclasses import dataclass
from functools import cached_property

import torch

from moe_ref.contract.vocabulary import Format
from moe_ref.diverge.conversion import AS_THEY_ARE, Conversion
from moe_ref.diverge.problem import GroupedProblem, build_operands
from moe_ref.numerics.accumulation import Accumulation
from moe_ref.numerics.formats import unit_in_last_place
from moe_ref.numerics.gauges import Gauges, gauges

FP32_NEAREST = Accumulation(unit=2.0**-24)
"""What `bits` is measured by: fp32 additions, each rounded to nearest, one term after the other."""


@dataclass(frozen=True)
class Truth:
    """value = x @ w^T of converted operands, (R, N) fp64; gauges: see Gauges; absolute: sum of absolute products;
    partials: the values of the ranks' terms.
    """

    gauges: Gauges
    absolute_RN: torch.Tensor
    terms: int
    partials: tuple[torch.Tensor, ...]

    @property
    def value_RN(self) -> torch.Tensor:
        return self.gauges.value

    def between_ranks(self, stored: Format) -> tuple[torch.Tensor, torch.Tensor]:
        """(expected square, bound) of what storing partial sums and adding them in rank order costs; 0 for one rank."""
        square_RN, bound_RN = torch.zeros_like(self.value_RN), torch.zeros_like(self.value_RN)
        if len(self.partials) == 1:
            return square_RN, bound_RN
        total_RN, largest_RN = torch.zeros_like(self.value_RN), 2 * self.absolute_RN
        for rank, partial_RN in enumerate(self.partials):
            total_RN = total_RN + partial_RN
            for rounded_RN in (partial_RN, total_RN)[:1 + (rank > 0)]:
                square_RN += unit_in_last_place(rounded_RN, stored) ** 2 / 12
                bound_RN += unit_in_last_place(largest_RN, stored) / 2
        return square_RN, bound_RN

    @cached_property
    def nearest_RN(self) -> torch.Tensor:
        """Expected square of the error of a sequential fp32 sum that is rounded to nearest."""
        return FP32_NEAREST.variance(self.gauges, self.terms)


class Bench:
    """One problem with its operands and truths; each truth is computed once."""

    def __init__(self, problem: GroupedProblem) -> None:
        self.problem = problem
        self.operands = build_operands(problem)
        self._truths: dict[Conversion, Truth] = {}

    def converted(self, conversion: Conversion) -> tuple[torch.Tensor, torch.Tensor]:
        """x_RK and w_ENK as fp64, converted."""
        return conversion(self.operands.x_RK.double()), conversion(self.operands.w_ENK.double())

    def truth(self, conversion: Conversion = AS_THEY_ARE) -> Truth:
        """The truth of the converted operands, unsharded."""
        if conversion not in self._truths:
            x_RK, w_ENK = self.converted(conversion)
            parts = [gauges(x_RK[start:stop], w_ENK[e], absolute=True) for e, start, stop in self.operands.groups()]
            fields = [torch.cat([getattr(part, name) for part in parts])
                      for name in ("value", "squares", "path", "absolute")]
            partials = tuple(torch.cat([x_RK[start:stop, first:last] @ w_ENK[e, :, first:last].T
                                        for e, start, stop in self.operands.groups()])
                             for first, last in self.problem.cuts)
            self._truths[conversion] = Truth(Gauges(*fields), fields[-1], self.problem.terms, partials)
        return self._truths[conversion]


def joined(truths: list[Truth]) -> Truth:
    """The truths of several seeds as one, rows below rows."""
    fields = [torch.cat([getattr(one.gauges, name) for one in truths])
              for name in ("value", "squares", "path", "absolute")]
    partials = tuple(torch.cat(parts) for parts in zip(*(one.partials for one in truths), strict=True))
    return Truth(Gauges(*fields), fields[-1], truths[0].terms, partials)
