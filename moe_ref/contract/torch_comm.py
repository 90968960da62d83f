"""Comm over a torch.distributed process group: gloo or NCCL."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import cast

import torch
import torch.distributed as dist

from moe_ref.contract.errors import UsageValueError, is_integer, raise_faults
from moe_ref.contract.local_comm import sum_in_rank_order

Watch = Callable[[tuple[int, ...], str, tuple], AbstractContextManager[object]]
"""Called with the group's ranks in the world, the operation and what must be the same on all of them; the collective
runs inside the context it returns."""


class TorchComm:
    """Wraps a c10d group; None is the default group, which must be initialised.

    The order of a sum's additions belongs to the backend, so a judge treats it as an interval. With ordered=True parts
    travel whole and are added here, in rank order and in the tensor's dtype: bit for bit what virtual ranks compute.
    Raises UsageValueError for parts that do not fit the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, ordered: bool = False,
                 watch: Watch = lambda members, operation, signature: nullcontext()) -> None:
        self.group, self.ordered, self._watch = group, ordered, watch
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._members = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
        self._made: dict[tuple[int, ...], dist.ProcessGroup] = {}
        # NCCL moves nothing but device memory; gloo copies it through the host, and not for every operation.
        on_device = dist.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_device else torch.device("cpu")

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The c10d group itself."""
        return self.group

    def subgroup(self, parts: Sequence[Sequence[int]]) -> "TorchComm":
        """The part of this group that holds this rank; every rank passes the same parts, ranks counted in this group.

        A group of the same ranks is made once. Parts are ascending, and every rank is in one of them.
        """
        ordered = all(list(part) == sorted(set(part)) for part in parts)
        if not ordered or sorted(rank for part in parts for rank in part) != list(range(len(self._members))):
            raise_faults("subgroup", [f"parts {[list(part) for part in parts]}, but they should be ascending and hold "
                                      f"each of {len(self._members)} ranks once"])
        named = [tuple(self._members[rank] for rank in part) for part in parts]
        mine = next(members for part, members in zip(parts, named, strict=True) if self.rank in part)
        # c10d names groups by counting calls, so every rank of the world makes every part of it. Ranks outside of a
        # smaller group know nothing of its parts, which then take their names from their members.
        local = self.group is not None
        for members in [mine] if local else named:
            if members not in self._made:
                made = dist.new_group(list(members), use_local_synchronization=local)
                # A number stands for a group without this rank; none of those is ever used.
                self._made[members] = cast(dist.ProcessGroup, made)
        return TorchComm(self._made[mine], ordered=self.ordered, watch=self._watch)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        with self._watch(self._members, "all_reduce", (tuple(tensor.shape), str(tensor.dtype))):
            if self.ordered:
                return sum_in_rank_order(self._gather(tensor.reshape(1, -1))).view(tensor.shape)
            result = self._sent(tensor)
            dist.all_reduce(result, group=self.group)
            return result.to(tensor.device)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        with self._watch(self._members, "all_gather", (tuple(tensor.shape[1:]), str(tensor.dtype))):
            return self._gather(tensor)

    def reduce_scatter(self, tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        counts = all(is_integer(count) and count >= 0 for count in rows)
        if not counts or len(rows) != self.size or sum(rows) != tensor.shape[0]:
            raise UsageValueError(f"reduce_scatter: rows {tuple(rows)}, but should be {self.size} integers of at "
                                  f"least 0 that sum to {tensor.shape[0]}")
        parts = tensor.split(list(rows))
        with self._watch(self._members, "reduce_scatter", (tuple(tensor.shape), str(tensor.dtype), tuple(rows))):
            if self.ordered:
                return sum_in_rank_order(self._exchange(parts))
            # Backends take even parts only; the longest is at most one row longer than the others of an equal cut.
            longest = max(rows)
            padded = [self._sent(torch.cat([part, part.new_zeros((longest - len(part), *part.shape[1:]))]))
                      for part in parts]
            result = torch.empty_like(padded[self.rank])
            dist.reduce_scatter(result, padded, group=self.group)
            return result[:rows[self.rank]].clone().to(tensor.device)

    def all_to_all(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if len(tensors) != self.size:
            raise UsageValueError(f"all_to_all: {len(tensors)} parts, but should be one per rank, {self.size}")
        with self._watch(self._members, "all_to_all", (str(tensors[0].dtype),)):
            return self._exchange(tensors)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        with self._watch(self._members, "broadcast", (tuple(tensor.shape), str(tensor.dtype))):
            result = self._sent(tensor)
            dist.broadcast(result.flatten().view(torch.uint8), group=self.group, group_src=0)
            return result.to(tensor.device)

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy as the backend takes it: contiguous, on its device, without gradients, which no collective carries."""
        return tensor.detach().to(self.device).clone(memory_format=torch.contiguous_format)

    def _row_bytes(self, tensor: torch.Tensor) -> torch.Tensor:
        """(rows, bytes of a row): what only moves travels as bytes, since gloo refuses fp8 and others."""
        width = prod(tensor.shape[1:]) * tensor.element_size()
        return self._sent(tensor).flatten().view(torch.uint8).view(len(tensor), width)

    def _gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        mine = self._row_bytes(tensor)
        rows = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(rows, torch.tensor([len(mine)], device=self.device), group=self.group)
        counts = [int(count) for count in rows]
        # gloo refuses uneven parts, so they travel padded to the longest.
        padded = torch.cat([mine, mine.new_zeros(max(counts) - len(mine), mine.shape[1])])
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.group)
        return [self._restored(part[:count], tensor) for part, count in zip(parts, counts, strict=True)]

    def _exchange(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        rows = torch.tensor([len(tensor) for tensor in tensors], device=self.device)
        received = torch.empty_like(rows)
        dist.all_to_all_single(received, rows, group=self.group)
        counts, sent = received.tolist(), torch.cat([self._row_bytes(tensor) for tensor in tensors])
        result = sent.new_empty((sum(counts), sent.shape[1]))
        dist.all_to_all_single(result, sent, counts, rows.tolist(), group=self.group)
        return [self._restored(part, tensors[0]) for part in result.split(counts)]

    def _restored(self, row_bytes: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A copy, aligned for its dtype."""
        return row_bytes.clone().flatten().view(like.dtype).view(len(row_bytes), *like.shape[1:]).to(like.device)
