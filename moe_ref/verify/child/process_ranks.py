"""Real process ranks: forked from a child that has loaded the subject, never touched a device and has no thread left.

Fork instead of spawn: a fork does not import torch and the subject again for every rank. It is safe because the
child runs with one OpenMP thread and has not initialised CUDA; each rank initialises its own device.
"""

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait

import torch

from moe_ref.contract.torch_comm import TorchComm

ERROR_GRACE_SECONDS = 3.0
"""After a rank's error the others get this long to report their own; wrong use shows on every rank."""


class RanksHung(RuntimeError):
    """Ranks did not answer within the time limit."""


def run_process_ranks(size: int, backend: str, device: str, time_limit: float,
                      body: Callable[[TorchComm, torch.device], bytes]) -> list[bytes | Exception]:
    """Fork `size` ranks, run `body` in each, return its bytes or its error by rank; raises RanksHung.

    Ranks that are still running some seconds after another one failed are ended and reported as waiting.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        rendezvous, receivers, processes = f"{folder}/store", [], []
        for rank in range(size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_rank_main, daemon=True,
                                      args=(rank, size, backend, device, time_limit, rendezvous, sender, body))
            process.start()
            sender.close()
            receivers.append(receiver)
            processes.append(process)
        try:
            return _collect(receivers, time_limit)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _rank_main(rank: int, size: int, backend: str, device: str, time_limit: float, rendezvous: str,
               sender: Connection, body: Callable[[TorchComm, torch.device], bytes]) -> None:
    try:
        torch.set_num_threads(1)
        where = torch.device(device, rank % torch.cuda.device_count()) if device == "cuda" else torch.device(device)
        if where.type == "cuda":
            torch.cuda.set_device(where)
        torch.distributed.init_process_group(
            backend, store=torch.distributed.FileStore(rendezvous, size), rank=rank, world_size=size,
            timeout=timedelta(seconds=time_limit))
        # A rank that ends before the others have connected would break their connections, not its own.
        torch.distributed.barrier()
        sender.send_bytes(b"\0" + body(TorchComm(), where))
    except BaseException as error:
        lines = (type(error).__module__ + "." + type(error).__qualname__, str(error), traceback.format_exc())
        sender.send_bytes(b"\1" + "\0".join(lines).encode())
    finally:
        sender.close()


class RankError(Exception):
    """An error raised in a process rank: its type's full name, message and traceback."""

    def __init__(self, kind: str, message: str, trace: str) -> None:
        super().__init__(message)
        self.kind, self.trace = kind, trace


def _collect(receivers: list[Connection], time_limit: float) -> list[bytes | Exception]:
    answers: dict[int, bytes | Exception] = {}
    deadline = time.monotonic() + time_limit
    while len(answers) < len(receivers):
        open_ranks = [rank for rank in range(len(receivers)) if rank not in answers]
        ready = wait([receivers[rank] for rank in open_ranks], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            if any(isinstance(answer, Exception) for answer in answers.values()):
                break
            raise RanksHung(f"ranks {open_ranks} of {len(receivers)} did not answer within {time_limit:g} s")
        for rank in open_ranks:
            if receivers[rank] in ready:
                answers[rank] = _read_answer(receivers[rank])
                if isinstance(answers[rank], Exception):
                    deadline = min(deadline, time.monotonic() + ERROR_GRACE_SECONDS)
    waiting = RankError("waiting", "was waiting for a rank that failed", "")
    return [answers.get(rank, waiting) for rank in range(len(receivers))]


def _read_answer(receiver: Connection) -> bytes | Exception:
    try:
        content = receiver.recv_bytes()
    except (EOFError, OSError):
        return RankError("died", "ended without an answer (killed, out of memory, or a crash in native code)", "")
    if content[:1] == b"\0":
        return content[1:]
    return RankError(*content[1:].decode().split("\0", 2))
