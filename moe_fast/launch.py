"""One way to start a kernel: compiled on a GPU, interpreted on CPU tensors, recorded on meta tensors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import triton

from moe_fast.interpreter import interpret
from moe_ref.contract.errors import UsageTypeError

Recorder = Callable[[triton.JITFunction, dict[str, object]], None]

_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def launch(kernel: triton.JITFunction, grid: tuple[int, ...], device: torch.device, **arguments: object) -> None:
    """Run `kernel` over `grid` on tensors of `device`; an empty grid does nothing.

    num_warps and num_stages among the arguments steer the compiler and mean nothing to the interpreter. Raises
    UsageTypeError on meta tensors outside of `recording`.
    """
    if 0 in grid:
        return
    if device.type == "cpu":
        interpret(kernel, grid, arguments)
    elif device.type == "meta":
        _record(kernel, arguments)
    else:
        # Triton starts kernels on the current device, whatever device its arguments are on.
        with torch.cuda.device(device):
            kernel[grid](**arguments)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Within it, what would start on meta tensors is handed to `recorder`: the kernel and its arguments."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def _record(kernel: triton.JITFunction, arguments: dict[str, object]) -> None:
    recorder = _recorder.get()
    if recorder is None:
        raise UsageTypeError(f"kernel {kernel.fn.__name__}: tensors on meta, but should be on cpu or cuda [moe_fast]")
    recorder(kernel, arguments)
