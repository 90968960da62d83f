"""Process ranks, kept from case to case: forked from a child that has loaded the subject and never touched a device.

Fork instead of spawn: a fork does not import torch and the subject again for every rank. It is safe because the
child runs with one OpenMP thread and has not initialised CUDA; each rank initialises its own device.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import msgspec

from moe_ref.verify.child.rank_process import DUMP_SIGNAL, Body, Home, Work, World, rank_main
from moe_ref.verify.child.rank_watch import (
    DIED,
    Raised,
    RankError,
    RankMessage,
    RankWatch,
    Returned,
    Told,
    rank_words,
)
from moe_ref.verify.run.last_words import describe_exit, innermost_frames, raising_frame

ERROR_GRACE_SECONDS = 3.0
"""After a rank's error those still at work get this long to report their own; wrong use shows on every rank."""

MISMATCH_GRACE_SECONDS = 2.0
"""After a mismatch the other members get this long to show what they issue, so that the odd one is named.

Less does for ranks with a core each; where they share one, the third came too late to be the majority with the second.
"""

QUIET_SECONDS = 0.3
"""Silence after which ranks that all wait are taken to wait for ever, once another one has failed."""

STUCK_SECONDS = 2.0
"""The same while none has failed: longer, since a sender of a broadcast may leave before the others come."""

_POLL_SECONDS = 0.25
_DUMP_SECONDS = 1.0


class RanksHung(RuntimeError):
    """Ranks did not answer within the time limit; the message names them, their collectives and their stacks."""


class _Rank(NamedTuple):
    process: BaseProcess
    orders: Connection
    messages: Connection
    dump: int


