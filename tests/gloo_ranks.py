"""Real gloo ranks for tests: forked, since a fork imports nothing again, and ended after a time limit."""

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch


def run_gloo_ranks(size: int, body: Callable[[int], Any], time_limit: float = 60.0) -> list[Any]:
    """body(rank) on `size` forked gloo ranks; its results by rank, which must be plain data.

    Raises AssertionError with the traceback of the first rank that failed, or if one does not answer in time.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = [], []
        for rank in range(size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_main, args=(rank, size, f"{folder}/store", time_limit, sender, body),
                                      daemon=True)
            process.start()
            sender.close()
            ends.append(receiver)
            processes.append(process)
        try:
            return _collect(ends, time_limit)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(ends: list[Connection], time_limit: float) -> list[Any]:
    answers: dict[int, Any] = {}
    deadline = time.monotonic() + time_limit
    while len(answers) < len(ends):
        waiting = {end: rank for rank, end in enumerate(ends) if rank not in answers}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {list(waiting.values())} of {len(ends)} did not answer within {time_limit:g} s"
        for end in ready:
            assert isinstance(end, Connection)
            rank = waiting[end]
            try:
                worked, answers[rank] = end.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} ended without an answer") from None
            assert worked, f"rank {rank}: {answers[rank]}"
    return [answers[rank] for rank in range(len(ends))]


def _main(rank: int, size: int, store: str, time_limit: float, sender: Connection, body: Callable[[int], Any]) -> None:
    try:
        torch.set_num_threads(1)  # before anything else: a fork of a process that used several threads hangs
        torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(store, size), rank=rank,
                                             world_size=size, timeout=timedelta(seconds=time_limit))
        result = body(rank)
        # A rank that ends while others still use its connections would break theirs.
        torch.distributed.barrier()
        sender.send((True, result))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    finally:
        sender.close()
