"""Many combinations compiled in processes of their own: a compiler that dies is one result, not the end of the run."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moe_fast.compile.combinations import Combination
from moe_fast.compile.resources import Resources

TIME_LIMIT = 180.0
"""Seconds for one combination; the longest seen takes five."""

Observe = Callable[[Combination, Resources], None]


def compile_all(combinations: Sequence[Combination], lanes: int,
                observe: Observe = lambda combination, found: None) -> list[Resources]:
    """Resources of each combination, in order; `observe` is called, one at a time, as each is known.

    Nothing is kept in Triton's cache, and no line numbers are compiled in, so that paths and comments change nothing.
    """
    found: dict[int, Resources] = {}
    todo, lock = iter(enumerate(combinations)), threading.Lock()

    def work(cache: str) -> None:
        with _Lane(cache) as lane:
            while (job := _next(todo, lock)) is not None:
                index, combination = job
                resources = lane.compile(combination)
                with lock:
                    found[index] = resources
                    observe(combination, resources)

    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(lanes) as pool:
        for done in [pool.submit(work, cache) for _ in range(min(lanes, len(combinations)))]:
            done.result()
    return [found[index] for index in range(len(combinations))]


def _next(todo: Iterator[tuple[int, Combination]], lock: threading.Lock) -> tuple[int, Combination] | None:
    with lock:
        return next(todo, None)


class _Lane:
    """One worker process, started when it is needed and again after it died."""

    def __init__(self, cache: str) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed in __exit__
        self._environment = _environment(cache)

    def __enter__(self) -> "_Lane":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._log.close()

    def compile(self, combination: Combination) -> Resources:
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(TIME_LIMIT, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(combination.document) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            timer.cancel()
        if answer:
            document = json.loads(answer)
            lists = {name: tuple(value) for name, value in document.items() if isinstance(value, list)}
            return Resources(**document | lists)
        self._end()
        return Resources(error=f"the compiler's process ended with code {process.returncode}: {self._last_words()}")

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = None

    def _start(self) -> "subprocess.Popen[str]":
        self._log.truncate(0)
        return subprocess.Popen([sys.executable, "-m", "moe_fast.compile.worker"], stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=self._log, text=True, env=self._environment)

    def _last_words(self) -> str:
        self._log.seek(0)
        return " ".join(self._log.read().split())[-300:] or "nothing printed"


def _environment(cache: str) -> dict[str, str]:
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "LLVM_", "MLIR_"))}
    return kept | {"PYTHONPATH": path, "TRITON_CACHE_DIR": cache, "TRITON_DISABLE_LINE_INFO": "1",
                   "OMP_NUM_THREADS": "1"}
