"""One launch: the kernel's grid, program by program, on CPU tensors."""

import itertools
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache

import numpy as np
import triton.language as tl
from triton.runtime.jit import JITFunction

from moe_fast.interpreter import hints, reductions
from moe_fast.interpreter.arguments import ArgumentBinder
from moe_fast.interpreter.arithmetic import CorrectedBuilder
from moe_fast.interpreter.checks import Checks, active_checks
from moe_fast.interpreter.memory import Memory
from moe_fast.interpreter.rewrite import rewritten
from moe_fast.interpreter.scope import Change, language_changes, swapped
from moe_fast.interpreter.selftest import check_numerics
from moe_fast.interpreter.semantic import CheckedSemantic
from moe_ref.contract.errors import UsageTypeError, raise_faults

# triton.language, the interpreter's builder and its grid position are process-global
_LOCK = threading.RLock()
_BUILDER = CorrectedBuilder()
_SEMANTIC = CheckedSemantic(_BUILDER)


def interpret(kernel: JITFunction, grid: tuple[int, ...], arguments: dict[str, object]) -> None:
    """Run `kernel` for every program of `grid` (up to three axes, zero programs allowed) on CPU tensors, in
    place.

    Launch options (num_warps, num_stages ...) among `arguments` are dropped. One launch runs at a time in a
    process. Raises UsageTypeError / UsageValueError for wrong arguments, OutOfBoundsError, StoreRaceError,
    IntegerOverflowError or DeviceAssertError for what the checks find (see `checking`), and whatever the
    kernel itself raises.
    """
    _check_call(kernel, grid, arguments)
    with _LOCK:
        check_numerics(_BUILDER)
        checks = active_checks()
        memory = Memory(kernel.fn.__name__, checks.races) if checks.bounds else None
        with _launch_state(kernel, grid, memory, checks), np.errstate(all="ignore"):
            address = memory.address if memory is not None else (lambda name, tensor: tensor.data_ptr())
            values = ArgumentBinder(_SEMANTIC, address).bind(kernel, arguments)
            if 0 not in grid:
                _run_programs(rewritten(kernel, _as_tensor), values, grid, memory)


def _run_programs(function: Callable, values: list[object], grid: tuple[int, ...],
                  memory: Memory | None) -> None:
    sizes = (*grid, 1, 1)[:3]
    for z, y, x in itertools.product(*(range(size) for size in reversed(sizes))):
        _BUILDER.grid_idx = (x, y, z)
        if memory is not None:
            memory.program = (x, y, z)
        try:
            function(*values)
        except Exception as error:
            error.add_note(f"while interpreting kernel {function.__name__}, program {(x, y, z)}")
            raise


class _State:
    depth = 0


@contextmanager
def _launch_state(kernel: JITFunction, grid: tuple[int, ...], memory: Memory | None, checks: Checks):
    """Language and builder set up for one launch and put back after it; the outermost launch swaps."""
    attributes = {"memory": memory, "kernel": kernel.fn.__name__, "grid_dim": (*grid, 1, 1)[:3],
                  "grid_idx": (0, 0, 0), "options": replace(_BUILDER.options, debug=checks.overflow,
                                                            sanitize_overflow=checks.overflow)}
    before = {name: getattr(_BUILDER, name, None) for name in attributes}
    vars(_BUILDER).update(attributes)
    _State.depth += 1
    try:
        with swapped(_changes() if _State.depth == 1 else []):
            yield
    finally:
        _State.depth -= 1
        vars(_BUILDER).update(before)


@cache
def _changes() -> list[Change]:
    overrides = {"reduce": reductions.reduce, "associative_scan": reductions.associative_scan,
                 "multiple_of": hints.multiple_of, "max_contiguous": hints.max_contiguous}
    return language_changes(_SEMANTIC, overrides, _call_device_function)


def _call_device_function(function: JITFunction, *args: object, **kwargs: object) -> object:
    """A jit function called inside a kernel, tl.standard's included."""
    return rewritten(function, _as_tensor)(*args, **kwargs)


def _as_tensor(value: object) -> object:
    return value if type(value) is tl.tensor else _SEMANTIC.to_tensor(value, False)


def _check_call(kernel: JITFunction, grid: tuple[int, ...], arguments: dict[str, object]) -> None:
    if not isinstance(kernel, JITFunction):
        raise UsageTypeError(f"kernel: {type(kernel).__name__}, but should be a triton.JITFunction; the "
                             "environment variable TRITON_INTERPRET should be unset")
    faults = []
    if not 1 <= len(grid) <= 3 or any(not isinstance(size, int) or size < 0 for size in grid):
        faults.append(f"grid {grid!r}, but should be one to three integers, none negative")
    known = {*kernel.arg_names, *_launch_options()}
    faults += [f"argument {name!r}, but should be one of {', '.join(kernel.arg_names)} or a launch option"
               for name in arguments if name not in known]
    raise_faults(f"kernel {kernel.fn.__name__}", faults)


@cache
def _launch_options() -> frozenset[str]:
    """The option names of Triton's CUDA and HIP backends."""
    from triton.backends.amd.compiler import HIPOptions
    from triton.backends.nvidia.compiler import CUDAOptions
    return frozenset(field.name for options in (CUDAOptions, HIPOptions) for field in fields(options))
