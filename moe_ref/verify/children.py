"""The harness's side of a child process: start, ask with a time limit, dump stacks and kill on a hang."""

import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import msgspec

from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.errors import UsageValueError
from moe_ref.verify.child.messages import Hello, Progress, RankTensors, Reply, Request, read_frame, unpack_tensors, write_frame

START_LIMIT_SECONDS = 180.0
STACK_DUMP_SECONDS = 1.0
LOG_TAIL = 3000


class ChildDied(RuntimeError):
    """The child ended without an answer; the message holds the end of its output."""


class ChildHung(RuntimeError):
    """The child did not answer in time; the message holds the stacks of all its threads and ranks."""


@dataclass(frozen=True)
class Answer:
    """A reply and the tensors that came with it."""

    reply: Reply
    ranks: list[RankTensors]


class Child:
    """One child that holds a subject; started when first used, started again after a failure."""

    def __init__(self, subject: str, memory_gib: float = 0.0) -> None:
        self.subject, self.memory_gib = subject, memory_gib
        self._process: subprocess.Popen[bytes] | None = None
        self._log: BinaryIO | None = None
        self.source_digest = ""

    def capabilities(self) -> Capabilities:
        """Start the child if need be; raises UsageValueError when the subject cannot be loaded."""
        self.close()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        # One thread per process: oversubscribed BLAS threads are tens of times slower than none.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
                       "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moe_ref.verify.child.worker", self.subject, str(self.memory_gib)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment, start_new_session=True)
        hello = msgspec.json.decode(self._receive(time.monotonic() + START_LIMIT_SECONDS)[0], type=Hello)
        if not hello.capabilities:
            self.close()
            raise UsageValueError(hello.usage_error)
        self.source_digest = hello.source_digest
        return msgspec.json.decode(hello.capabilities, type=Capabilities)

    def ask(self, request: Request, on_progress: Callable[[str], None] = lambda text: None) -> Answer:
        """Run one case; raises ChildDied or ChildHung, after which the next call starts a fresh child."""
        if self._process is None:
            self.capabilities()
        assert self._process is not None and self._process.stdin is not None
        try:
            write_frame(self._process.stdin, request)
        except BrokenPipeError:
            self._raise_died()
        deadline = time.monotonic() + request.time_limit
        while True:
            header, payload = self._receive(deadline)
            message = msgspec.json.decode(header, type=Reply | Progress)
            if isinstance(message, Reply):
                return Answer(message, unpack_tensors(payload, len(message.ranks)))
            on_progress(message.text)

    def _receive(self, deadline: float) -> tuple[bytes, bytes]:
        assert self._process is not None and self._process.stdout is not None
        stream = self._process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            if not selector.select(max(0.0, deadline - time.monotonic())):
                self._raise_hung()
        try:
            return read_frame(stream)
        except EOFError:
            self._raise_died()
        raise AssertionError("unreachable")

    def _raise_died(self) -> None:
        assert self._process is not None
        code = self._process.wait()
        text = self._log_tail()
        self.close()
        raise ChildDied(f"child ended with code {code}\n{text}")

    def _raise_hung(self) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGUSR1)
        time.sleep(STACK_DUMP_SECONDS)
        text = self._log_tail()
        self.close()
        raise ChildHung(f"no answer within the time limit\n{text}")

    def _log_tail(self) -> str:
        assert self._log is not None
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-LOG_TAIL:]

    def close(self) -> None:
        """End the child and every rank it forked."""
        if self._process is not None:
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.wait()
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None


class ChildPool:
    """Children kept between cases, lent to one thread at a time.

    Process ranks are forked from children of their own, which never run a device themselves.
    """

    def __init__(self, subject: str, memory_gib: float = 0.0) -> None:
        self.subject, self.memory_gib = subject, memory_gib
        self._lock = threading.Lock()
        self._idle: dict[bool, list[Child]] = {False: [], True: []}
        self._all: list[Child] = []

    def adopt(self, child: Child) -> None:
        """Take over a started child, for virtual ranks."""
        self._all.append(child)
        self._idle[False].append(child)

    @contextmanager
    def lease(self, process_ranks: bool) -> Iterator[Child]:
        """A child for one case."""
        with self._lock:
            idle = self._idle[process_ranks]
            child = idle.pop() if idle else Child(self.subject, self.memory_gib)
            if child not in self._all:
                self._all.append(child)
        try:
            yield child
        finally:
            with self._lock:
                self._idle[process_ranks].append(child)

    def close(self) -> None:
        """End all children."""
        for child in self._all:
            child.close()
