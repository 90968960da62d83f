"""What an interpreted kernel can do wrong; every message holds the kernel and the program that did it."""


class OutOfBoundsError(RuntimeError):
    """A lane reads or writes outside the tensor arguments of its launch."""


class StoreRaceError(RuntimeError):
    """Two programs of one launch, or two lanes of one store, write the same byte."""


class IntegerOverflowError(RuntimeError):
    """An integer addition, subtraction or multiplication leaves the range of its type."""


class DeviceAssertError(RuntimeError):
    """A tl.device_assert, tl.assume or tl.multiple_of does not hold."""
