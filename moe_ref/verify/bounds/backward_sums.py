"""Gradients that many rows and ranks add to: of the tokens, of routing weights and of shared gates."""

from dataclasses import dataclass, field

import torch

from moe_ref.verify.bounds.backward_router import LinearGradients, Parts
from moe_ref.verify.bounds.backward_steps import BackwardSteps
from moe_ref.verify.bounds.rows import Rows


@dataclass
class RankSums:
    """Per rank of the grid and token: sums of what it adds, their bounds and absolute addends, (ranks, T, N) fp64."""

    ranks: int
    num_tokens: int
    width: int
    value: torch.Tensor = field(init=False)
    bound: torch.Tensor = field(init=False)
    gauge: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.ranks, self.num_tokens, self.width)
        self.value, self.bound, self.gauge = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))

    def add(self, rank_R: torch.Tensor, token_R: torch.Tensor, rows: Rows, gauge: torch.Tensor,
            slot_R: torch.Tensor | None = None) -> None:
        """Add rows (R, N), or numbers (R, 1) of the given slots, to the sums of these ranks."""
        for sums, addend in ((self.value, rows.value), (self.bound, rows.bound), (self.gauge, gauge)):
            if slot_R is None:
                sums.index_put_((rank_R, token_R), addend, accumulate=True)
            else:
                sums.index_put_((rank_R, token_R, slot_R), addend[:, 0], accumulate=True)

    def parts(self) -> Parts:
        """The ranks' sums with one bound for their total."""
        return Parts(self.value, self.bound.sum(0))


def token_gradient(back: BackwardSteps, sums: RankSums, joined: list[LinearGradients]) -> Rows:
    """Gradient of the tokens before its last store: sums of rows on every rank, over ranks, and with routers' parts.

    Each addition may be rounded in the coarsest format in question, in whatever order: of the two projections of every
    slot and of the shared expert, then of the ranks' sums, which may be stored before, and of the uses of a token.
    """
    spec = back.steps.spec
    local = sums.bound + back.rounded(sums.gauge, back.joined_in, 2 * spec.top_k + 4)
    value, bound = sums.value.sum(0), local.sum(0)
    gauge = (sums.value.abs() + local).sum(0)
    for one in joined:
        value, bound, gauge = value + one.x.value, bound + one.x.bound, gauge + one.x_gauge
    return Rows(value, bound + back.rounded(gauge, back.joined_in, 2 * sums.ranks + len(joined)))


def over_groups(back: BackwardSteps, groups: list[Rows]) -> Rows:
    """A parameter's gradient from those of ranks with other tokens, which may be stored before they are added up."""
    if len(groups) == 1:
        return groups[0]
    value, bound, gauge = (torch.stack(one).sum(0) for one in zip(
        *((rows.value, rows.bound, rows.largest) for rows in groups), strict=True))
    return Rows(value, bound + back.rounded(gauge, back.joined_in, 2 * (len(groups) - 1)))
