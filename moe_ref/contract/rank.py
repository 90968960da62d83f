"""This rank's place in the grid of ranks, and over which groups what is added up."""

from dataclasses import dataclass

import torch

from moe_ref.contract.comm import Comm, Groups
from moe_ref.contract.hosting import serving_copies
from moe_ref.contract.parallel import Parallel, Range
from moe_ref.contract.vocabulary import Schedule, SharedPlacement


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
    def over_tp(self) -> bool:
        """Whether each tp rank was handed tokens of its own."""
        return self.parallel.tokens.over_tp

    @property
    def over_ep(self) -> bool:
        """Whether each ep rank was handed tokens of its own, so that rows travel."""
        return self.parallel.tokens.over_ep

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
        return (self.tp,) * self.over_tp + (self.ep,) * self.over_ep

    @property
    def with_other_parts(self) -> tuple[Comm, ...]:
        """The groups over which a partial sum is completed: tp, and ep unless its ranks have other tokens."""
        return (self.tp,) if self.over_ep else (self.tp, self.ep)

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

    def served(self, ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
        """Index in this rank's weights of the expert of each slot that it serves; tokens are on every ep rank.

        Of all other slots -1, but a rank that hosts every expert takes the ids as they are.
        """
        if self.ep.size == 1:
            return ids_TK
        host_TK, index_TK = serving_copies(ids_TK, self.parallel, num_experts)
        return index_TK.where(host_TK == self.ep.rank, -1)
