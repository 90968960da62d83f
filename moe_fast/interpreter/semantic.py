"""The language's type rules, with an overflow check that raises and a short way for common operands."""

from collections.abc import Callable

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic

from moe_fast.interpreter.errors import IntegerOverflowError
from moe_fast.interpreter.memo import np_dtype, plain_shape

_UFUNCS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
_OFFSETS = frozenset(dtype.name for dtype in (tl.int32, tl.int64))
_BITS = _OFFSETS | {tl.int1.name}
_COMPUTED_AS_IS = _OFFSETS | {tl.int1.name, tl.float32.name, tl.float64.name}
_NUMBERS = frozenset((*tl.dtype.SINT_TYPES, *tl.dtype.UINT_TYPES, *tl.dtype.FP_TYPES))
_HOLDS = {tl.int32.name: range(-2**31, 2**31), tl.int64.name: range(-2**63, 2**63),
          tl.float32.name: range(-2**31, 2**31)}
"""Integers that stay what they are beside a tensor of the dtype; an fp32 tensor rounds them."""


class CheckedSemantic(TritonSemantic):
    """Triton's semantics; upstream computes an overflow check and by default drops the result."""

    def binary_op_sanitize_overflow_impl(self, lhs: tl.tensor, rhs: tl.tensor, binary_op: Callable) -> None:
        """Raise IntegerOverflowError if `binary_op` leaves the range of lhs's signed type (below 64 bits).

        Unsigned integers wrap, compiled as here, and kernels rely on it (a key packed above a count in Liger's
        _keyed_add); Triton's own check, which is off unless a kernel is debugged, accuses them too.
        """
        dtype = lhs.dtype
        if not self.builder.options.sanitize_overflow or dtype.int_bitwidth >= 64 or dtype.is_int_unsigned():
            return
        exact = _UFUNCS[binary_op.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
        low, high = (exact.item(),) * 2 if exact.size == 1 else (int(exact.min()), int(exact.max()))
        if low < dtype.get_int_min_value() or high > dtype.get_int_max_value():
            extreme = low if low < dtype.get_int_min_value() else high
            raise IntegerOverflowError(
                f"kernel {self.builder.kernel}, program {self.builder.grid_idx}: {dtype} overflow in "
                f"{binary_op.__name__}: {extreme}, but it should be from {dtype.get_int_min_value()} to "
                f"{dtype.get_int_max_value()}; widen an operand with .to(tl.int64)")

    def binary_op_type_checking_impl(self, lhs: object, rhs: object, allow_lhs_ptr: bool = False,
                                     allow_rhs_ptr: bool = False, arithmetic_check: bool = True,
                                     div_or_mod: bool = False) -> tuple[tl.tensor, tl.tensor]:
        """Operands of one common type need a shape only, int32 beside int64 a cast, a pointer's offsets nothing, and a
        number the dtype of its tensor; Triton's rules for the rest.
        """
        if type(lhs) is tl.tensor and type(rhs) is tl.tensor:
            left, right = lhs.dtype, rhs.dtype
            if left.name == right.name and left.name in _COMPUTED_AS_IS:
                return self.broadcast_impl_value(lhs, rhs)
            if right.name in _OFFSETS and allow_lhs_ptr and left.is_ptr():
                return self.broadcast_impl_value(lhs, rhs)
            if right.name in _OFFSETS and left.name in _OFFSETS and arithmetic_check:
                return self.broadcast_impl_value(self.cast(lhs, tl.int64), self.cast(rhs, tl.int64))
        elif arithmetic_check and type(lhs) is tl.tensor and (constant := self._constant(rhs, lhs)) is not None:
            return lhs, constant
        elif arithmetic_check and type(rhs) is tl.tensor and (constant := self._constant(lhs, rhs)) is not None:
            return constant, rhs
        return super().binary_op_type_checking_impl(lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check,
                                                    div_or_mod)

    def _constant(self, value: object, like: tl.tensor) -> tl.tensor | None:
        """A number in dtype and shape of a tensor, None where that is not what it becomes beside it."""
        dtype = like.dtype
        held = _HOLDS.get(dtype.name)
        if held is None or not (value in held if type(value) is int else
                                type(value) is float and dtype.name == tl.float32.name):
            return None
        data = np.empty(plain_shape(like.type) or 1, np_dtype(dtype))
        data.fill(value or 0)  # Triton has no constant -0.0
        return tl.tensor(type(like.handle)(data, dtype), like.type)

    def cast(self, input: tl.tensor, dst_ty: tl.dtype, fp_downcast_rounding: str | None = None) -> tl.tensor:
        """To the dtype that it has, and from int32 to int64, without asking for every other way there is."""
        source, target = input.dtype.name, dst_ty.scalar.name
        if source == target and source in _NUMBERS:
            return input
        if source == tl.int32.name and target == tl.int64.name and fp_downcast_rounding is None:
            wide = input.type.with_element_ty(tl.int64) if input.type.is_block() else tl.int64
            return tl.tensor(self.builder.create_int_cast(input.handle, wide, True), wide)
        return super().cast(input, dst_ty, fp_downcast_rounding)

    def bitwise_op_type_checking_impl(self, input: object, other: object) -> tuple[tl.tensor, tl.tensor]:
        """Masks, and integers of one type, need a shape only."""
        if type(input) is tl.tensor and type(other) is tl.tensor and input.dtype.name == other.dtype.name in _BITS:
            return self.broadcast_impl_value(input, other)
        return super().bitwise_op_type_checking_impl(input, other)

    def expand_dims(self, input: tl.tensor, axis: int) -> tl.tensor:
        """A block's shape is known without unwrapping each of its sizes."""
        if not input.type.is_block():
            return super().expand_dims(input, axis)
        shape = plain_shape(input.type)
        block = tl.block_type(input.dtype, (*shape[:axis], 1, *shape[axis:]))
        return tl.tensor(self.builder.create_expand_dims(input.handle, axis), block)

    def broadcast_impl_value(self, lhs: tl.tensor, rhs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
        """Both operands at their common shape; Triton's code for different ranks and for errors."""
        left, right = plain_shape(lhs.type), plain_shape(rhs.type)
        if left == right:
            return lhs, rhs
        if not right:
            return lhs, self._splat(rhs, left)
        if not left:
            return self._splat(lhs, right), rhs
        if len(left) != len(right):
            return super().broadcast_impl_value(lhs, rhs)
        common = [b if a == 1 else a for a, b in zip(left, right, strict=True)]
        if any(size not in (1, wanted) for size, wanted in zip(right, common, strict=True)):
            return super().broadcast_impl_value(lhs, rhs)
        return self._expanded(lhs, left, common), self._expanded(rhs, right, common)

    def _splat(self, scalar: tl.tensor, shape: tuple[int, ...]) -> tl.tensor:
        handle = scalar.handle
        data = np.empty(shape, handle.data.dtype)
        data.fill(handle.data.item())
        return tl.tensor(type(handle)(data, handle.dtype), tl.block_type(scalar.dtype, shape))

    def _expanded(self, tensor: tl.tensor, shape: tuple[int, ...], common: list[int]) -> tl.tensor:
        if all(size == wanted for size, wanted in zip(shape, common, strict=True)):
            return tensor
        block = tl.block_type(tensor.dtype, common)
        return tl.tensor(self.builder.create_broadcast(tensor.handle, common), block)
