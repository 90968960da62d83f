"""A process that has the heavy imports behind it and forks once per subject: `python -m moe_ref.score.lane`.

A fork costs a fiftieth of a start, so that a hundred mutants with a package each take minutes. Jobs come on standard
input; what a subject prints goes to standard error.
"""

import importlib
import os
import selectors
import signal
import sys
import time
from contextlib import suppress
from typing import BinaryIO

import msgspec
import torch

from moe_ref.contract.vocabulary import Verdict
from moe_ref.score.messages import CaseToTry, Done, Job, Trial
from moe_ref.score.trial import try_cases
from moe_ref.verify.child.messages import read_frame, write_frame
from moe_ref.verify.child.rank_process import end_with
from moe_ref.verify.run.last_words import describe_exit

_PRELOADED = ("triton", "triton.language", "triton.runtime.interpreter", "torch._dynamo", "torch.distributed")
_START_SECONDS = 120.0


def main() -> None:
    """Answer jobs until the input closes."""
    frames_out, frames_in = os.fdopen(os.dup(1), "wb"), sys.stdin.buffer
    os.dup2(2, 1)
    torch.set_num_threads(1)
    for name in _PRELOADED:
        with suppress(ImportError):
            importlib.import_module(name)
    while True:
        try:
            header, _ = read_frame(frames_in)
        except EOFError:
            return
        _serve(msgspec.json.decode(header, type=Job), frames_out)


def _serve(job: Job, frames_out: BinaryIO) -> None:
    """Fork for the job and pass on what comes; a fork that dies or hangs is a verdict on the case it was at."""
    read_end, write_end = os.pipe()
    lane = os.getpid()
    process = os.fork()
    if process == 0:
        end_with(lane)
        os.setsid()
        os.close(read_end)
        code = 1
        try:
            with os.fdopen(write_end, "wb") as stream:
                try_cases(job, lambda message: write_frame(stream, message))
            code = 0
        finally:
            os._exit(code)
    os.close(write_end)
    try:
        _relay(job, process, read_end, frames_out)
    finally:
        os.close(read_end)
        with suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(process, 0)


def _relay(job: Job, process: int, read_end: int, frames_out: BinaryIO) -> None:
    left: list[CaseToTry] = list(job.cases)
    deadline, buffer = time.monotonic() + _START_SECONDS + job.seconds, b""
    with selectors.DefaultSelector() as selector:
        selector.register(read_end, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return _lost(left, Verdict.HANG, f"no answer within {job.seconds:g} s", frames_out)
            part = os.read(read_end, 1 << 20)
            if not part:
                with suppress(ChildProcessError):
                    _, status = os.waitpid(process, 0)
                    return _lost(left, Verdict.CRASH, describe_exit(os.waitstatus_to_exitcode(status)), frames_out)
                return _lost(left, Verdict.CRASH, "the process ended", frames_out)
            buffer += part
            while len(buffer) >= 16 and len(buffer) >= 16 + int.from_bytes(buffer[:8], "little"):
                size = 16 + int.from_bytes(buffer[:8], "little")
                message = msgspec.json.decode(buffer[16:size], type=Trial | Done)
                buffer, deadline = buffer[size:], time.monotonic() + job.seconds
                write_frame(frames_out, message)
                if isinstance(message, Done):
                    return None
                left = left[1:]


def _lost(left: list[CaseToTry], verdict: Verdict, how: str, frames_out: BinaryIO) -> None:
    """The case in progress ended with the process; those behind it are asked for again by whoever wants them."""
    if left:
        write_frame(frames_out, Trial(case=left[0].case, verdict=verdict, message=how))
    write_frame(frames_out, Done())


if __name__ == "__main__":
    main()
