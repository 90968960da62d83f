"""The inside of a rank that torchrun started: it joins worlds and works on cases until the first rank lets it go.

Orders and logs travel through the store that torchrun's agents share, never through a process group: a subject that
leaves its ranks out of step, or hangs, cannot keep a rank from being heard.
"""

import faulthandler
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType

import msgspec
import torch
import torch.distributed as dist

from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.comm import Groups, grid_groups
from moe_ref.contract.errors import UsageError, UsageValueError, raise_faults
from moe_ref.contract.torch_comm import TorchComm
from moe_ref.verify.child.error_words import error_words
from moe_ref.verify.child.execute import run_job
from moe_ref.verify.child.rank_process import FirstRanks, num_groups
from moe_ref.verify.child.rank_watch import Entered, Left, Raised, Returned
from moe_ref.verify.run.subjects import load_subject, source_digest

_SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")

END_SECONDS = 15.0
"""What a rank gets beyond the time limit before it ends itself, so that the first one gives its verdict before."""

POLL_SECONDS = 0.002
_PART_BYTES = 4 << 20  # the store takes no value above 8 MiB
_FOREVER = timedelta(days=365)


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """Who serves: where, with which torch and which sources of the subject, or why the subject could not be loaded."""

    host: str
    node: int
    torch: str
    source_digest: str = ""
    usage_error: str = ""


