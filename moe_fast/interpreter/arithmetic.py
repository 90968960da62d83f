"""Triton's interpreter builder with real bf16 and fp8 arithmetic, tf32 dots and checked memory.

Upstream stores bf16 as uint16 and computes on the bit patterns: documented as unsupported (triton-lang/triton
#4972; dot: #11584, pull request #11585 declined; arithmetic: #10945 declined; sum: #11604). Each method here
converts to fp32, computes, and rounds the result once. Delete a method when the oldest supported Triton
passes its test in tests/test_interpreter.py without it.
"""

import math

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as upstream
from triton.runtime.interpreter import InterpreterBuilder
from triton.runtime.interpreter import TensorHandle as Handle

from moe_fast.interpreter.casts import is_encoded, round_to_tf32, storage, values
from moe_fast.interpreter.errors import DeviceAssertError
from moe_fast.interpreter.memo import np_dtype
from moe_fast.interpreter.memory import Memory

_PRECISION = upstream._ir.INPUT_PRECISION
_SMALL = 8192
_FADD = upstream._ir.ATOMIC_OP.FADD


def reals(handle: Handle) -> np.ndarray:
    """The real values of a handle."""
    return values(handle.data, handle.dtype.scalar)


class CorrectedBuilder(InterpreterBuilder):
    """The operations of a kernel on NumPy arrays; `memory` is the launch's, None without bounds check."""

    memory: Memory | None = None
    kernel: str = ""

    def get_bf16(self, value: float) -> Handle:
        """A bf16 constant, which upstream lacks: `x_bf16 * 2` raises AttributeError there."""
        return Handle(storage(np.array([value], dtype=np.float32), tl.bfloat16), tl.bfloat16)

    def create_expand_dims(self, arg: Handle, axis: int) -> Handle:
        """A new axis of size one; np.expand_dims takes ten times as long."""
        return Handle(arg.data[(slice(None),) * axis + (None,)], arg.dtype.scalar)

    def create_broadcast(self, arg: Handle, shape: list[int]) -> Handle:
        """Repeat along axes of size one; a small copy is faster than np.broadcast_to."""
        if math.prod(shape) > _SMALL:
            return super().create_broadcast(arg, shape)
        data = np.empty(shape, arg.data.dtype)
        data[...] = arg.data
        return Handle(data, arg.dtype.scalar)

    def cast_impl(self, src: Handle, dst_type: tl.dtype) -> Handle:
        """Any numeric cast, rounded to nearest even."""
        source, target = src.dtype.scalar, dst_type.scalar
        if is_encoded(source) or is_encoded(target):
            return Handle(storage(values(src.data, source), target), target)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src: Handle, dst_type: tl.dtype, rounding_mode: object) -> Handle:
        """A float cast with a rounding mode: nearest even unless RTZ."""
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.float8e4b15 in (source, target):  # no torch dtype to compare with; upstream's bits
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        return Handle(storage(values(src.data, source), target, rounding_mode), target)

    def binary_op(self, lhs: Handle, rhs: Handle, op: np.ufunc) -> Handle:
        """Elementwise op of operands of one dtype; a comparison is int1 (upstream: lhs's dtype)."""
        dtype = lhs.dtype.scalar
        if not is_encoded(dtype):
            result, stored = op(lhs.data, rhs.data), np_dtype(dtype)
            if result.dtype.kind != "b" and result.itemsize > stored.itemsize:
                result = result.astype(stored)
        else:
            result = op(reals(lhs), reals(rhs))
            if result.dtype.kind != "b":
                result = storage(result, dtype)
        return Handle(result, tl.int1 if result.dtype.kind == "b" else dtype)

    def unary_op(self, arg: Handle, op: np.ufunc) -> Handle:
        """Elementwise function, in fp32 for encoded dtypes."""
        dtype = arg.dtype.scalar
        if not is_encoded(dtype):
            return super().unary_op(arg, op)
        return Handle(storage(op(reals(arg)), dtype), dtype)

    def ternary_op(self, lhs: Handle, rhs: Handle, other: Handle, op: object) -> Handle:
        """Clip on real values; a select moves bits and needs no conversion."""
        dtype = other.dtype.scalar
        if op is np.where or not is_encoded(dtype):
            return super().ternary_op(lhs, rhs, other, op)
        return Handle(storage(op(reals(lhs), reals(rhs), reals(other)), dtype), dtype)

    def create_minnumf(self, lhs: Handle, rhs: Handle) -> Handle:
        """The operand that is not NaN; Triton before 3.8 returns NaN. Delete with Triton 3.7."""
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs: Handle, rhs: Handle) -> Handle:
        """As create_minnumf."""
        return self.binary_op(lhs, rhs, np.fmax)

    def create_clampf(self, arg: Handle, lo: Handle, hi: Handle,
                      propagate_nans: object) -> Handle:
        """As create_minnumf: NaN becomes `lo` unless it is to be propagated."""
        if propagate_nans == upstream._ir.PROPAGATE_NAN.NONE:
            return self.create_minnumf(self.create_maxnumf(arg, lo), hi)
        return self.ternary_op(arg, lo, hi, np.clip)

    def create_fma(self, x: Handle, y: Handle, z: Handle) -> Handle:
        """x * y + z, computed in fp64 and rounded to z's dtype (fp64 itself: two roundings)."""
        dtype = z.dtype.scalar
        wide = reals(x).astype(np.float64) * reals(y) + reals(z)
        return Handle(storage(wide, dtype), dtype)

    def create_erf(self, arg: Handle) -> Handle:
        """erf in fp64, rounded once; upstream calls math.erf per element."""
        dtype = arg.dtype.scalar
        wide = torch.erf(torch.from_numpy(np.array(reals(arg), dtype=np.float64))).numpy()
        return Handle(storage(wide, dtype), dtype)

    def create_rsqrt(self, arg: Handle) -> Handle:
        """1 / sqrt, rounded to arg's dtype."""
        dtype = arg.dtype.scalar
        return Handle(storage(1 / np.sqrt(reals(arg)), dtype), dtype)

    def create_dot(self, a: Handle, b: Handle, d: Handle, input_precision: object,
                   max_num_imprecise_acc: int) -> Handle:
        """d + a @ b, a matmul in fp32 (fp64 for fp64); tf32 and tf32x3 round or split fp32 operands."""
        if a.dtype.scalar.is_int():
            return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)
        dtype = d.dtype.scalar
        compute = np.float64 if dtype == tl.float64 else np.float32
        left, right = (reals(operand).astype(compute, copy=False) for operand in (a, b))
        single = a.dtype.scalar == b.dtype.scalar == tl.float32
        if single and input_precision != _PRECISION.IEEE:
            product = _tf32_product(left, right, input_precision)
        else:
            product = np.matmul(left, right)
        product += reals(d)
        return Handle(storage(product, dtype), dtype)

    def create_masked_load(self, ptrs: Handle, mask: object, other: Handle | None, cache_modifier: object,
                           eviction_policy: object, is_volatile: bool) -> Handle:
        """Gather through the launch's memory."""
        if self.memory is None:
            return super().create_masked_load(ptrs, mask, other, cache_modifier, eviction_policy, is_volatile)
        dtype = ptrs.get_element_ty()
        data = self.memory.load(ptrs.data, _array(mask), None if other is None else other.data,
                                np_dtype(dtype))
        return Handle(data, dtype)

    def create_load(self, ptr: Handle, _0: object, _1: object, is_volatile: bool) -> Handle:
        """A load without mask."""
        if self.memory is None:
            return super().create_load(ptr, _0, _1, is_volatile)
        return self.create_masked_load(ptr, None, None, _0, _1, is_volatile)

    def create_masked_store(self, ptrs: Handle, value: Handle, mask: object, cache_modifier: object,
                            eviction_policy: object) -> None:
        """Scatter through the launch's memory."""
        if self.memory is None:
            return super().create_masked_store(ptrs, value, mask, cache_modifier, eviction_policy)
        dtype = np_dtype(ptrs.get_element_ty())
        return self.memory.store(ptrs.data, value.data, _array(mask), dtype)

    def create_store(self, ptr: Handle, val: Handle, _0: object, _1: object) -> None:
        """A store without mask."""
        if self.memory is None:
            return super().create_store(ptr, val, _0, _1)
        return self.create_masked_store(ptr, val, None, None, None)

    def create_atomic_cas(self, ptr: Handle, cmp: Handle, val: Handle, sem: object,
                          scope: object) -> Handle:
        """Compare and swap at checked addresses."""
        return super().create_atomic_cas(self._real(ptr, None), cmp, val, sem, scope)

    def create_atomic_rmw(self, op: object, ptr: Handle, val: Handle, mask: Handle, sem: object,
                          scope: object) -> Handle:
        """An atomic at checked addresses; bf16 addition, which upstream lacks, rounds after every lane."""
        ptr = self._real(ptr, np.broadcast_to(mask.data, ptr.data.shape))
        if val.dtype.scalar == tl.bfloat16 and op == _FADD:
            return _atomic_add_bf16(ptr, val, mask)
        return super().create_atomic_rmw(op, ptr, val, mask, sem, scope)

    def create_assert(self, condition: Handle, message: str) -> None:
        """Raise DeviceAssertError unless every lane of `condition` holds."""
        if not condition.data.all():
            raise DeviceAssertError(f"kernel {self.kernel}, program {self.grid_idx}: tl.device_assert "
                                    f"failed: {message}")

    def create_assume(self, condition: Handle) -> None:
        """Raise DeviceAssertError unless every lane of `condition` holds."""
        if not condition.data.all():
            raise DeviceAssertError(f"kernel {self.kernel}, program {self.grid_idx}: tl.assume does not hold")

    def _real(self, ptr: Handle, mask: np.ndarray | None) -> Handle:
        if self.memory is None:
            return ptr
        itemsize = np_dtype(ptr.get_element_ty()).itemsize
        return Handle(self.memory.real_pointers(ptr.data, mask, itemsize, "atomic"), ptr.dtype)


