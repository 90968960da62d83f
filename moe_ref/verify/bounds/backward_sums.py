"""Gradients that many rows and ranks add to: of the tokens, of routing weights and of shared gates."""

from dataclasses import dataclass, field

import torch

from moe_ref.verify.bounds.backward_router import LinearGradients, Parts
from moe_ref.verify.bounds.backward_steps import BackwardSteps, spread
from moe_ref.verify.bounds.rows import Rows


@dataclass
class RankSums:
    """Per rank of the grid and token: sums of what it adds, their bounds and variances, sums of absolute addends and of
    their squares, (ranks, T, N) fp64.
    """

    ranks: int
    num_tokens: int
    width: int
    value: torch.Tensor = field(init=False)
    bound: torch.Tensor = field(init=False)
    gauge: torch.Tensor = field(init=False)
    variance: torch.Tensor = field(init=False)
    squares: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.ranks, self.num_tokens, self.width)
        self.value, self.bound, self.gauge, self.variance, self.squares = (
            torch.zeros(shape, dtype=torch.float64) for _ in range(5))

    def add(self, rank_R: torch.Tensor, token_R: torch.Tensor, addends: list[Rows],
            slot_R: torch.Tensor | None = None) -> None:
        """Add rows (R, N), or numbers (R, 1) of the given slots, to the sums of these ranks."""
        for rows in addends:
            self._add(rank_R, token_R, rows, slot_R)

    def _add(self, rank_R: torch.Tensor, token_R: torch.Tensor, rows: Rows, slot_R: torch.Tensor | None) -> None:
        for sums, addend in ((self.value, rows.value), (self.bound, rows.bound), (self.gauge, rows.largest),
                             (self.variance, spread(rows)), (self.squares, rows.value.square())):
            if slot_R is None:
                sums.index_put_((rank_R, token_R), addend, accumulate=True)
            else:
                sums.index_put_((rank_R, token_R, slot_R), addend[:, 0], accumulate=True)

    def parts(self) -> Parts:
        """The ranks' sums with one bound and one variance for their total."""
        return Parts(self.value, self.bound.sum(0), self.variance.sum(0))


def token_gradient(back: BackwardSteps, sums: RankSums, joined: list[LinearGradients]) -> Rows:
    """Gradient of the tokens before its last store: sums of rows on every rank, over ranks, and with routers' parts.

    Each addition may be rounded in the coarsest format in question, in whatever order: of the two projections of every
    slot and of the shared expert, then of the ranks' sums, which may be stored before, and of the uses of a token.
    """
    spec = back.steps.spec
    addends = 2 * spec.top_k + 4
    local = sums.bound + back.rounded(sums.gauge, back.joined_in, addends)
    variance = (sums.variance + back.joins(sums.value, sums.squares, addends, back.joined_in)).sum(0)
    value, bound, squares = sums.value.sum(0), local.sum(0), sums.value.square().sum(0)
    gauge = (sums.value.abs() + local).sum(0)
    for one in joined:
        value, bound, gauge = value + one.x.value, bound + one.x.bound, gauge + one.x_gauge
        variance, squares = variance + spread(one.x), squares + one.x_squares
    joins = back.joins(value, squares, sums.ranks + len(joined), back.joined_in)
    return Rows(value, bound + back.rounded(gauge, back.joined_in, 2 * sums.ranks + len(joined)), variance + joins)


def over_groups(back: BackwardSteps, groups: list[Rows]) -> Rows:
    """A parameter's gradient from those of ranks with other tokens, which may be stored before they are added up."""
    if len(groups) == 1:
        return groups[0]
    value, bound, gauge, variance, squares = (torch.stack(one).sum(0) for one in zip(
        *((rows.value, rows.bound, rows.largest, spread(rows), rows.value.square()) for rows in groups), strict=True))
    return Rows(value, bound + back.rounded(gauge, back.joined_in, 2 * (len(groups) - 1)),
                variance + back.joins(value, squares, len(groups), back.joined_in))
