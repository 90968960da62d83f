"""Lane processes of a scoring run, and one job on them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

import msgspec

from moe_ref.score.messages import Done, Job, Trial
from moe_ref.verify.child.messages import read_frame, write_frame

_MESSAGE = msgspec.json.Decoder(Trial | Done)


class Lane:
    """One process that serves jobs; used by one thread at a time."""

    def __init__(self) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moe_ref.score.lane"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # By NVML: torch's other way to look for devices begins CUDA, after which a lane could not fork.
            env={"THP_MEM_ALLOC_ENABLE": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1", **os.environ, **threads,
                 "PYTHONPATH": path})

    def run(self, job: Job) -> tuple[list[Trial], str]:
        """Trials in order, and why the job could not begin, "" where it could."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        write_frame(cast(BinaryIO, self._process.stdin), job)
        trials = []
        while True:
            message = _MESSAGE.decode(read_frame(cast(BinaryIO, self._process.stdout))[0])
            if isinstance(message, Done):
                return trials, message.failed
            trials.append(message)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


@contextmanager
def lanes(count: int) -> Iterator[list[Lane]]:
    """`count` lanes, which end with the block."""
    started = [Lane() for _ in range(count)]
    try:
        yield started
    finally:
        for lane in started:
            lane.close()