def _array(mask: object) -> np.ndarray | None:
    """Block pointers and descriptors pass their mask as an array, loads and stores as a handle."""
    return mask.data if isinstance(mask, Handle) else mask


def _tf32_product(left: np.ndarray, right: np.ndarray, input_precision: object) -> np.ndarray:
    """Upstream accepts "tf32" and computes in fp32; tf32x3 is (hi + lo)(hi + lo) without lo * lo."""
    left_high, right_high = round_to_tf32(left), round_to_tf32(right)
    product = np.matmul(left_high, right_high)
    if input_precision == _PRECISION.TF32:
        return product
    left_low, right_low = round_to_tf32(left - left_high), round_to_tf32(right - right_high)
    return np.matmul(left_high, right_low) + np.matmul(left_low, right_high) + product


def _atomic_add_bf16(ptr: Handle, val: Handle, mask: Handle) -> Handle:
    pointers, addends = ptr.data.ravel(), reals(val).ravel()
    active = np.flatnonzero(np.broadcast_to(mask.data, val.data.shape).ravel())
    before = np.zeros(addends.shape, np.uint16)
    always, zero, stored = np.ones(1, bool), np.zeros(1, np.uint16), np.dtype(np.uint16)
    for lane in active:
        address = pointers[lane:lane + 1]
        old = upstream._interpreter.load(address, always, zero, stored)
        new = storage(values(old, tl.bfloat16) + addends[lane:lane + 1], tl.bfloat16)
        upstream._interpreter.store(address, new, always)
        before[lane] = old[0]
    return Handle(before.reshape(val.data.shape), tl.bfloat16)
