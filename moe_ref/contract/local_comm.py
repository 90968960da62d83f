"""Virtual ranks: threads of one process under a baton, so that a run is sequential and repeatable.

Exactly one rank runs at a time. A rank hands the baton on only inside a collective or at its end, in
rank order, so kernels never interleave (Triton's interpreter keeps process-wide state) and a
mismatched collective is found at once instead of hanging.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from moe_ref.contract.errors import UsageValueError, is_integer, positive_faults, raise_faults

Result = TypeVar("Result")


class CollectiveMismatch(RuntimeError):
    """Ranks issued different collectives, or one ended while others wait."""


class _PeerFailed(RuntimeError):
    """Unwinds a rank because another one failed; never reported itself."""


@dataclass
class _Request:
    operation: str
    signature: tuple
    payload: object


class _Baton:
    """Whose turn it is, and what every rank handed to the current collective."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.turn = 0
        self.changed = threading.Condition()
        self.requests: dict[int, _Request] = {}
        self.finished: set[int] = set()
        self.failure: BaseException | None = None
        self.num_collectives = 0

    def wait_turn(self, rank: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.turn == rank or self.failure is not None)
            if self.failure is not None:
                raise _PeerFailed(str(self.failure))

    def hand_on(self, rank: int) -> None:
        with self.changed:
            self.turn = (rank + 1) % self.size
            self.changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()

    def exchange(self, rank: int, request: _Request) -> dict[int, _Request]:
        """Deposit a request, let the others run up to theirs, and return all requests in rank order."""
        if self.finished:
            raise CollectiveMismatch(f"rank {rank} waits in {request.operation} #{self.num_collectives}, "
                                     f"but rank {min(self.finished)} has already returned")
        self.requests[rank] = request
        first = self.requests[min(self.requests)]
        if (request.operation, request.signature) != (first.operation, first.signature):
            raise CollectiveMismatch(
                f"collective #{self.num_collectives}: rank {rank} issued {request.operation}{request.signature}, "
                f"but rank {min(self.requests)} issued {first.operation}{first.signature}")
        everyone = self.requests
        self.hand_on(rank)
        self.wait_turn(rank)
        if rank == 0:
            self.requests = {}
            self.num_collectives += 1
        return everyone

    def finish(self, rank: int) -> None:
        if self.requests and self.failure is None:
            waiting = sorted(self.requests)
            raise CollectiveMismatch(f"rank {rank} returned, but ranks {waiting} wait in "
                                     f"{self.requests[waiting[0]].operation} #{self.num_collectives}")
        self.finished.add(rank)
        self.hand_on(rank)


class LocalComm:
    """The Comm of one virtual rank; sums run in rank order, in the tensor's dtype."""

    def __init__(self, baton: _Baton, rank: int) -> None:
        self._baton = baton
        self.rank = rank

    @property
    def size(self) -> int:
        return self._baton.size

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def _exchange(self, operation: str, signature: tuple, payload: object) -> list:
        # Payloads are copies: a rank that resumes first may overwrite its buffer before the others read it.
        requests = self._baton.exchange(self.rank, _Request(operation, signature, payload))
        return [requests[rank].payload for rank in range(self.size)]

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        parts = self._exchange("all_reduce", (tuple(tensor.shape), str(tensor.dtype)), tensor.clone())
        return _sum_in_rank_order(parts)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        parts = self._exchange("all_gather", (tuple(tensor.shape[1:]), str(tensor.dtype)), tensor.clone())
        return [part.clone() for part in parts]

    def reduce_scatter(self, tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        counts = all(is_integer(count) and count >= 0 for count in rows)
        if not counts or len(rows) != self.size or sum(rows) != tensor.shape[0]:
            raise UsageValueError(f"reduce_scatter: rows {tuple(rows)}, but should be {self.size} integers of at "
                                  f"least 0 that sum to {tensor.shape[0]}")
        signature = (tuple(tensor.shape), str(tensor.dtype), tuple(rows))
        parts = self._exchange("reduce_scatter", signature, tensor.clone())
        start = sum(rows[:self.rank])
        return _sum_in_rank_order([part[start:start + rows[self.rank]] for part in parts])

    def all_to_all(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if len(tensors) != self.size:
            raise UsageValueError(f"all_to_all: {len(tensors)} parts, but should be one per rank, {self.size}")
        parts = self._exchange("all_to_all", (str(tensors[0].dtype),), [tensor.clone() for tensor in tensors])
        return [part[self.rank].clone() for part in parts]


def _sum_in_rank_order(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def run_virtual_ranks(size: int, body: Callable[[LocalComm], Result]) -> list[Result]:
    """Run `body(comm)` once per rank, in the caller's grad and inference mode; the results in rank order.

    Raises the failing rank's own exception, with a note and an attribute `rank` that name it; the others are unwound.
    UsageValueError unless size is an integer of at least 1.
    """
    raise_faults("run_virtual_ranks", positive_faults(size=size))
    # Both modes belong to a thread: a new one starts with gradients whatever its maker does.
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    baton = _Baton(size)
    results: dict[int, Result] = {}
    errors: dict[int, BaseException] = {}

    def rank_main(rank: int) -> None:
        try:
            baton.wait_turn(rank)
            # Inference mode first: entering or refusing it sets the grad mode too.
            with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
                results[rank] = body(LocalComm(baton, rank))
            baton.finish(rank)
        except _PeerFailed:
            pass
        except BaseException as error:
            errors[rank] = error
            baton.fail(error)

    threads = [threading.Thread(target=rank_main, args=(rank,), name=f"rank {rank}", daemon=True)
               for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        rank = min(errors)
        errors[rank].add_note(f"on rank {rank} of {size}")
        errors[rank].rank = rank  # type: ignore[attr-defined]
        raise errors[rank]
    return [results[rank] for rank in range(size)]
