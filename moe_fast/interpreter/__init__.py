"""The package's Triton kernels on a CPU: Triton's own interpreter, scoped per launch, corrected, checked."""

from moe_fast.interpreter.checks import checking
from moe_fast.interpreter.errors import (
    DeviceAssertError,
    IntegerOverflowError,
    OutOfBoundsError,
    StoreRaceError,
)
from moe_fast.interpreter.launch import interpret

__all__ = ["DeviceAssertError", "IntegerOverflowError", "OutOfBoundsError", "StoreRaceError", "checking",
           "interpret"]
