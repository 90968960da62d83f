"""Triton kernels of other packages on CPU tensors, through the interpreter of moe_fast.

The one module of moe_ref that imports moe_fast, and of it the interpreter alone, which is a tool and no implementation:
Triton's own computes bf16 on bit patterns, and is switched on for a whole process before its kernels are imported.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner, Heuristics
from triton.runtime.jit import JITFunction

from moe_fast.interpreter import interpret
from moe_ref.contract.errors import UsageTypeError

Kernel = JITFunction | Autotuner | Heuristics


def interpret_on_cpu(*modules: ModuleType) -> None:
    """From now on `kernel[grid](...)` of every kernel among the attributes of `modules` is interpreted on CPU tensors.

    On other tensors it is what it was. Of a kernel with several configurations the first is taken, nothing is measured
    and no hook of the tuner runs. Checks of bounds, races and overflow are on.
    """
    for module in modules:
        for value in list(vars(module).values()):
            if isinstance(value, Kernel) and "run" not in vars(value):
                # An attribute of the object: the kernel stays what other kernels call, and no class is changed.
                vars(value)["run"] = partial(_run, value, value.run)


def _run(kernel: Kernel, compiled: Callable, *args: object, grid: object, warmup: bool = False,
         **kwargs: object) -> object:
    if not any(isinstance(value, torch.Tensor) and value.device.type == "cpu" for value in (*args, *kwargs.values())):
        return compiled(*args, grid=grid, warmup=warmup, **kwargs)
    return _interpret(kernel, grid, args, kwargs)


def _interpret(kernel: object, grid: Any, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
    if isinstance(kernel, Autotuner):
        return _interpret(kernel.fn, grid, args, {**kwargs, **kernel.configs[0].all_kwargs()})
    if isinstance(kernel, Heuristics):
        given = dict(kwargs)
        for name, value_of in kernel.values.items():
            given[name] = value_of({**dict(zip(kernel.arg_names, args, strict=False)), **given})
        return _interpret(kernel.fn, grid, args, given)
    if not isinstance(kernel, JITFunction):
        raise UsageTypeError(f"kernel: {type(kernel).__name__}, but should be a triton.JITFunction, or one with "
                             "autotune or heuristics; the environment variable TRITON_INTERPRET should be unset")
    named = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    bound = kernel.signature.bind(*args, **named)
    bound.apply_defaults()
    options = {name: value for name, value in kwargs.items() if name not in named}
    sizes = grid(bound.arguments) if callable(grid) else grid
    return interpret(kernel, tuple(int(size) for size in sizes), {**bound.arguments, **options})


@triton.jit
def round_away(x):
    """libdevice.round of fp32, which the interpreter lacks: to nearest, halves away from zero."""
    magnitude = tl.abs(x)
    whole = tl.floor(magnitude)
    whole += (magnitude - whole >= 0.5).to(tl.float32)
    return tl.where(x < 0, -whole, whole)


@triton.jit
def round_int8(x):
    """The same, as int8."""
    return round_away(x).to(tl.int8)


class _Driver:
    """Answers what libraries ask of a driver before any kernel starts; there is no device behind it."""

    def get_current_target(self) -> GPUTarget:
        """The oldest GPU that these libraries write kernels for."""
        return GPUTarget("cuda", 80, 32)


@contextmanager
def target_without_device() -> Iterator[None]:
    """Inside the block Triton's active driver names a target where there is no GPU to name one; nothing where there is.

    For libraries that ask whether they run on AMD or NVIDIA hardware in functions that are otherwise plain torch.
    """
    if torch.cuda.is_available():
        yield
        return
    before = driver._active
    driver.set_active(_Driver())  # type: ignore[bad-argument-type]
    try:
        yield
    finally:
        driver._active = before  # reset_active() makes the default driver first, and there is none
