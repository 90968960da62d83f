"""Comm over a torch.distributed process group: gloo or NCCL."""

from collections.abc import Sequence

import torch
import torch.distributed as dist


class TorchComm:
    """Wraps a c10d group; None is the default group, which must be initialised.

    The order of an all_reduce's additions belongs to the backend, so a judge treats it as an interval.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        # NCCL moves nothing but device memory.
        on_device = dist.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_device else torch.device("cpu")

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        result = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, group=self.group)
        return result

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        # gloo refuses uneven all_gather, so parts travel padded to the longest.
        rows = torch.zeros(self.size, dtype=torch.int64, device=tensor.device)
        rows[self.rank] = tensor.shape[0]
        dist.all_reduce(rows, group=self.group)
        longest = int(rows.max())
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))
        padded[:tensor.shape[0]] = tensor
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.group)
        return [part[:count] for part, count in zip(parts, rows.tolist(), strict=True)]

    def reduce_scatter(self, tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        # Uneven parts: every backend takes an all_reduce; the slice is this rank's part of it.
        start = sum(rows[:self.rank])
        return self.all_reduce(tensor)[start:start + rows[self.rank]].clone()

    def all_to_all(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        rows = torch.tensor([tensor.shape[0] for tensor in tensors], device=tensors[0].device)
        received = torch.empty_like(rows)
        dist.all_to_all_single(received, rows, group=self.group)
        counts = received.tolist()
        result = tensors[0].new_empty((sum(counts), *tensors[0].shape[1:]))
        dist.all_to_all_single(result, torch.cat(list(tensors)), counts, rows.tolist(), group=self.group)
        return list(result.split(counts))
