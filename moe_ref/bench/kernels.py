"""Where the time of one call goes, by torch's profiler: kernels on CUDA, operators on a CPU.

A kernel's part is that of the range that it runs in, `part_range`, or of its name, PART_kernel.
"""

import os
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from moe_ref.bench.timing import Call, CudaClock, HostClock

PARTS = ("router", "align", "gate_up", "down", "combine", "shared")
_CALL, _CALLS = "moe_ref.bench call", {"cpu": 1, "cuda": 3}

# torch's profiler writes two lines to standard error whenever it is used, at every level but one beyond all.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@dataclass(frozen=True)
class Kernel:
    """Seconds and starts in one call, both averages over a few; part: "" where nothing says which."""

    name: str
    part: str
    starts: float
    seconds: float


def part_range(part: str) -> AbstractContextManager[object]:
    """A range that names a part of a layer to the profiler, and costs nothing where none is at work."""
    return record_function(part) if torch.autograd._profiler_enabled() else nullcontext()


def profiled(call: Call, clock: HostClock | CudaClock) -> list[Kernel]:
    """The kernels of a call, started by the host with a cold cache, the longest first."""
    calls = _CALLS[clock.device]
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (clock.device == "cuda")
    # acc_events changes nothing here; without it torch 2.11 warns (pytorch/pytorch #180348). Delete with torch 2.11.
    with profile(activities=activities, acc_events=True) as found:
        for _ in range(calls):
            clock.flush()
            with record_function(_CALL):
                call()
        clock.finish()
    starts, seconds = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for event in found.events() or ():
        if event.name == _CALL and event.device_type == torch.autograd.DeviceType.CPU:
            _collect(event, "", clock.device == "cuda", starts, seconds)
    kernels = [Kernel(name, part, starts[name, part] / calls, microseconds / 1e6 / calls)
               for (name, part), microseconds in seconds.items()]
    return sorted(kernels, key=lambda one: one.seconds, reverse=True)


def _collect(event: Any, part: str, on_device: bool, starts: Counter[tuple[str, str]],
             seconds: Counter[tuple[str, str]]) -> None:
    """Add what this event and those within it took."""
    part = event.name if event.name in PARTS else part
    # The profiler lists a kernel with the operator that started it, and on a device ranges beside them.
    own = [(kernel.name, kernel.duration) for kernel in event.kernels] if on_device else [
        (event.name, event.self_cpu_time_total)]
    for name, duration in ((name, duration) for name, duration in own if name not in (_CALL, *PARTS)):
        key = (name, part or part_of(name))
        starts[key] += 1
        seconds[key] += duration
    for child in event.cpu_children:
        _collect(child, part, on_device, starts, seconds)


def part_of(name: str) -> str:
    """The part that a kernel's name says it is, or ""."""
    return next((part for part in PARTS if name.startswith(f"{part}_kernel")), "")
