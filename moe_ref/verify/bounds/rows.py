"""Values that carry the bound of their error, and partial sums of them per rank."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from moe_ref.contract.parallel import Range
from moe_ref.contract.vocabulary import Format


@dataclass(frozen=True)
class Rows:
    """Values in fp64, how far a right implementation may be from each, and how far it is expected to be.

    variance: mean square of the error, all stores included; None where nothing is predicted. unrounded: the same before
    the last store, in the format `stored`, which a comparison takes out by the cell of numbers that round to what is
    stored; None: no store. drift: the part of the error that has one direction in all elements, where sums or operands
    are cut off; None: none.
    """

    value: torch.Tensor
    bound: torch.Tensor
    variance: torch.Tensor | None = None
    unrounded: torch.Tensor | None = None
    stored: Format | None = None
    drift: torch.Tensor | None = None

    @property
    def largest(self) -> torch.Tensor:
        """Largest magnitude a right implementation may hold."""
        return self.value.abs() + self.bound

    def columns(self, start: int, stop: int) -> "Rows":
        """The columns [start, stop) of the last axis."""
        return self.mapped(lambda one: one[..., start:stop])

    def rows(self, index_R: torch.Tensor | slice) -> "Rows":
        """Some of the rows."""
        return self.mapped(lambda one: one[index_R])

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Rows":
        """The same rows in another shape."""
        return Rows(change(self.value), change(self.bound), None if self.variance is None else change(self.variance),
                    None if self.unrounded is None else change(self.unrounded), self.stored,
                    None if self.drift is None else change(self.drift))

    def masked(self, unknown: torch.Tensor) -> "Rows":
        """Nothing is known of the elements where `unknown` (broadcast) is true."""
        nothing = self.mapped(lambda one: one.masked_fill(unknown, torch.inf))
        return replace(nothing, value=self.value)


def total_variance(*parts: torch.Tensor | float | None) -> torch.Tensor | None:
    """Sum of independent variances; None where any is unknown."""
    total: torch.Tensor | float = 0.0
    for part in parts:
        if part is None:
            return None
        total = total + part
    return total if isinstance(total, torch.Tensor) else torch.tensor(total, dtype=torch.float64)


@dataclass(frozen=True)
class DownRows:
    """Down rows as they are stored, and as they are summed; the same unless the weight joins at the merge."""

    stored: Rows
    addend: Rows


@dataclass
class Partials:
    """Per rank and token, (ranks, T, H) fp64: a partial sum's value, bound and sum of absolute addends with errors.

    variance: of the sum, unrounded: before its last store in the format `stored`; squares: sum of squared addends.
    """

    value: torch.Tensor
    bound: torch.Tensor
    gauge: torch.Tensor
    variance: torch.Tensor
    squares: torch.Tensor
    unrounded: torch.Tensor | None = None
    stored: Format | None = None

    def rows(self, at: tuple[int, slice, slice]) -> Rows:
        """Some sums with their errors, as they are stored."""
        return Rows(self.value[at], self.bound[at], self.variance[at],
                    None if self.unrounded is None else self.unrounded[at], self.stored)

    @classmethod
    def zeros(cls, ranks: int, x_TH: torch.Tensor) -> "Partials":
        """Empty sums, one per rank in the shape of the tokens."""
        value, bound, gauge, variance, squares = (
            torch.zeros(ranks, *x_TH.shape, dtype=torch.float64, device=x_TH.device) for _ in range(5))
        return cls(value, bound, gauge, variance, squares)

    @classmethod
    def of(cls, rows: Rows) -> "Partials":
        """Sums whose single addends, one per rank, are these rows (ranks, T, H)."""
        variance = torch.full_like(rows.value, torch.inf) if rows.variance is None else rows.variance
        return cls(rows.value, rows.bound, rows.largest, variance, rows.value.square(), rows.unrounded,
                   rows.stored)

    def add(self, rank_R: torch.Tensor, token_R: torch.Tensor, rows: Rows, outputs: Range) -> None:
        """One addend of each of these tokens to the sum of that rank, in the columns `outputs`."""
        variance = torch.full_like(rows.value, torch.inf) if rows.variance is None else rows.variance
        for sums, addend in ((self.value, rows.value), (self.bound, rows.bound), (self.gauge, rows.largest),
                             (self.variance, variance), (self.squares, rows.value.square())):
            sums[:, :, slice(*outputs)].index_put_((rank_R, token_R), addend, accumulate=True)


def relative_variance(weight: Rows) -> torch.Tensor:
    """Variance of weights over their squares; 0 of a weight of exactly 0, infinite where nothing is predicted."""
    if weight.variance is None:
        return torch.full_like(weight.value, torch.inf)
    return torch.where(weight.value == 0, 0.0, weight.variance / weight.value.square())


def total_drift(*parts: torch.Tensor | None) -> torch.Tensor | None:
    """Sum of drifts; None where no part has one."""
    known = [one for one in parts if one is not None]
    return torch.stack(known).sum(0) if known else None


def exact(value: torch.Tensor) -> Rows:
    """Rows that carry no error: given ones, or the subject's own taken as the inputs of the next stage."""
    nothing = torch.zeros(value.shape, dtype=torch.float64, device=value.device)
    return Rows(value.double(), nothing, nothing)


def joined_columns(parts: list[Rows]) -> Rows:
    """Parts of the last axis side by side, after their stores."""
    variance = None if any(one.variance is None for one in parts) else torch.cat(
        [one.variance for one in parts if one.variance is not None], -1)
    drift = None if any(one.drift is None for one in parts) else torch.cat(
        [one.drift for one in parts if one.drift is not None], -1)
    return Rows(torch.cat([one.value for one in parts], -1), torch.cat([one.bound for one in parts], -1), variance,
                drift=drift)
