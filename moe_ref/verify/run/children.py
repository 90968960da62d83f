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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO, NoReturn, cast

import msgspec

from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.errors import UsageValueError
from moe_ref.verify.child.messages import Hello, Progress, RankTensors, Reply, Request, unpack_runs, write_frame
from moe_ref.verify.run.last_words import cut_lines, describe_exit, innermost_frames

START_LIMIT_SECONDS = 180.0
STACK_DUMP_SECONDS = 1.0
LOG_TAIL = 100_000
DETAIL_LINES = 3

# Made once, before lanes have threads: msgspec must not learn a type from two of them at once.
_HELLO, _MESSAGE = msgspec.json.Decoder(Hello), msgspec.json.Decoder(Reply | Progress)


class ChildDied(RuntimeError):
    """The child ended without an answer; the message holds the end of its output."""


class ChildHung(RuntimeError):
    """No answer in time; the message holds the stacks of the child's threads, or of its ranks and their collectives."""


@dataclass(frozen=True)
class Answer:
    """A reply and the tensors that came with it, by run and rank; runs with the same bits are sent once."""

    reply: Reply
    runs: list[list[RankTensors]]


class Child:
    """One child that holds a subject; started when first used, started again after a failure."""

    def __init__(self, subject: str, memory_gib: float = 0.0) -> None:
        self.subject, self.memory_gib = subject, memory_gib
        self._process: subprocess.Popen[bytes] | None = None
        self._log: BinaryIO | None = None
        self.source_digest = ""

    def capabilities(self) -> Capabilities:
        """Start the child; raises UsageValueError when the subject cannot be loaded or declares nonsense."""
        try:
            hello = self._start()
        except (ChildDied, ChildHung) as error:
            how, *words = str(error).rstrip().splitlines()
            last = f"; its last words: {words[-1]}" if words else ""
            raise UsageValueError(f"implementation {self.subject!r} cannot be loaded: {how}{last}") from error
        if hello.usage_error:
            self.close()
            raise UsageValueError(hello.usage_error)
        self.source_digest = hello.source_digest
        return msgspec.json.decode(hello.capabilities, type=Capabilities)

    def _start(self) -> Hello:
        self.close()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        # One thread per process: oversubscribed BLAS threads are tens of times slower than none.
        # Huge pages: fp64 copies of whole experts otherwise spend most of their time in page faults.
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment = {"THP_MEM_ALLOC_ENABLE": "1", **os.environ, **threads,
                       "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moe_ref.verify.child.worker", self.subject, str(self.memory_gib)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment, start_new_session=True)
        return _HELLO.decode(self._receive(time.monotonic() + START_LIMIT_SECONDS)[0])

    def ask(self, request: Request, on_progress: Callable[[str], None] = lambda text: None) -> Answer:
        """Run one case; raises ChildDied or ChildHung. If the child itself failed, the next call starts a fresh one."""
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            write_frame(cast(BinaryIO, self._process.stdin), request)
        except BrokenPipeError:
            self._raise_died()
        deadline = time.monotonic() + request.time_limit
        while True:
            header, payload = self._receive(deadline)
            message = _MESSAGE.decode(header)
            if isinstance(message, Reply):
                # Process ranks that hang are ended by their child, which can say more about them, and stays.
                if message.ranks[0].kind == "hang":
                    raise ChildHung(message.ranks[0].error)
                return Answer(message, unpack_runs(payload, len(message.ranks)))
            on_progress(message.text)

    def _receive(self, deadline: float) -> tuple[bytes, bytes]:
        lengths = self._read(16, deadline)
        return (self._read(int.from_bytes(lengths[:8], "little"), deadline),
                self._read(int.from_bytes(lengths[8:], "little"), deadline))

    def _read(self, count: int, deadline: float) -> bytes:
        """Exactly `count` bytes before the deadline, whatever a child does to its end of the pipe."""
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor, parts, missing = self._process.stdout.fileno(), [], count
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while missing:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self._raise_hung()
                part = os.read(descriptor, min(missing, 1 << 20))
                if not part:
                    self._raise_died()
                parts.append(part)
                missing -= len(part)
        return b"".join(parts)

    def _raise_died(self) -> NoReturn:
        assert self._process is not None
        try:
            how = describe_exit(self._process.wait(timeout=STACK_DUMP_SECONDS))
        except subprocess.TimeoutExpired:
            how = "closed its pipe without ending"
        text = self._log_text()
        self.close()
        details = "\n".join(innermost_frames(text)[:DETAIL_LINES]) or cut_lines(text, DETAIL_LINES)
        raise ChildDied(f"child {how}\n{details}")

    def _raise_hung(self) -> NoReturn:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGUSR1)
        time.sleep(STACK_DUMP_SECONDS)
        text = self._log_text()
        self.close()
        frames = "\n".join(innermost_frames(text)[:DETAIL_LINES]) or "no stack could be dumped"
        raise ChildHung(f"no answer within the time limit\n{frames}")

    def _log_text(self) -> str:
        assert self._log is not None
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - LOG_TAIL))
        return self._log.read().decode(errors="replace")

    def close(self) -> None:
        """End the child and every rank it forked."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with suppress(BrokenPipeError):
                        stream.close()
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
