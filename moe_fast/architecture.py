"""Which architecture a device is: what tile sizes follow."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch

_assumed: ContextVar[str] = ContextVar("assumed", default="")


def architecture(device: torch.device) -> str:
    """As sm_90 or gfx942; of meta tensors the one that is assumed, "" outside of `assuming`."""
    return _assumed.get() if device.type == "meta" else _of_gpu(device)


@contextmanager
def assuming(name: str) -> Iterator[None]:
    """Within it, meta tensors are tensors of that architecture."""
    token = _assumed.set(name)
    try:
        yield
    finally:
        _assumed.reset(token)


@cache
def _of_gpu(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once if each takes a whole multiprocessor; 3 in the interpreter, for it to loop."""
    if device.type in ("cpu", "meta"):
        return 3
    return _multiprocessors(device)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
