"""The collectives an implementation may call, and a wrapper that counts them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch


class Comm(Protocol):
    """One process group as a rank sees it. Every call returns a new tensor; arguments stay unchanged.

    Sums run in the tensor's own dtype. all_gather and all_to_all work along dimension 0 and accept uneven
    parts. device is where small messages of the host should live.
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


@dataclass(frozen=True)
class CommCall:
    """One collective as it was issued: its name, elements and bytes this rank handed over."""

    operation: str
    num_elements: int
    num_bytes: int


@dataclass
class CountingComm:
    """Passes every call on to `inner` and records it in `calls` when it is issued."""

    inner: Comm
    calls: list[CommCall] = field(default_factory=list)

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def size(self) -> int:
        return self.inner.size

    @property
    def device(self) -> torch.device:
        return self.inner.device

    def _count(self, operation: str, tensors: Sequence[torch.Tensor]) -> None:
        elements = sum(tensor.numel() for tensor in tensors)
        self.calls.append(CommCall(operation, elements, sum(t.numel() * t.element_size() for t in tensors)))

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


@dataclass(frozen=True)
class Groups:
    """The process groups of one rank: tp and ep, each a Comm; a copy of whatever holds them shares them."""

    tp: Comm = field(default_factory=SoloComm)
    ep: Comm = field(default_factory=SoloComm)

    def __deepcopy__(self, memo: dict) -> "Groups":
        return self
