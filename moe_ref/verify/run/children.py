"""The harness's side of a child process: start, ask with a time limit, dump stacks and kill on a hang."""

import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

import msgspec
from safetensors import SafetensorError

from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.verify.child.messages import Hello, Progress, RankTensors, Reply, Request, unpack_runs, write_frame
from moe_ref.verify.run.last_words import cut_lines, describe_exit, innermost_frames
from moe_ref.verify.run.left_over import MARKER, end_left_over
from moe_ref.verify.run.log_tail import LogTail

START_LIMIT_SECONDS = 180.0
STACK_DUMP_SECONDS = 1.0
DETAIL_LINES = 3

_POLL_SECONDS = 0.5
"""How soon a child's death is seen where something that it has left behind holds its pipe."""

_HEADER_BYTES, _PAYLOAD_BYTES = 1 << 28, 1 << 42
"""More than any frame has."""

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
        self._log, self._mark = LogTail(), ""
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
        # One thread per process: oversubscribed BLAS threads are tens of times slower than none.
        # Huge pages: fp64 copies of whole experts otherwise spend most of their time in page faults.
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._log, self._mark = LogTail(), uuid.uuid4().hex
        # By NVML: torch's other way to look for devices begins CUDA, and process ranks could not be forked after it.
        environment = {"THP_MEM_ALLOC_ENABLE": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1", **os.environ, **threads,
                       MARKER: self._mark,
                       "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moe_ref.verify.child.worker", self.subject, str(self.memory_gib)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log.write_end, env=environment,
            start_new_session=True)
        self._log.started()
        header, _ = self._receive(time.monotonic() + START_LIMIT_SECONDS)
        with self._as_frame():
            return _HELLO.decode(header)

    def ask(self, request: Request, on_progress: Callable[[str], None] = lambda text: None) -> Answer:
        """Run one case; raises ChildDied or ChildHung. If the child itself failed, the next call starts a fresh one."""
        # One that died between two cases is no fault of the second.
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        request = msgspec.structs.replace(request, ticket=uuid.uuid4().hex)
        try:
            write_frame(cast(BinaryIO, self._process.stdin), request)
        except BrokenPipeError:
            self._raise_died()
        deadline = time.monotonic() + request.time_limit
        while True:
            header, payload = self._receive(deadline)
            with self._as_frame():
                message = _MESSAGE.decode(header)
                answer = self._answer(request, message, payload) if isinstance(message, Reply) else None
            if isinstance(message, Progress):
                on_progress(message.text)
            if answer is None:
                continue
            if answer.reply.left:
                self.close()
            # Process ranks that hang are ended by their child, which can say more about them, and stays.
            if answer.reply.ranks[0].kind == "hang":
                raise ChildHung(answer.reply.ranks[0].error)
            return answer

    def _answer(self, request: Request, reply: Reply, payload: bytes) -> Answer:
        """The reply with its tensors; raises ValueError if it is none to this request."""
        hung, size = reply.ranks[:1] and reply.ranks[0].kind == "hang", parse_case(request.case).parallel.size
        if reply.ticket != request.ticket:
            raise ValueError("it answers another request")
        if len(reply.ranks) != (1 if hung else size):
            raise ValueError(f"{len(reply.ranks)} ranks, but should be {size}")
        runs = unpack_runs(payload, len(reply.ranks))
        if not runs and not any(report.error for report in reply.ranks):
            raise ValueError("no tensors")
        return Answer(reply, runs)

    @contextmanager
    def _as_frame(self) -> Iterator[None]:
        """What does not decode was not written by our side of the child, and nothing after it can be trusted."""
        try:
            yield
        except (ValueError, LookupError, msgspec.MsgspecError, SafetensorError) as error:
            self.close()
            raise ChildDied(f"child wrote what is no answer into the pipe of the harness: {error}") from error

    def _receive(self, deadline: float) -> tuple[bytes, bytes]:
        lengths = self._read(16, deadline)
        header, payload = int.from_bytes(lengths[:8], "little"), int.from_bytes(lengths[8:], "little")
        with self._as_frame():
            if header > _HEADER_BYTES or payload > _PAYLOAD_BYTES:
                raise ValueError(f"a frame of {header} and {payload} bytes")
        return self._read(header, deadline), self._read(payload, deadline)

    def _read(self, count: int, deadline: float) -> bytes:
        """Exactly `count` bytes before the deadline, whatever a child does to its end of the pipe."""
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor, parts, missing = self._process.stdout.fileno(), [], count
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while missing:
                left, dead = deadline - time.monotonic(), self._process.poll() is not None
                if not selector.select(0.0 if dead else max(0.0, min(left, _POLL_SECONDS))):
                    if dead:
                        self._raise_died()
                    if left <= 0:
                        self._raise_hung()
                    continue
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
        text = self._log.text(ended=True)
        self.close()
        details = "\n".join(innermost_frames(text)[:DETAIL_LINES]) or cut_lines(text, DETAIL_LINES)
        raise ChildDied(f"child {how}\n{details}")

    def _raise_hung(self) -> NoReturn:
        assert self._process is not None
        stopped = _is_stopped(self._process.pid)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGUSR1)
        time.sleep(STACK_DUMP_SECONDS)
        text = self._log.text()
        self.close()
        nothing = "its process is stopped, as by SIGSTOP" if stopped else "no stack could be dumped"
        frames = "\n".join(innermost_frames(text)[:DETAIL_LINES]) or nothing
        raise ChildHung(f"no answer within the time limit\n{frames}")

    def close(self) -> None:
        """End the child, every rank it forked, and whatever else it has started."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            end_left_over(self._mark)
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with suppress(BrokenPipeError):
                        stream.close()
            self._process = None


def _is_stopped(process: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    return False


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
