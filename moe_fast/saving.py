"""Gate and up for the backward pass: made again there, or saved by the forward pass. The same bits either way.

Saving takes two of three products from the gradient at the activation, for `memory.saved_bytes` more between the two
passes. It is off by default.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock


class _Depth:
    """How many `saving_activations` are open in this process.

    No ContextVar, whose `get` torch.compile cannot trace: a plain attribute is guarded. Another thread may so save what
    it need not, which changes no bit.
    """

    def __init__(self) -> None:
        self.open = 0
        self.lock = Lock()


_depth = _Depth()


@contextmanager
def saving_activations() -> Iterator[None]:
    """Within it, layers that record gradients keep gate and up (fp32) from the forward to the backward pass.

    Of a process, not of a thread. Under the gather schedule and on DTensors they are made again all the same.
    """
    with _depth.lock:
        _depth.open += 1
    try:
        yield
    finally:
        with _depth.lock:
            _depth.open -= 1


def saves() -> bool:
    """Whether a layer that records gradients should save."""
    return _depth.open > 0
