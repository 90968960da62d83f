"""A run on ranks that torchrun started, on one host or many: the first of them plans, judges and records."""

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from types import ModuleType

import msgspec
import torch

from moe_ref.contract.errors import UsageValueError
from moe_ref.verify.child.execute import execute
from moe_ref.verify.child.messages import Request, unpack_runs
from moe_ref.verify.child.process_ranks import STUCK_SECONDS, RanksHung
from moe_ref.verify.child.rank_watch import Entered, Left, Raised, RankError, RankWatch, rank_words
from moe_ref.verify.child.torchrun_rank import (
    POLL_SECONDS,
    End,
    Hello,
    Log,
    Order,
    Part,
    Seat,
    TorchrunRank,
    Work,
    put,
    said_key,
    say_hello,
    serve,
    take,
    take_seat,
)
from moe_ref.verify.run.case_runner import CannotServe
from moe_ref.verify.run.children import Answer, ChildHung
from moe_ref.verify.run.last_words import raising_frame
from moe_ref.verify.run.run import EXIT_HARNESS, EXIT_OK, Observer, Plan, RunResult, run_with

GUARD = "torchrun rank: no protection against hangs and crashes, and the first one shares its process with the judge"

JOIN_SECONDS, LEAVE_SECONDS = 180.0, 10.0
_LINES = msgspec.json.Decoder(Entered | Left)

Run = Callable[[Plan, Observer], RunResult]


def run_on_torchrun(name: str, device: str, time_limit: float, use: Callable[[Run], int]) -> int:
    """The exit code of use(run) on the first rank, where `run` is like run_plan; the others serve, and end with 0.

    Raises UsageValueError without torchrun, with too few devices, or if ranks hold different sources.
    """
    seat = take_seat(device, time_limit)
    if seat.rank > 0:
        serve(seat, name)
        return EXIT_OK
    torch.set_num_threads(1)
    code, ranks = EXIT_HARNESS, None
    try:
        ranks = TorchrunRanks(seat, name)
        code = use(ranks.run_plan)
    except KeyboardInterrupt:
        code = 130
        raise
    finally:
        _let_go(seat, ranks, code)
    return code


def _let_go(seat: Seat, ranks: "TorchrunRanks | None", code: int) -> None:
    """End all ranks; where one is at work still, nothing is waited for, and this process ends past its destructors."""
    stuck = ranks is not None and ranks.close()
    put(seat.store, f"order {ranks.num_orders if ranks else 0}", End())
    if stuck:
        atexit.register(_end_at_once, code)
        return
    until = time.monotonic() + LEAVE_SECONDS
    while seat.store.add("left", 0) < seat.size - 1 and time.monotonic() < until:
        time.sleep(POLL_SECONDS)


