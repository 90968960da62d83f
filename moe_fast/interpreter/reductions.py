"""tl.reduce and tl.associative_scan on real values: upstream adds codes (triton-lang/triton #11604)."""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import ReduceOps, ScanOps, TensorHandle

from moe_fast.interpreter.casts import is_encoded, storage, values


def _tensor(data: np.ndarray, dtype: tl.dtype) -> tl.tensor:
    data = np.asarray(data)
    if data.shape:
        return tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, list(data.shape)))
    return tl.tensor(TensorHandle(data.reshape(1), dtype), dtype)


class RealReduceOps(ReduceOps):
    """Sum, minimum and maximum of encoded dtypes in fp32, rounded once; as upstream, min and max drop NaN."""

    def sum(self, input: tl.tensor) -> tl.tensor:
        """Sum along the axis; bf16 and fp8 are accumulated in fp32."""
        dtype = input.dtype
        if not is_encoded(dtype):
            return super().sum(input)
        total = np.sum(values(input.handle.data, dtype), axis=self.axis, keepdims=self.keep_dims)
        return _tensor(storage(np.asarray(total), dtype), dtype)

    def apply_impl(self, input: tuple[tl.tensor, ...]) -> object:
        """Upstream's cases, with fmax for nanmax: the same values, faster, and no warning for all-NaN."""
        if self.combine_fn is tl.standard._elementwise_max:
            return self.min_max(input[0], np.fmax.reduce)
        if self.combine_fn is tl.standard._elementwise_min:
            return self.min_max(input[0], np.fmin.reduce)
        return super().apply_impl(input)

    def min_max(self, input: object, val_reduce_op: object, idx_reduce_op: object = None) -> object:
        """Extreme value and its first index along the axis."""
        first = input[0] if isinstance(input, tuple) else input
        if not is_encoded(first.dtype):
            return super().min_max(input, val_reduce_op, idx_reduce_op)
        reals = values(first.handle.data, first.dtype)
        results = []
        if val_reduce_op:
            extreme = val_reduce_op(reals, axis=self.axis, keepdims=self.keep_dims)
            results.append(_tensor(storage(np.asarray(extreme), first.dtype), first.dtype))
        if idx_reduce_op:
            index = idx_reduce_op(reals, axis=self.axis, keepdims=self.keep_dims)
            results.append(_tensor(np.asarray(index).astype(np.int32), tl.int32))
        return tuple(results) if len(results) > 1 else results[0]


class RealScanOps(ScanOps):
    """Cumulative sum and product of encoded dtypes in fp32, each element rounded once."""

    def cumsum(self, input: tl.tensor) -> list[tl.tensor]:
        """Cumulative sum along the axis."""
        return self._accumulated(np.cumsum, input) if is_encoded(input.dtype) else super().cumsum(input)

    def cumprod(self, input: tl.tensor) -> list[tl.tensor]:
        """Cumulative product along the axis."""
        return self._accumulated(np.cumprod, input) if is_encoded(input.dtype) else super().cumprod(input)

    def _accumulated(self, op: object, input: tl.tensor) -> list[tl.tensor]:
        accumulated = op(values(input.handle.data, input.dtype), axis=self.axis)
        return [_tensor(storage(accumulated, input.dtype), input.dtype)]


def reduce(input: object, axis: int | None, combine_fn: object, keep_dims: bool = False,
           **_: object) -> object:
    """tl.reduce."""
    return RealReduceOps(_plain(axis), combine_fn, _plain(keep_dims)).apply(input)


def associative_scan(input: object, axis: int, combine_fn: object, reverse: bool = False,
                     **_: object) -> object:
    """tl.associative_scan."""
    return RealScanOps(_plain(axis), combine_fn, _plain(reverse)).apply(input)


def _plain(value: object) -> object:
    return value.value if isinstance(value, tl.constexpr) else value
