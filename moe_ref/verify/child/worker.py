"""The child process: loads one subject, answers requests on its standard streams until they close.

Started as `python -m moe_ref.verify.child.worker SUBJECT`. Frames travel through descriptors of their own: whatever the
subject prints goes to standard error, and its standard input is empty.
"""

import faulthandler
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

import msgspec
import torch

from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.errors import UsageError
from moe_ref.verify.child.execute import execute, run_job
from moe_ref.verify.child.messages import Hello, Progress, Request, read_frame, write_frame
from moe_ref.verify.child.process_ranks import RankPool
from moe_ref.verify.child.rank_process import end_with
from moe_ref.verify.child.refuse_oracle import refuse_oracle
from moe_ref.verify.child.surroundings import Surroundings
from moe_ref.verify.run.subjects import load_subject, source_digest


class Teller:
    """Sends progress at most once a second, and only from this process: forked ranks stay silent."""

    def __init__(self, frames: BinaryIO) -> None:
        self.frames, self.process, self.last = frames, os.getpid(), time.monotonic()

    def __call__(self, text: str) -> None:
        if os.getpid() == self.process and time.monotonic() - self.last > 1.0:
            self.last = time.monotonic()
            write_frame(self.frames, Progress(text=text))


def _limit_memory(gibibytes: float) -> None:
    """Private memory of this process; device memory and shared mappings are not counted."""
    if gibibytes > 0:
        limit = int(gibibytes * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _frames() -> tuple[BinaryIO, BinaryIO]:
    """The pipes from and to the harness, moved out of the subject's way."""
    frames_in, frames_out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return frames_in, frames_out


def _prefer_to_die() -> None:
    """Where memory ends, the kernel should take the child and not the harness."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def main(name: str, memory_gib: float) -> None:
    end_with(os.getppid())
    frames_in, frames_out = _frames()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)
    _prefer_to_die()
    _limit_memory(memory_gib)
    if name.partition(":")[0].partition(".")[0] != "moe_ref":
        refuse_oracle()
    surroundings = Surroundings()
    try:
        subject = load_subject(name)
        declared = msgspec.json.encode(subject.CAPABILITIES)
        # Decoding checks every field's type, which a dataclass does not.
        msgspec.json.decode(declared, type=Capabilities)
        surroundings.keep_loaded()
    except UsageError as error:
        write_frame(frames_out, Hello(usage_error=str(error)))
        return
    except BaseException as error:
        why = str(error) or (f"limit {memory_gib:g} GiB" if isinstance(error, MemoryError) else "no message")
        text = " ".join(f"implementation {name!r} cannot be loaded: {type(error).__name__}: {why}".split())
        write_frame(frames_out, Hello(usage_error=text))
        return
    write_frame(frames_out, Hello(capabilities=declared.decode(), source_digest=source_digest(subject)))
    # Ranks are forked when a case first asks for them.
    pool = RankPool(partial(run_job, subject, surroundings=surroundings))
    while True:
        try:
            header, _ = read_frame(frames_in)
        except EOFError:
            pool.close()
            return
        request = msgspec.json.decode(header, type=Request)
        write_frame(frames_out, *execute(subject, request, Teller(frames_out), pool, surroundings))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
