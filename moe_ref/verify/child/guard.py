"""Protection around a subject: poisoned allocations, and inputs between fences that must not change."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from functools import wraps

import torch
from torch._library.custom_ops import OPDEFS, CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode

POISONS = ((float("nan"), 2**30), (30000.0, 0))
"""What uninitialised memory holds in the first and second run, for floats and integers: once nothing that
could pass for data, once plausible data. A result that depends on it differs between the runs or is NaN."""

POISON_NAMES = ("nan", "large")

_ALLOCATIONS = frozenset({
    torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default, torch.ops.aten.new_empty_strided.default,
    torch.ops.aten.empty_permuted.default,
})


_waiting: ContextVar["Poison | None"] = ContextVar("waiting", default=None)
"""The poison that saw a custom operator called, while that runs."""


class Poison(TorchDispatchMode):
    """Fills every allocation made inside with a poison, also inside custom operators; active in the entering thread."""

    def __init__(self, value: float, integer: int) -> None:
        super().__init__()
        self.value, self.integer = value, integer

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else torch loads its compiler, 900 modules, into every child and forked rank at the first operation.
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if isinstance(operator := OPDEFS.get(func._schema.name), CustomOpDef):
            _reach_into(operator)
            token = _waiting.set(self)
            try:
                return func(*args, **(kwargs or {}))
            finally:
                _waiting.reset(token)
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS and result.device.type != "meta":
            if result.dtype.is_floating_point:
                # Numbers that a format cannot hold are its largest; a NaN stays one.
                result.fill_(min(self.value, torch.finfo(result.dtype).max))
            elif result.dtype in (torch.int32, torch.int64):
                result.fill_(self.integer)
        return result


def _reach_into(operator: CustomOpDef) -> None:
    """Have its kernels run under the mode that waits: torch calls them outside of every mode that saw the operator."""
    for device, kernel in operator._backend_fns.items():
        if not hasattr(kernel, "reached"):
            operator._backend_fns[device] = _reached(kernel)


def _reached(kernel: Callable) -> Callable:
    @wraps(kernel)
    def under_poison(*args, **kwargs):
        with _waiting.get() or nullcontext():
            return kernel(*args, **kwargs)

    under_poison.reached = True  # type: ignore[attr-defined]
    return under_poison


def poison(run: int) -> AbstractContextManager:
    """The poison of a run, 0 or later."""
    return Poison(*POISONS[run % len(POISONS)])


_FENCE_BYTES, _FENCE, _KEPT_BYTES = 4096, 255, 1 << 20
"""Around an input: what reads it gets NaN, or -1, and what writes it is seen. Larger buffers are not kept."""

_buffers: dict[tuple[int, str, torch.device], torch.Tensor] = {}


class Fenced:
    """A copy of an input between two fences.

    It lies where the input of that name and rank was in the call before, if it is small and of the same size: a subject
    that knows its inputs again by their address, or by their shape, answers the wrong question then.
    """

    def __init__(self, rank: int, name: str, tensor: torch.Tensor, device: torch.device) -> None:
        place, size = (rank, name, device), 2 * _FENCE_BYTES + tensor.numel() * tensor.element_size()
        self._buffer = _buffers.pop(place, torch.empty(0, device=device))
        if self._buffer.numel() != size:
            self._buffer = torch.empty(size, dtype=torch.uint8, device=device)
        if size <= _KEPT_BYTES:
            _buffers[place] = self._buffer
        inside = self._buffer.fill_(_FENCE)[_FENCE_BYTES:size - _FENCE_BYTES]
        self.tensor = inside.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def broken(self) -> bool:
        """Whether something was written beside the input."""
        fences = torch.cat([self._buffer[:_FENCE_BYTES], self._buffer[-_FENCE_BYTES:]])
        return not bool((fences == _FENCE).all())


def fingerprint(tensor: torch.Tensor) -> tuple[int, int]:
    """Two 64-bit sums over the bits of a tensor, one weighted by position: any change of one element shows."""
    size = tensor.element_size()
    lanes = tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).flatten()
    plain = weighted = 0
    for start in range(0, lanes.numel(), 1 << 24):
        block = lanes[start:start + (1 << 24)].to(torch.int64)
        position = torch.arange(1, len(block) + 1, device=block.device)
        plain += int(block.sum())
        weighted += int((block * position).sum()) + start * int(block.sum())
    return plain, weighted
