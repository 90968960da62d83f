"""Protects the interpreter's short ways: whatever meets, types and numbers are those of Triton's own rules."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime.interpreter import TensorHandle

from moe_fast.interpreter import launch
from moe_fast.interpreter.checks import Checks
from moe_fast.interpreter.memo import np_dtype

DTYPES = {str(dtype): dtype for dtype in (tl.int1, tl.uint8, tl.int32, tl.int64, tl.float16, tl.bfloat16, tl.float32,
                                          tl.float64, tl.pointer_type(tl.float32))}
NUMBERS = (0, 1, -7, 2**31 - 1, -2**31, 2**31, -2**31 - 1, 2**40, 2**63, 2**70, True, 1.5, -0.0, 1e300, float("inf"),
           float("nan"), np.float32(2.5))
SHAPES = ((), (1,), (4,), (2, 1), (2, 4))


@triton.jit
def no_kernel():
    pass


@pytest.fixture(autouse=True)
def _launched() -> Iterator[None]:
    """Inside of a launch, where the language is the interpreter's."""
    with launch._launch_state(no_kernel, (1,), None, Checks()), np.errstate(all="ignore"):
        yield


def drawn(dtype: tl.dtype, shape: tuple[int, ...]) -> tl.tensor:
    """Small numbers, as storage of the dtype."""
    stored = np.uint64 if dtype.is_ptr() else np_dtype(dtype)
    data = np.arange(1, 1 + int(np.prod(shape))).reshape(shape or 1).astype(stored)
    return tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, list(shape)) if shape else dtype)


def outcome(call: Callable[..., Any], *arguments: object) -> object:
    """Types, shapes and bits of what it returns, or the error that it raises."""
    try:
        found = call(*arguments)
    except Exception as error:
        return type(error)
    tensors = found if isinstance(found, tuple) else (found,)
    return [(str(one.type), one.handle.dtype.name, one.handle.data.dtype, one.handle.data.shape,
             np.ascontiguousarray(one.handle.data).tobytes()) for one in tensors]


@pytest.mark.parametrize("flags", [(True, True, True, False), (False, False, True, False), (False, False, True, True),
                                   (False, False, False, False)], ids=["sums", "comparisons", "quotients", "bits"])
@pytest.mark.parametrize("name", DTYPES)
def test_operands_become_what_triton_makes_of_them(name: str, flags: tuple[bool, ...]) -> None:
    """A tensor beside a tensor of every dtype and shape, and beside Python's numbers, on either side."""
    ours, rules = launch._SEMANTIC.binary_op_type_checking_impl, TritonSemantic.binary_op_type_checking_impl
    for shape in SHAPES:
        left = drawn(DTYPES[name], shape)
        others = [drawn(dtype, other) for dtype in DTYPES.values() for other in SHAPES]
        for right in (*others, *NUMBERS):
            for pair in ((left, right), (right, left)):
                assert outcome(ours, *pair, *flags) == outcome(rules, launch._SEMANTIC, *pair, *flags), pair


@pytest.mark.parametrize("name", DTYPES)
def test_bits_and_new_axes_are_those_of_triton(name: str) -> None:
    ours = launch._SEMANTIC
    for shape in SHAPES:
        left = drawn(DTYPES[name], shape)
        for axis in range(len(shape) + 1):
            assert outcome(ours.expand_dims, left, axis) == outcome(TritonSemantic.expand_dims, ours, left, axis)
        for right in (*(drawn(dtype, other) for dtype in DTYPES.values() for other in SHAPES), *NUMBERS):
            assert outcome(ours.bitwise_op_type_checking_impl, left, right) == outcome(
                TritonSemantic.bitwise_op_type_checking_impl, ours, left, right)


@pytest.mark.parametrize("name", DTYPES)
def test_casts_are_those_of_triton(name: str) -> None:
    for shape in SHAPES:
        given = drawn(DTYPES[name], shape)
        for target in DTYPES.values():
            assert outcome(launch._SEMANTIC.cast, given, target) == outcome(
                TritonSemantic.cast, launch._SEMANTIC, given, target)


def test_dtypes_are_equal_by_name() -> None:
    """Also where one is wrapped; what is no dtype equals none."""
    assert tl.int32 == tl.constexpr(tl.int32)
    assert tl.int32 != tl.int64
    assert tl.int32 != "int32"
    assert tl.float32 in (tl.bfloat16, tl.float32)


def test_a_handle_that_is_too_wide_is_refused() -> None:
    """Each time, not only the first."""
    for _ in range(2):
        with pytest.raises(ValueError, match="exceeds"):
            TensorHandle(np.zeros(2, np.float64), tl.float32)
