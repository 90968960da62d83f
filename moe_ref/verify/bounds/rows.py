"""Values that carry the bound of their error, and partial sums of them per rank."""

from dataclasses import dataclass

import torch

from moe_ref.contract.parallel import Range


@dataclass(frozen=True)
class Rows:
    """Values in fp64 and how far a right implementation may be from each."""

    value: torch.Tensor
    bound: torch.Tensor

    @property
    def largest(self) -> torch.Tensor:
        """Largest magnitude a right implementation may hold."""
        return self.value.abs() + self.bound

    def columns(self, start: int, stop: int) -> "Rows":
        """The columns [start, stop) of the last axis."""
        return Rows(self.value[..., start:stop], self.bound[..., start:stop])

    def rows(self, index_R: torch.Tensor | slice) -> "Rows":
        """Some of the rows."""
        return Rows(self.value[index_R], self.bound[index_R])


@dataclass(frozen=True)
class DownRows:
    """Down rows as they are stored, and as they are summed; the same unless the weight joins at the merge."""

    stored: Rows
    addend: Rows


@dataclass
class Partials:
    """Per rank and token: a partial sum's value, its bound and the sum of absolute addends, (ranks, T, H) fp64."""

    value: torch.Tensor
    bound: torch.Tensor
    gauge: torch.Tensor

    @classmethod
    def zeros(cls, ranks: int, x_TH: torch.Tensor) -> "Partials":
        """Empty sums, one per rank in the shape of the tokens."""
        return cls(*(torch.zeros(ranks, *x_TH.shape, dtype=torch.float64, device=x_TH.device) for _ in range(3)))

    def add(self, rank_R: torch.Tensor, token_R: torch.Tensor, rows: Rows, outputs: Range) -> None:
        """One addend of each of these tokens to the sum of that rank, in the columns `outputs`."""
        for sums, addend in ((self.value, rows.value), (self.bound, rows.bound), (self.gauge, rows.largest)):
            sums[:, :, slice(*outputs)].index_put_((rank_R, token_R), addend, accumulate=True)


def exact(value: torch.Tensor) -> Rows:
    """Rows that carry no error: given ones, or the subject's own taken as the inputs of the next stage."""
    return Rows(value.double(), torch.zeros(value.shape, dtype=torch.float64, device=value.device))
