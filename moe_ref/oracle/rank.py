"""This rank's place in the grid of ranks, and over which groups what is added up."""

from dataclasses import dataclass

import torch

from moe_ref.contract.comm import Comm, Groups
from moe_ref.contract.parallel import Parallel, Range
from moe_ref.contract.vocabulary import Schedule, SharedPlacement
from moe_ref.oracle.collectives import enter, once


@dataclass(frozen=True)
class Rank:
    """One rank: how the layer is spread, and its groups."""

    parallel: Parallel
    groups: Groups

    @property
    def tp(self) -> Comm:
        """The ranks with other columns of the same experts."""
        return self.groups.tp

    @property
    def ep(self) -> Comm:
        """The ranks with other experts."""
        return self.groups.ep

    @property
    def by_output(self) -> bool:
        """Whether w2 is cut by output: this rank then makes columns of the result, no partial sum."""
        return self.parallel.schedule is Schedule.GATHER

    @property
    def by_slot(self) -> bool:
        """Whether rows are reduced slot by slot, before the merge."""
        return self.parallel.schedule is Schedule.ALL_REDUCE_ROWS

    @property
    def whole_shared(self) -> bool:
        """Whether the shared expert is whole on every rank, and stays out of the partial sums."""
        return self.parallel.shared is SharedPlacement.REPLICATED

    @property
    def with_other_tokens(self) -> tuple[Comm, ...]:
        """The groups whose ranks were handed other tokens: a whole parameter's gradient is added up over them."""
        tokens = self.parallel.tokens
        return (self.tp,) * tokens.over_tp + (self.ep,) * tokens.over_ep

    @property
    def with_other_parts(self) -> tuple[Comm, ...]:
        """The groups over which a partial sum is completed: tp, and ep unless its ranks have other tokens."""
        return (self.tp,) if self.parallel.tokens.over_ep else (self.tp, self.ep)

    @property
    def adds_what_is_whole(self) -> bool:
        """Whether this one of the ranks with other parts adds what none of them holds a part of."""
        return all(comm.rank == 0 for comm in self.with_other_parts)

    def columns(self, size: int) -> Range:
        """This rank's part of an axis that is cut over tp."""
        return self.parallel.ranges(size)[self.tp.rank]

    def outputs(self, hidden: int) -> Range:
        """The columns of the result that this rank's w2 makes."""
        return self.columns(hidden) if self.by_output else (0, hidden)

    def whole_in_sum(self, parameter_H: torch.Tensor) -> torch.Tensor:
        """A parameter (H,) that every rank holds whole, as this rank's part of the sum; its gradient is complete."""
        whole_H = enter(parameter_H.double(), self.tp, self.ep)
        start, stop = self.outputs(len(whole_H))
        return whole_H[start:stop] if self.by_output else once(whole_H, self.adds_what_is_whole)
