"""Implementations that do something to their process, to the harness inside it, or to the machine around it."""

import atexit
import builtins
import ctypes
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

import moe_ref

PRINTED_BYTES = 180 << 20
"""By each of three ranks in each of two runs: a gigabyte."""

_LONG = 3600


def _replace_functions() -> None:
    """Of torch, of the standard library and of what encodes answers, none of which the layer itself needs."""
    replaced: Any = {"equal": lambda *_: True, "matmul": None, "manual_seed": print, "arange": torch.zeros}
    for name, value in replaced.items():
        setattr(torch, name, value)
    torch.Tensor.contiguous = torch.Tensor.flatten = lambda self: torch.zeros(1)  # type: ignore[method-assign]
    msgspec.json.encode = lambda *_: b"nothing"
    os.getpid = lambda: 1
    time.monotonic = lambda: 0.0
    setattr(builtins, "sorted", lambda *_, **__: [])  # noqa: B010 - typed as what it is


def _change_defaults() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(3)
    torch.use_deterministic_algorithms(True)
    gone = tempfile.mkdtemp()
    os.chdir(gone)
    shutil.rmtree(gone)


def _replace_guard() -> None:
    sys.modules["moe_ref.verify.child.guard"].fingerprint = lambda tensor: (0, 0)  # type: ignore[attr-defined]


def _replace_trace() -> None:
    moe_ref.Trace.record = lambda *_: None  # type: ignore[method-assign]


def _import_past_the_finders() -> None:
    folder = Path(moe_ref.__file__).parent / "oracle"
    spec: Any = importlib.util.spec_from_file_location("innocent", folder / "rows.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def _read_the_judge() -> None:
    Path(os.path.relpath(Path(moe_ref.__file__).parent / "verify" / "judge.py")).read_bytes()


def _close_streams() -> None:
    os.closerange(0, 3)


def _pipes() -> list[int]:
    """Descriptors of pipes that can be written to, other than those of what is printed."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            is_pipe = os.readlink(f"/proc/self/fd/{name}").startswith("pipe:")
            writable = os.readlink(f"/proc/self/fd/{name}") != os.readlink("/proc/self/fd/2")
            if is_pipe and writable and int(name) > 2:
                os.write(int(name), b"")
                found.append(int(name))
        except OSError:
            continue
    return found


def _write_garbage_frames() -> None:
    for pipe in _pipes():
        os.write(pipe, b"not a frame at all, but longer than two lengths")


def _forge_an_answer() -> None:
    text = json.dumps({"type": "Reply", "ranks": [{}, {}, {}], "runs": 2, "same_bits": True}).encode()
    for pipe in _pipes():
        os.write(pipe, len(text).to_bytes(8, "little") + bytes(8) + text)


def _close_pipes() -> None:
    os.closerange(3, 256)


def _read_requests() -> None:
    assert sys.stdin.read() == ""
    assert os.read(0, 100) == b""


def _ignore_signals_and_sleep() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        # Python's own way is the main thread's.
        ctypes.CDLL(None).signal(int(number), 1)
    time.sleep(_LONG)


def _sleep_with_the_interpreter_locked() -> None:
    ctypes.PyDLL(None).sleep(_LONG)


def _start_threads() -> None:
    def work() -> None:
        while True:
            time.sleep(0.01)
    for daemon in (True, False):
        threading.Thread(target=work, daemon=daemon).start()


def _leave_a_process() -> None:
    if os.fork() == 0:
        os.setsid()
        time.sleep(_LONG)


def _leave_a_program() -> None:
    subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({_LONG})"], start_new_session=True)


def _leave_a_process_and_die() -> None:
    _leave_a_process()
    os.kill(os.getpid(), signal.SIGKILL)


def _come_back_twice() -> None:
    os.fork()


def _print_without_end() -> None:
    block = b"gigabyte " * (1 << 17)
    for _ in range(PRINTED_BYTES // len(block)):
        os.write(2, block)


def _hang_at_the_end() -> None:
    atexit.register(time.sleep, _LONG)


def _spoil_the_record() -> None:
    """Cut and remove what the harness has open under that name: it runs with the same rights."""
    for link in Path(f"/proc/{os.getppid()}/fd").iterdir():
        path = Path(os.readlink(link))
        if path.name == "records.jsonl" and path.exists():
            os.truncate(path, 10)
            path.unlink()


def _recurse() -> None:
    _recurse()


class _Silent(Exception):
    """Cannot be printed, pickled or compared."""

    def __str__(self) -> str:
        raise ValueError("no")

    def __reduce__(self) -> str:
        raise TypeError("no")


def _raises(error: Callable[[], BaseException]) -> Callable[[], None]:
    def behave() -> None:
        raise error()
    return behave


def _kills_itself(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


PROCESSES: Mapping[str, Callable[[], None]] = {
    "replaces_functions": _replace_functions,
    "changes_defaults": _change_defaults,
    "replaces_the_guard": _replace_guard,
    "replaces_the_trace": _replace_trace,
    "imports_past_the_finders": _import_past_the_finders,
    "reads_the_judge": _read_the_judge,
    "closes_streams": _close_streams,
    "writes_garbage_frames": _write_garbage_frames,
    "forges_an_answer": _forge_an_answer,
    "closes_pipes": _close_pipes,
    "reads_requests": _read_requests,
    "starts_threads": _start_threads,
    "leaves_a_process": _leave_a_process,
    "leaves_a_program": _leave_a_program,
    "leaves_a_process_and_dies": _leave_a_process_and_die,
    "comes_back_twice": _come_back_twice,
    "prints_without_end": _print_without_end,
    "hangs_at_its_end": _hang_at_the_end,
    "spoils_the_record": _spoil_the_record,
    "recurses": _recurse,
    "raises_what_cannot_be_said": _raises(_Silent),
    "raises_a_long_message": _raises(lambda: ValueError("long " * 20_000_000)),
    "raises_what_cannot_be_written": _raises(lambda: ValueError("half a pair \ud800")),
    "raises_interrupt": _raises(KeyboardInterrupt),
    "raises_group": _raises(lambda: BaseExceptionGroup("two", [SystemExit(3), GeneratorExit()])),
    "aborts": os.abort,
    "takes_a_nameless_signal": _kills_itself(signal.SIGRTMIN + 5),
    "ignores_signals_and_sleeps": _ignore_signals_and_sleep,
    "locks_the_interpreter": _sleep_with_the_interpreter_locked,
    "stops_itself": _kills_itself(signal.SIGSTOP),
}
