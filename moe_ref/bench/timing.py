"""Clocks, and the interleaved repetition of calls that are to be compared.

On CUDA a call is timed between two events on a stream of its own, after a write that empties the L2 cache and hides the
start of the call from the host. What can be captured is replayed as a CUDA graph, anything else is started by the host,
whose time it then may show; a record says which. Subjects take turns, so that a clock that drifts hits all alike.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Call = Callable[[], object]

LEAST_ROUNDS, MOST_ROUNDS = {"cpu": 2, "cuda": 5}, 200
"""An interpreted kernel is slow, and its time means nothing."""
_FLUSHED_BYTES = 2**28
"""More than twice the L2 cache of any device so far."""
_WARM_CALLS, _WARM_SECONDS = 3, 0.2


@dataclass(frozen=True)
class Spread:
    """Median and quartiles in seconds, and of how many repetitions."""

    median: float
    low: float
    high: float
    repetitions: int


@dataclass(frozen=True)
class Prepared:
    """What is timed in place of a call, with its results; mode: "graph" or "eager", and why not a graph."""

    call: Call
    mode: str
    reason: str = ""


class HostClock:
    """The host's own clock; a CPU run shows that all is in place, and its times are evidence of nothing."""

    device = "cpu"

    @contextmanager
    def running(self) -> Iterator[None]:
        """Nothing is to be set up."""
        yield

    def prepare(self, call: Call) -> Prepared:
        """The call itself, after one that loads and compiles."""
        call()
        return Prepared(call, "eager", "a CPU has no graphs")

    def seconds(self, call: Call) -> float:
        """Of one call."""
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    def flush(self) -> None:
        """Caches stay as they are."""

    def finish(self) -> None:
        """A call has ended when it returns."""


class CudaClock:
    """CUDA events on a stream of its own; everything that is timed together must be prepared and run in `running`."""

    device = "cuda"

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=self.device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Makes the clock's stream the current one: a backward pass runs on the stream of its forward pass."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def prepare(self, call: Call) -> Prepared:
        """A graph where the call can be captured, after calls that load, compile and allocate."""
        for _ in range(_WARM_CALLS):
            call()
        self.finish()
        if waits := _waits_for_device(call):
            return Prepared(call, "eager", waits)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                kept = call()
        except RuntimeError as error:
            self.finish()
            return Prepared(call, "eager", str(error).partition("\n")[0])

        def replay() -> object:
            graph.replay()
            return kept
        return Prepared(replay, "graph")

    def seconds(self, call: Call) -> float:
        """Of one call, between events, with a cold L2 cache."""
        self.flush()
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3

    def flush(self) -> None:
        """Write more than the L2 cache holds."""
        self._flushed.zero_()

    def finish(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize()


def clock_of(device: str) -> HostClock | CudaClock:
    """The clock of "cpu" or "cuda"."""
    return CudaClock() if device == "cuda" else HostClock()


def _waits_for_device(call: Call) -> str:
    """Why the call cannot be captured, asked before a capture fails and leaves torch's generators in disorder."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not see everything, which a failed capture makes up for
        torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return f"waits for the device: {str(error).partition(chr(10))[0]}"
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return ""


def interleaved(calls: Mapping[str, Call], clock: HostClock | CudaClock, budget: float) -> dict[str, Spread]:
    """Each call's spread over rounds in which every call runs once, each round starting with another.

    budget: seconds for all of them; LEAST_ROUNDS are run whatever they take, and on CUDA clocks are driven up first.
    """
    names, taken = list(calls), {name: list[float]() for name in calls}
    began = time.perf_counter()
    while names and clock.device == "cuda" and time.perf_counter() - began < _WARM_SECONDS:
        for name in names:
            clock.seconds(calls[name])
    began, rounds, least = time.perf_counter(), 0, LEAST_ROUNDS[clock.device]
    while names and rounds < MOST_ROUNDS and (rounds < least or time.perf_counter() - began < budget):
        for place in range(len(names)):
            name = names[(place + rounds) % len(names)]
            taken[name].append(clock.seconds(calls[name]))
        rounds += 1
    return {name: _spread(times) for name, times in taken.items()}


def _spread(times: list[float]) -> Spread:
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return Spread(statistics.median(times), low, high, len(times))