class Work(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Run the job as a rank of a grid of ep * tp in the world of that number."""

    world: int
    tp: int
    ep: int
    job: bytes


class Part(msgspec.Struct, frozen=True, tag=True):
    """Leave the world, so that ranks that wait in it are told."""


class End(msgspec.Struct, frozen=True, tag=True):
    """No more orders will come."""


Order = Work | Part | End


class Log(msgspec.Struct, frozen=True):
    """How a rank's work ended, None where it had no part in it, and how many process groups its subject made."""

    end: Returned | Raised | None
    num_made: int = 0


class CollectiveMismatch(RuntimeError):
    """This rank is about to enter another collective than the first that came; no backend sees that it does not fit."""


def put(store: dist.Store, key: str, message: msgspec.Struct) -> None:
    """Leave a message of any size; it is announced when all of it is there."""
    content = msgspec.msgpack.encode(message)
    starts = range(0, len(content), _PART_BYTES)
    for number, start in enumerate(starts):
        store.set(f"{key}.{number}", content[start:start + _PART_BYTES])  # type: ignore[arg-type]
    store.set(key, str(len(starts)))


def take(store: dist.Store, key: str, last: bool = False) -> bytes:
    """The bytes of a message that has been announced; last: nobody else will read it."""
    keys = [f"{key}.{number}" for number in range(int(store.get(key)))]
    content = b"".join(store.get(one) for one in keys)
    for one in keys if last else []:
        store.delete_key(one)
    return content


def said_key(order: int, rank: int) -> str:
    """Where a rank announces the collectives of an order, one JSON line each."""
    return f"said {order} {rank}"


@dataclass(frozen=True, kw_only=True)
class Seat:
    """A rank's place: its numbers, its device, one connection to the store for groups and one for orders and logs."""

    rank: int
    size: int
    device: torch.device
    time_limit: float
    groups_store: dist.Store
    store: dist.Store

    @property
    def backend(self) -> str:
        return "nccl" if self.device.type == "cuda" else "gloo"

    @property
    def collective_seconds(self) -> float:
        """How long a collective may wait: gloo's raises early enough to say so; NCCL's would end the process."""
        if self.backend == "nccl":
            return self.time_limit + 2 * END_SECONDS
        return max(self.time_limit - END_SECONDS, self.time_limit / 2)


def take_seat(device: str, time_limit: float) -> Seat:
    """This process's place among those of torchrun; raises UsageValueError without torchrun, or without a device."""
    if missing := [name for name in _SET_BY_TORCHRUN if name not in os.environ]:
        raise_faults("--ranks torchrun", [f"{', '.join(missing)} not set, but torchrun should have started this: "
                                          "torchrun --nproc-per-node N -m moe_ref verify ..."])
    local, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if device == "cuda" and local_size > torch.cuda.device_count():
        raise UsageValueError(f"--ranks torchrun: {local_size} ranks on {socket.gethostname()}, but NCCL needs one "
                              f"device per rank, and it has {torch.cuda.device_count()}")
    store, rank, size = next(iter(dist.rendezvous("env://")))
    own_connection = store.clone()  # type: ignore[attr-defined]
    return Seat(rank=rank, size=size, device=torch.device(device, local) if device == "cuda" else torch.device(device),
                time_limit=time_limit, groups_store=store, store=dist.PrefixStore("moe-ref", own_connection))


class TorchrunRank:
    """Works on one order after another in a world of process groups that can be made anew."""

    def __init__(self, seat: Seat, subject: ModuleType) -> None:
        self.seat, self.subject = seat, subject
        self._world: FirstRanks | None = None
        self._number = -1
        self._order = 0
        self._issued: Counter[tuple[int, ...]] = Counter()

    def work(self, order: Work, number: int, tell: Callable[[str], None] = lambda text: None) -> Log:
        """Follow the order of that number; an error of the subject is part of the log."""
        self._order, num_made, end = number, 0, None
        self._issued.clear()
        try:
            if self.seat.backend == "nccl":
                torch.cuda.set_device(self.seat.device)
            if self._world is None or order.world != self._number:
                self._world = self._join(order.world)
            taken = order.ep * order.tp
            groups = grid_groups(self._world.take(taken), order.tp, order.ep)
            self._meet()
            if self.seat.rank < taken:
                self._limit_waiting(groups)
                before = num_groups()
                end = Returned(run_job(self.subject, groups, self.seat.device, order.job, tell))
                num_made = num_groups() - before
        except BaseException as error:
            end = Raised(f"{type(error).__module__}.{type(error).__qualname__}", *error_words(error))
        return Log(end, num_made)

    def leave_if_failed(self, log: Log) -> None:
        """Close this rank's connections if it raised, so that whoever waits for it is told at once; NCCL could hang."""
        if self.seat.backend == "gloo" and isinstance(log.end, Raised):
            self.leave_world()

    def leave_world(self) -> None:
        """Close all connections between ranks."""
        self._world = None
        if dist.is_initialized():
            dist.destroy_process_group()

    def _join(self, number: int) -> FirstRanks:
        self.leave_world()
        seat, self._number = self.seat, number
        # A bound device makes NCCL connect at once, and later groups by splitting, for which all ranks of a world meet.
        dist.init_process_group(seat.backend, store=dist.PrefixStore(f"world {number}", seat.groups_store),
                                rank=seat.rank, world_size=seat.size,
                                timeout=timedelta(seconds=seat.collective_seconds),
                                device_id=seat.device if seat.backend == "nccl" else None)
        return FirstRanks(watch=self._watch)

    def _meet(self) -> None:
        """Wait for all ranks to have their groups: one that left before would keep others from connecting."""
        store, key = self.seat.store, f"order {self._order}: met"
        until = time.monotonic() + self.seat.collective_seconds
        store.add(key, 1)
        # Polled: waiting in the store would keep the judge, who shares the first rank's connection, from it.
        while (met := store.add(key, 0)) < self.seat.size:
            if time.monotonic() > until:
                raise TimeoutError(f"{met} of {self.seat.size} ranks have made their process groups")
            time.sleep(POLL_SECONDS)

    @contextmanager
    def _watch(self, members: tuple[int, ...], operation: str, signature: tuple) -> Iterator[None]:
        entered = Entered(members, operation, str(signature))
        self._say(entered)
        key = f"order {self._order}: collective {self._issued[members]} of {members}"
        self._issued[members] += 1
        # gloo ends the process when sizes do not fit, and with it perhaps the judge.
        if (first := self.seat.store.compare_set(key, "", str(entered)).decode()) != str(entered):
            raise CollectiveMismatch(f"{entered}, but another rank issued {first}")
        yield
        self._say(Left())

    def _say(self, message: Entered | Left) -> None:
        line = msgspec.json.encode(message).decode() + "\n"
        self.seat.store.append(said_key(self._order, self.seat.rank), line)  # type: ignore[attr-defined]

    def _limit_waiting(self, groups: Groups) -> None:
        """c10d gives new groups a limit of its own, not that of their world."""
        for comm in (groups.tp, groups.ep):
            if isinstance(comm, TorchComm):
                dist.distributed_c10d._set_pg_timeout(timedelta(seconds=self.seat.collective_seconds), comm.group)


def say_hello(seat: Seat, name: str) -> ModuleType | None:
    """Load the subject and tell the first rank; None if that fails, with the reason in the message."""
    subject, digest, fault = None, "", ""
    try:
        subject = load_subject(name)
        # Decoding checks every field's type, which a dataclass does not.
        msgspec.json.decode(msgspec.json.encode(subject.CAPABILITIES), type=Capabilities)
        digest = source_digest(subject)
    except UsageError as error:
        fault = str(error)
    except BaseException as error:
        fault = " ".join(f"implementation {name!r} cannot be loaded: {type(error).__name__}: {error}".split())
    put(seat.store, f"hello {seat.rank}",
        Hello(host=socket.gethostname(), node=int(os.environ["GROUP_RANK"]), torch=str(torch.__version__),
              source_digest=digest, usage_error=fault))
    return None if fault else subject


def serve(seat: Seat, name: str) -> None:
    """What every rank but the first does until it is let go; one that hangs ends itself, with its stacks on stderr."""
    # Standard output is the first rank's; and an interrupt is no error of the subject.
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    rank, number = TorchrunRank(seat, say_hello(seat, name) or ModuleType(name)), 0
    while True:
        seat.store.wait([f"order {number}"], _FOREVER)
        order = msgspec.msgpack.decode(take(seat.store, f"order {number}"), type=Order)
        if isinstance(order, Work):
            faulthandler.dump_traceback_later(seat.time_limit + END_SECONDS, exit=True)
            log = rank.work(order, number)
            put(seat.store, f"log {number} {seat.rank}", log)
            faulthandler.cancel_dump_traceback_later()
            rank.leave_if_failed(log)
        else:
            rank.leave_world()
        if isinstance(order, End):
            seat.store.add("left", 1)
            return
        number += 1