class RankPool:
    """Process ranks that serve one case after another; after any failure all are ended, and the next case forks anew.

    `body` runs in every rank of a case, with the rank's groups, its device, the job's bytes and a function that tells
    progress; the bytes it returns come back. Ranks are the first of a world of their own, which grows to the largest
    case and holds one rank more: a subject that takes the world for its group fails in every case, not in some. NCCL
    needs a device for each rank, so there is none to spare.
    """

    def __init__(self, body: Body) -> None:
        self.body = body
        self.num_forked = self.num_worlds = 0
        self._ranks: list[_Rank] = []
        self._kind = ("", "")
        self._rendezvous = -1

    def run(self, tp: int, job: bytes = b"", *, ep: int = 1, backend: str = "gloo", device: str = "cpu",
            time_limit: float = 60.0, tell: Callable[[str], None] = lambda text: None) -> list[bytes | RankError]:
        """Run the body on a grid of ep * tp ranks; what each returned, or its error, by rank. Raises RanksHung."""
        self._prepare(tp * ep, backend, device)
        watch = RankWatch(tp * ep)
        for number, rank in enumerate(self._ranks):
            _send(rank.orders, Work(tp=tp, ep=ep, job=job if number < watch.size else b""))
        try:
            in_time = self._serve(watch, time.monotonic() + time_limit, tell)
            if watch.finished:
                return watch.answers("")
            odd = watch.mismatch()[0] or watch.raised() or watch.at_work()
            ranks = sorted(range(watch.size), key=lambda rank: (rank not in odd, rank))
            places = watch.places(ranks, self._frames(watch))
            if not in_time:
                late = f"{rank_words(odd)} of {watch.size} did not answer within {time_limit:.3g} s"
                raise RanksHung("\n".join(("; ".join(filter(None, (late, watch.waiting_words()))), places)))
            return watch.answers(places)
        finally:
            if not watch.finished or not all(isinstance(end, Returned) and end.fit for end in watch.ended.values()):
                self.close()

    def _prepare(self, size: int, backend: str, device: str) -> None:
        """Enough ranks, joined to one world."""
        spare = 0 if backend == "nccl" else 1
        # A rank that died between two cases is no fault of the second.
        if self._kind != (backend, device) or not all(rank.process.is_alive() for rank in self._ranks):
            self.close()
        if len(self._ranks) >= size + spare:
            return
        if self._rendezvous < 0:
            # A file in memory that ends with the last process that holds it, however it ends.
            self._rendezvous = os.memfd_create("rendezvous")
        self._kind = (backend, device)
        while len(self._ranks) < size + spare:
            self._ranks.append(self._fork(len(self._ranks)))
        for rank in self._ranks:
            _send(rank.orders, World(number=self.num_worlds, size=size + spare))
        self.num_worlds += 1

    def _fork(self, number: int) -> _Rank:
        context = get_context("fork")
        orders, to_rank = context.Pipe(duplex=False)
        messages, from_rank = context.Pipe(duplex=False)
        dump = os.memfd_create(f"stacks of rank {number}")
        backend, device = self._kind
        home = Home(rank=number, backend=backend, device=device, rendezvous=self._rendezvous, parent=os.getpid(),
                    dump=dump, orders=orders, messages=from_rank)
        process = context.Process(target=rank_main, args=(home, self.body), daemon=True)
        process.start()
        orders.close()
        from_rank.close()
        self.num_forked += 1
        return _Rank(process, to_rank, messages, dump)

    def _serve(self, watch: RankWatch, deadline: float, tell: Callable[[str], None]) -> bool:
        """Hear the ranks until they have finished or nothing more can come of it; False if time is up first."""
        failed_at, heard_at = float("inf"), time.monotonic()
        while not watch.finished:
            now = time.monotonic()
            if watch.over:
                return True
            if watch.settled and now - heard_at >= (QUIET_SECONDS if watch.failed else STUCK_SECONDS):
                return True
            if now - failed_at >= (MISMATCH_GRACE_SECONDS if watch.disagree else ERROR_GRACE_SECONDS):
                return True
            if now >= deadline:
                return watch.failed
            if self._hear(watch, tell, min(_POLL_SECONDS, deadline - now)):
                heard_at = time.monotonic()
            if watch.failed:
                failed_at = min(failed_at, time.monotonic())
        return True

    def _hear(self, watch: RankWatch, tell: Callable[[str], None], seconds: float) -> bool:
        """Take one message of every rank that has one; whether any had."""
        by_connection = {self._ranks[rank].messages: rank for rank in range(watch.size) if rank not in watch.ended}
        ready = wait(list(by_connection), timeout=min(seconds, QUIET_SECONDS / 4) if watch.failed else seconds)
        for connection in ready:
            rank = by_connection[connection]  # type: ignore[index]
            message = self._read(rank)
            if isinstance(message, Told):
                tell(message.text)
            else:
                watch.hear(rank, message)
        return bool(ready)

    def _read(self, number: int) -> RankMessage:
        rank = self._ranks[number]
        try:
            return msgspec.msgpack.decode(rank.messages.recv_bytes(), type=RankMessage)
        except (EOFError, OSError):
            rank.process.join(_DUMP_SECONDS)
            code = rank.process.exitcode
            how = "closed its pipe without ending" if code is None else describe_exit(code)
            return Raised(kind=DIED, message=f"rank {number} {how}")

    def _frames(self, watch: RankWatch) -> dict[int, str]:
        """The innermost frame of the subject in every rank that runs, has raised, or left a dump when it died."""
        running = {rank: self._dumped(rank) for rank in range(watch.size) if rank not in watch.ended}
        for rank in running:
            if (process := self._ranks[rank].process).is_alive():
                os.kill(process.pid or 0, DUMP_SIGNAL)
        until = time.monotonic() + _DUMP_SECONDS
        while time.monotonic() < until and any(self._dumped(rank) == before for rank, before in running.items()):
            time.sleep(_DUMP_SECONDS / 100)
        # From the first line to the last.
        time.sleep(_DUMP_SECONDS / 20)
        frames = {rank: raising_frame(end.trace) for rank, end in watch.ended.items() if isinstance(end, Raised)}
        for rank in (*running, *watch.raised(DIED)):
            dump = os.pread(self._ranks[rank].dump, self._dumped(rank), running.get(rank, 0)).decode(errors="replace")
            frames[rank] = next(iter(innermost_frames(dump)), "")
        return {rank: frame for rank, frame in frames.items() if frame}

    def _dumped(self, rank: int) -> int:
        return os.fstat(self._ranks[rank].dump).st_size

    def close(self) -> None:
        """End all ranks."""
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join()
            rank.process.close()
            rank.orders.close()
            rank.messages.close()
            os.close(rank.dump)
        self._ranks = []
        if self._rendezvous >= 0:
            os.close(self._rendezvous)
            self._rendezvous = -1


def _send(connection: Connection, order: World | Work) -> None:
    # A rank that has died: reading from it says how.
    with suppress(BrokenPipeError):
        connection.send_bytes(msgspec.msgpack.encode(order))
