"""The collectives an implementation may call, and a wrapper that counts them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from moe_ref.contract.errors import UsageTypeError, UsageValueError, positive_faults, raise_faults


class Comm(Protocol):
    """One process group as a rank sees it. Every call returns a new tensor; arguments stay unchanged.

    Sums run in the tensor's own dtype. all_gather and all_to_all work along dimension 0 and accept uneven
    parts; reduce_scatter leaves `rows[rank]` rows of the sum to each rank; broadcast returns rank 0's tensor, and every
    rank passes one of its shape. device is where small messages of the host should live.
    """

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor: ...
    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]: ...
    def reduce_scatter(self, tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor: ...
    def all_to_all(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]: ...
    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor: ...


class WorldComm(Comm, Protocol):
    """A Comm that can be divided: ranks count within it, and every rank passes the same parts."""

    def subgroup(self, parts: Sequence[Sequence[int]]) -> Comm: ...


class SoloComm:
    """A group of one."""

    rank = 0
    size = 1
    device = torch.device("cpu")

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.clone()]

    def reduce_scatter(self, tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        return tensor.clone()

    def all_to_all(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in tensors]

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()


@dataclass(frozen=True)
class CommCall:
    """One collective as it was issued: its name, elements and bytes this rank handed over, and the group's name."""

    operation: str
    num_elements: int
    num_bytes: int
    group: str = "tp"


@dataclass
class CountingComm:
    """Passes every call on to `inner` and records it in `calls` when it is issued; groups may share one list."""

    inner: Comm
    calls: list[CommCall] = field(default_factory=list)
    group: str = "tp"

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def size(self) -> int:
        return self.inner.size

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @property
    def process_group(self) -> object:
        """The c10d group, for calls that are not counted; None on virtual ranks."""
        return getattr(self.inner, "process_group", None)

    def _count(self, operation: str, tensors: Sequence[torch.Tensor]) -> None:
        elements = sum(tensor.numel() for tensor in tensors)
        num_bytes = sum(t.numel() * t.element_size() for t in tensors)
        self.calls.append(CommCall(operation, elements, num_bytes, self.group))

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self._count("all_reduce", [tensor])
        return self.inner.all_reduce(tensor)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._count("all_gather", [tensor])
        return self.inner.all_gather(tensor)

    def reduce_scatter(self, tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        self._count("reduce_scatter", [tensor])
        return self.inner.reduce_scatter(tensor, rows)

    def all_to_all(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self._count("all_to_all", list(tensors))
        return self.inner.all_to_all(tensors)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        self._count("broadcast", [tensor])
        return self.inner.broadcast(tensor)


@dataclass(frozen=True)
class Groups:
    """The process groups of one rank: tp and ep, each a Comm; a copy of whatever holds them shares them."""

    tp: Comm = field(default_factory=SoloComm)
    ep: Comm = field(default_factory=SoloComm)

    @property
    def rank(self) -> int:
        """This rank's number in the grid of Parallel."""
        return self.ep.rank * self.tp.size + self.tp.rank

    def __deepcopy__(self, memo: dict) -> "Groups":
        return self


def grid_groups(world: WorldComm, tp: int, ep: int) -> Groups:
    """The tp and ep groups of this rank in a grid of ep * tp ranks, rank = ep rank * tp + tp rank.

    Collective: every rank of `world`, which has ep * tp ranks, calls it once, in the same order as the others.
    """
    raise_faults("grid_groups", positive_faults(tp=tp, ep=ep))
    if not hasattr(world, "subgroup"):
        raise UsageTypeError(f"world: {type(world).__name__}, but should be a Comm that can be divided, as TorchComm()")
    if world.size != ep * tp:
        raise UsageValueError(f"world size: {world.size} ranks, but ep*tp is {ep}*{tp}")
    rows = [range(row * tp, (row + 1) * tp) for row in range(ep)]
    columns = [range(column, ep * tp, tp) for column in range(tp)]
    return Groups(tp=world.subgroup(rows), ep=world.subgroup(columns) if ep > 1 else SoloComm())
