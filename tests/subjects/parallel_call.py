"""What the steps of the parallel layer hand to each other."""

from dataclasses import dataclass

import torch

from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.vocabulary import Schedule, SharedPlacement
from tests.subjects.base import Call


@dataclass(frozen=True)
class ParallelCall(Call):
    """Arguments of one call; x_TH are the rank's own tokens."""

    parallel: Parallel

    @property
    def by_output(self) -> bool:
        """Whether the rank makes columns of the output instead of partial sums."""
        return self.parallel.schedule is Schedule.GATHER

    @property
    def travels(self) -> bool:
        """Whether rows travel to their experts."""
        return self.parallel.tokens.over_ep and self.groups.ep.size > 1

    @property
    def adds_uncut(self) -> bool:
        """Whether this rank's sum holds what is on every rank and counts once."""
        of_tp = self.groups.tp.rank == 0 and (self.groups.ep.rank == 0 or self.parallel.tokens.over_ep)
        return self.by_output or of_tp

    @property
    def cuts_shared(self) -> bool:
        return self.spec.shared is not None and self.parallel.shared is SharedPlacement.SHARDED

    def travelling(self, tensor: torch.Tensor) -> torch.Tensor:
        """In the format of partial sums between ranks."""
        return tensor.to(TORCH_DTYPES[self.numerics.reduce])


@dataclass(frozen=True)
class Routed:
    """Tokens with their routing: ids_TK, weights_TK, shared_TS (T, S) or None; counts: how many of each tp rank."""

    x_TH: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    shared_TS: torch.Tensor | None
    counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Served:
    """Rows that a rank computes: tokens, index of the expert among its own, weight_R1; counts: rows from each ep rank.

    homes: per ep rank, the rows token * K + slot of this rank's tokens that it serves, in that order.
    """

    x_RH: torch.Tensor
    expert_R: torch.Tensor
    weight_R1: torch.Tensor
    counts: list[int]
    homes: list[torch.Tensor]
