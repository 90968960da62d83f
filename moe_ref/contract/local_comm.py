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


class _Round:
    """One collective of one group: what its members handed over so far."""

    def __init__(self, members: tuple[int, ...], number: int) -> None:
        self.members, self.number = members, number
        self.requests: dict[int, _Request] = {}

    @property
    def complete(self) -> bool:
        return len(self.requests) == len(self.members)

    def words(self) -> str:
        """As "ranks [0, 1] wait in all_reduce #3", for those who have come."""
        waiting = sorted(self.requests)
        return (f"ranks {waiting} wait in {self.requests[waiting[0]].operation} #{self.number} "
                f"of ranks {list(self.members)}")


class _Baton:
    """Whose turn it is, and the collective that every group is in."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.turn = 0
        self.changed = threading.Condition()
        self.rounds: dict[tuple[int, ...], _Round] = {}
        self.finished: set[int] = set()
        self.failure: BaseException | None = None
        self.idle_turns = 0

    def wait_turn(self, rank: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.turn == rank or self.failure is not None)
            if self.failure is not None:
                raise _PeerFailed from self.failure

    def hand_on(self, rank: int) -> None:
        """To the next rank that has not returned; to nobody when all have."""
        with self.changed:
            following = ((rank + step) % self.size for step in range(1, self.size + 1))
            self.turn = next((one for one in following if one not in self.finished), -1)
            self.changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()

    def exchange(self, rank: int, members: tuple[int, ...], request: _Request) -> dict[int, _Request]:
        """Deposit a request, let the others run up to theirs, and return all requests of the group."""
        current = self.rounds.setdefault(members, _Round(members, 0))
        if gone := self.finished.intersection(members):
            raise CollectiveMismatch(f"rank {rank} waits in {request.operation} #{current.number} of ranks "
                                     f"{list(members)}, "
                                     f"but rank {min(gone)} has already returned")
        current.requests[rank] = request
        self._check_same(rank, current)
        if current.complete:
            self.rounds[members] = _Round(members, current.number + 1)
        self.idle_turns = 0
        while True:
            self.hand_on(rank)
            self.wait_turn(rank)
            if current.complete:
                return current.requests
            self.idle_turns += 1
            if self.idle_turns > self.size:
                raise CollectiveMismatch("no rank can go on: " + "; ".join(
                    one.words() for one in self.rounds.values() if one.requests))

    def _check_same(self, rank: int, current: _Round) -> None:
        other = min(current.requests)
        mine, first = current.requests[rank], current.requests[other]
        if (mine.operation, mine.signature) != (first.operation, first.signature):
            group = "" if len(current.members) == self.size else f" of ranks {list(current.members)}"
            raise CollectiveMismatch(
                f"collective #{current.number}{group}: rank {rank} issued {mine.operation}{mine.signature}, "
                f"but rank {other} issued {first.operation}{first.signature}")

    def finish(self, rank: int) -> None:
        left = [one for members, one in self.rounds.items() if rank in members and one.requests]
        if left and self.failure is None:
            raise CollectiveMismatch(f"rank {rank} returned, but {left[0].words()}")
        self.idle_turns = 0
        self.finished.add(rank)
        self.hand_on(rank)


class LocalComm:
    """The Comm of one virtual rank, or of a part of them; sums run in rank order, in the tensor's dtype."""

    def __init__(self, baton: _Baton, rank: int, members: tuple[int, ...] | None = None) -> None:
        self._baton, self._global_rank = baton, rank
        self._members = tuple(range(baton.size)) if members is None else members
        self.rank = self._members.index(rank)

    @property
    def size(self) -> int:
        return len(self._members)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def subgroup(self, parts: Sequence[Sequence[int]]) -> "LocalComm":
        """The part of this group that holds this rank; all pass the same parts, ranks counted in this group."""
        mine = next(part for part in parts if self.rank in part)
        return LocalComm(self._baton, self._global_rank, tuple(self._members[rank] for rank in mine))

    def _exchange(self, operation: str, signature: tuple, payload: object) -> list:
        # Payloads are copies: a rank that resumes first may overwrite its buffer before the others read it.
        requests = self._baton.exchange(self._global_rank, self._members, _Request(operation, signature, payload))
        return [requests[rank].payload for rank in self._members]

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        parts = self._exchange("all_reduce", (tuple(tensor.shape), str(tensor.dtype)), tensor.clone())
        return sum_in_rank_order(parts)

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
        return sum_in_rank_order([part[start:start + rows[self.rank]] for part in parts])

    def all_to_all(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if len(tensors) != self.size:
            raise UsageValueError(f"all_to_all: {len(tensors)} parts, but should be one per rank, {self.size}")
        parts = self._exchange("all_to_all", (str(tensors[0].dtype),), [tensor.clone() for tensor in tensors])
        return [part[self.rank].clone() for part in parts]

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        parts = self._exchange("broadcast", (tuple(tensor.shape), str(tensor.dtype)), tensor.clone())
        return parts[0].clone()


def sum_in_rank_order(parts: Sequence[torch.Tensor]) -> torch.Tensor:
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
            # On a device all ranks would share autograd's one thread, and block each other in a collective there.
            with (torch.inference_mode(inference), torch.set_grad_enabled(gradients),
                  torch.autograd.set_multithreading_enabled(False)):
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