def _end_at_once(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class TorchrunRanks:
    """The pool of a run under torchrun, held by the first rank, which is one of them.

    No child stands between judge and subject. Ranks that are out of step get a new world of process groups; a rank that
    does not come back ends the run: later cases raise CannotServe.
    """

    def __init__(self, seat: Seat, name: str) -> None:
        self.seat, self.num_orders, self.over = seat, 0, ""
        subject = say_hello(seat, name)
        self.hellos = [msgspec.msgpack.decode(self._receive(f"hello {rank}"), type=Hello) for rank in range(seat.size)]
        check_hosts(self.hellos)
        assert subject is not None
        self.subject: ModuleType = subject
        self._rank = TorchrunRank(seat, subject)
        self._world = 0
        self._working = self._closed = False
        self._stuck = ("", 0.0)

    def _receive(self, key: str) -> bytes:
        self.seat.store.wait([key], timedelta(seconds=JOIN_SECONDS))
        return take(self.seat.store, key)

    def run_plan(self, plan: Plan, observer: Observer) -> RunResult:
        """As run_plan of a machine's own ranks, one case at a time."""
        plan = replace(plan, lanes=1, num_started=self.seat.size, hosts=_host_words(self.hellos))
        with _output_on_stderr():
            return run_with(plan, self, self.subject.CAPABILITIES, self.hellos[0].source_digest, time.monotonic(),
                            observer)

    @contextmanager
    def lease(self, process_ranks: bool) -> Iterator["TorchrunRanks"]:
        """The ranks, for one case."""
        yield self

    def ask(self, request: Request, on_progress: Callable[[str], None] = lambda text: None) -> Answer:
        """Run one case; raises ChildHung, or CannotServe when ranks have been lost before."""
        if self.over:
            raise CannotServe(self.over)
        reply, payload = execute(self.subject, request, on_progress, self)
        if reply.ranks[0].kind == "hang":
            self.over = f"the run ended with {request.case}, from which ranks did not come back"
            raise ChildHung(reply.ranks[0].error)
        reply = msgspec.structs.replace(reply, guard=reply.guard | {"process": GUARD})
        return Answer(reply, unpack_runs(payload, len(reply.ranks)))

    def run(self, tp: int, job: bytes = b"", *, ep: int = 1, backend: str = "", device: str = "",
            time_limit: float = 60.0, tell: Callable[[str], None] = lambda text: None) -> list[bytes | RankError]:
        """Run a job on the first ep * tp ranks; what each returned, or its error, by rank. Raises RanksHung."""
        number = self.num_orders
        logs = self._logs(Work(world=self._world, tp=tp, ep=ep, job=job), time_limit, tell)
        watch, frames = self._watch(number, tp * ep, logs)
        if watch.finished:
            places = ""
        else:
            odd = watch.mismatch()[0] or watch.raised() or watch.at_work()
            places = watch.places(sorted(range(watch.size), key=lambda rank: (rank not in odd, rank)), frames)
        if late := [rank for rank in range(self.seat.size) if rank not in logs]:
            words = f"{rank_words(watch.at_work() or late)} of {watch.size} did not answer within {time_limit:.3g} s"
            raise RanksHung("\n".join(("; ".join(filter(None, (words, watch.waiting_words()))), places)))
        # c10d counts groups to name them: ranks that made other numbers of them cannot make the next ones together.
        if not watch.finished or len({log.num_made for log in logs.values()}) > 1:
            self._world += 1
            if self.seat.backend == "nccl" and any(self._said(number, rank) for rank in range(watch.size)):
                self.over = "the run ended with a case that failed between collectives of NCCL"
        return watch.answers(places)

    def _logs(self, work: Work, time_limit: float, tell: Callable[[str], None]) -> dict[int, Log]:
        """Of every rank that has finished when time is up."""
        number, deadline = self._order(work), time.monotonic() + time_limit
        store, self._working = self.seat.store, True
        # This rank works on a thread of its own, so that the others are heard whatever it does.
        threading.Thread(target=lambda: put(store, f"log {number} 0", self._rank.work(work, number, tell)),
                         daemon=True).start()
        logs: dict[int, Log] = {}
        look_at, self._stuck = 0.0, ("", 0.0)
        while len(logs) < self.seat.size and (now := time.monotonic()) < deadline:
            if self._closed:
                raise KeyboardInterrupt
            for rank in set(range(self.seat.size)) - set(logs):
                if store.check([key := f"log {number} {rank}"]):
                    logs[rank] = msgspec.msgpack.decode(take(store, key, last=True), type=Log)
                    if rank == 0:
                        self._rank.leave_if_failed(logs[0])
            if logs and now > look_at:
                look_at = now + STUCK_SECONDS / 8
                self._free_stuck(number, work.tp * work.ep, logs)
            time.sleep(POLL_SECONDS)
        self._working = len(logs) < self.seat.size
        return logs

    def _free_stuck(self, number: int, size: int, logs: dict[int, Log]) -> None:
        """Let ranks that are done leave the world when the others have waited in vain for a while."""
        watch, _ = self._watch(number, size, logs)
        waiting, now = watch.waiting_words() if watch.settled else "", time.monotonic()
        if waiting != self._stuck[0]:
            self._stuck = (waiting, now)
        elif waiting and now - self._stuck[1] > STUCK_SECONDS and self.seat.backend == "gloo":
            self._stuck, self._world = ("", now), self._world + 1
            self._order(Part())
            if 0 in logs:
                self._rank.leave_world()

    def _order(self, order: Order) -> int:
        put(self.seat.store, f"order {self.num_orders}", order)
        self.num_orders += 1
        return self.num_orders - 1

    def _said(self, number: int, rank: int) -> list[Entered | Left]:
        """The collectives that a rank has announced so far."""
        key = said_key(number, rank)
        text = self.seat.store.get(key) if self.seat.store.check([key]) else b""
        return _LINES.decode_lines(text)

    def _watch(self, number: int, size: int, logs: dict[int, Log]) -> tuple[RankWatch, dict[int, str]]:
        """What ranks have done so far, and the innermost frames of those that raised.

        What a rank raises inside a collective is where it waited, unless nobody else is to blame.
        """
        watch, inside, frames = RankWatch(size), dict[int, Raised](), dict[int, str]()
        for rank in range(size):
            said, end = self._said(number, rank), logs[rank].end if rank in logs else None
            for message in said:
                watch.hear(rank, message)
            if isinstance(end, Raised):
                frames[rank] = raising_frame(end.trace)
            if isinstance(end, Raised) and said and isinstance(said[-1], Entered):
                inside[rank] = end
            elif end is not None:
                watch.hear(rank, end)
        if set(range(size)) <= set(logs) and not watch.mismatch()[0] and not watch.raised():
            for rank, raised in inside.items():
                watch.hear(rank, raised)
        return watch, {rank: frame for rank, frame in frames.items() if frame}

    def close(self) -> bool:
        """Leave the others, without waiting for any; whether one of them is still at work."""
        self._closed = True
        if not self._working:
            self._rank.leave_world()
        return self._working


def check_hosts(hellos: list[Hello]) -> None:
    """Raise UsageValueError where a rank could not load the subject, or has other sources or torch than rank 0."""
    first = hellos[0]
    for rank, hello in enumerate(hellos):
        if hello.usage_error:
            raise UsageValueError(hello.usage_error + f" [rank {rank} on {hello.host}]" * (rank > 0))
        for what in ("source_digest", "torch"):
            if getattr(hello, what) != getattr(first, what):
                raise UsageValueError(f"rank {rank} on {hello.host} has {what} {getattr(hello, what)}, but rank 0 on "
                                      f"{first.host} has {getattr(first, what)}; all hosts should have the same")


def _host_words(hellos: list[Hello]) -> str:
    """As "a: ranks 0-1, b: ranks 2-3", a node of torchrun each."""
    nodes: dict[tuple[int, str], list[int]] = {}
    for rank, hello in enumerate(hellos):
        nodes.setdefault((hello.node, hello.host), []).append(rank)
    return ", ".join(f"{host}: ranks {ranks[0]}-{ranks[-1]}" for (_, host), ranks in nodes.items())


@contextmanager
def _output_on_stderr() -> Iterator[None]:
    """Whatever the subject prints does not mix with the result."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
