"""The inside of a process rank: it joins worlds and works on jobs until its parent is gone."""

import ctypes
import faulthandler
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection

import msgspec
import torch
import torch.distributed as dist

from moe_ref.contract.comm import Groups, grid_groups
from moe_ref.contract.torch_comm import TorchComm
from moe_ref.verify.child.error_words import error_words
from moe_ref.verify.child.rank_watch import Entered, Left, Raised, RankMessage, Returned, Told

Body = Callable[[Groups, torch.device, bytes, Callable[[str], None]], bytes]

DUMP_SIGNAL = signal.SIGUSR2
"""Makes a rank dump its stacks into its own file; SIGUSR1 makes it, like its parent, dump them into the common log."""

_PR_SET_PDEATHSIG = 1


class World(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Join a world of this many ranks, in place of the last one."""

    number: int
    size: int


class Work(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Run the body as a rank of a grid of ep * tp; ranks beyond it take part in making its groups only."""

    tp: int
    ep: int
    job: bytes


@dataclass(frozen=True, kw_only=True)
class Home:
    """What a rank is born with; rendezvous and dump are files in memory."""

    rank: int
    backend: str
    device: str
    rendezvous: int
    dump: int
    parent: int
    orders: Connection
    messages: Connection


def rank_main(home: Home, body: Body) -> None:
    """Follow orders; an error of the body is an answer like any other."""
    end_with(home.parent)
    faulthandler.enable(home.dump)
    faulthandler.register(DUMP_SIGNAL, file=home.dump, all_threads=True)
    torch.set_num_threads(1)
    world: FirstRanks | None = None
    while True:
        try:
            order = msgspec.msgpack.decode(home.orders.recv_bytes(), type=World | Work)
        except EOFError:
            return
        try:
            if isinstance(order, World):
                world = None
                world = _join(home, order)
            elif world is not None:
                _work(home, world, order, body)
        except BaseException as error:
            _say(home, Raised(f"{type(error).__module__}.{type(error).__qualname__}", *error_words(error)))


def end_with(parent: int) -> None:
    """No child or rank outlives its parent, however that ends; it is the thread that started it that counts."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _say(home: Home, message: RankMessage) -> None:
    home.messages.send_bytes(msgspec.msgpack.encode(message))


class FirstRanks(TorchComm):
    """The first ranks of a world, which the ranks behind them help to divide: c10d wants all of them for that."""

    def take(self, size: int) -> "FirstRanks":
        """With the first `size` ranks."""
        self.size = size
        return self

    def subgroup(self, parts: Sequence[Sequence[int]]) -> TorchComm:
        behind = range(self.size, dist.get_world_size())
        return super().subgroup([*parts, *([behind] if behind else [])])


def _set_device(home: Home) -> torch.device:
    """This rank's device; ranks share one where there are fewer, which gloo can do."""
    if home.device != "cuda":
        return torch.device(home.device)
    device = torch.device("cuda", home.rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _join(home: Home, order: World) -> FirstRanks:
    if dist.is_initialized():
        dist.destroy_process_group()
    # A bound device makes NCCL connect at once, and later groups by splitting, for which all ranks of a world meet.
    device = _set_device(home) if home.backend == "nccl" else None
    store = dist.PrefixStore(f"world {order.number}", dist.FileStore(f"/proc/self/fd/{home.rendezvous}", -1))
    # Waiting is limited by the parent, which knows who waits for whom.
    dist.init_process_group(home.backend, store=store, rank=home.rank, world_size=order.size,
                            timeout=timedelta(days=1), device_id=device)

    @contextmanager
    def watch(members: tuple[int, ...], operation: str, signature: tuple) -> Iterator[None]:
        _say(home, Entered(members, operation, str(signature)))
        yield
        _say(home, Left())

    return FirstRanks(watch=watch)


def _work(home: Home, world: FirstRanks, order: Work, body: Body) -> None:
    taken = order.ep * order.tp
    groups = grid_groups(world.take(taken), order.tp, order.ep)
    if home.rank >= taken:
        return
    device, before = _set_device(home), num_groups()
    content = body(groups, device, order.job, lambda text: _say(home, Told(text)) if home.rank == 0 else None)
    _say(home, Returned(content, fit=num_groups() == before))


def num_groups() -> int:
    """c10d names groups by counting: a subject that makes its own gets ranks out of step with those behind."""
    return len(dist.distributed_c10d._world.pg_names)
