"""tl.multiple_of and tl.max_contiguous, which upstream refuses with a plain number, as a kernel writes it.

They tell a compiler what it may assume; what is not so is undefined on a GPU. Of one number it is looked at here. Of a
tensor the hint is about the first of each run of neighbours, which another hint gives: that is not.
"""

import triton.language as tl

from moe_fast.interpreter.checks import active_checks
from moe_fast.interpreter.errors import DeviceAssertError


def multiple_of(input: object, values: object, **_: object) -> object:
    """`input` as it is; raises DeviceAssertError where it is one number and no multiple."""
    divisor = values.value if isinstance(values, tl.constexpr) else values
    if isinstance(input, tl.tensor) and not input.shape and isinstance(divisor, int) and active_checks().overflow:
        number = int(input.handle.data.item())
        if number % divisor:
            raise DeviceAssertError(f"tl.multiple_of({number}, {divisor}), but {number} is no multiple of {divisor}")
    return input


def max_contiguous(input: object, values: object, **_: object) -> object:
    """`input` as it is."""
    return input
