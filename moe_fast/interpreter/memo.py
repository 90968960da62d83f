"""Memoised construction of Triton's type and tensor objects, which otherwise takes two thirds of a launch.

Every operation of a kernel builds a block_type and a tensor, and each builds a tl.tuple of constexpr for its
shape. Both constructors depend on their type arguments only, so their results are computed once by Triton's
own code and copied; a type's name, which holds shape, element and constness, is the key (types are not all
hashable). Costs nothing in clarity elsewhere: delete it when upstream stops building a tuple per tensor.

Three small functions that are called several times per operation have a short way for what they usually meet.
"""

from collections.abc import Callable

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as upstream

_np_dtype_of = upstream._get_np_dtype
_NP_DTYPES: dict[str, np.dtype] = {}
_BLOCK_TYPES: dict[tuple, dict[str, object]] = {}
_TENSORS: dict[str, dict[str, object]] = {}
_init_block_type: Callable = tl.block_type.__init__
_init_tensor: Callable = tl.tensor.__init__
_init_handle: Callable = upstream.TensorHandle.__init__
_unwrap: Callable = tl.core._unwrap_if_constexpr
_FITTING: set[tuple[int, str]] = set()
_UNWRAPPED = frozenset({tl.tensor, tl.dtype, tl.block_type, tl.pointer_type, int, float, bool, str, type(None)})


def np_dtype(dtype: tl.dtype) -> np.dtype:
    """The NumPy dtype that stores `dtype`, memoised: upstream builds its table of 17 dtypes at each call."""
    found = _NP_DTYPES.get(dtype.name)
    if found is None:
        found = _NP_DTYPES[dtype.name] = _np_dtype_of(dtype)
    return found


def init_block_type(self: tl.block_type, element_ty: tl.dtype, shape: object) -> None:
    """block_type.__init__ by copy."""
    key = (element_ty.name, *(shape.values if type(shape) is tl.tuple else shape))
    attributes = _BLOCK_TYPES.get(key)
    if attributes is None:
        _init_block_type(self, element_ty, list(shape))
        attributes = _BLOCK_TYPES[key] = dict(vars(self))
    vars(self).update(attributes)


def init_tensor(self: tl.tensor, handle: object, type: tl.dtype) -> None:
    """tensor.__init__ by copy."""
    attributes = _TENSORS.get(type.name)
    if attributes is None:
        _init_tensor(self, handle, type)
        attributes = _TENSORS[type.name] = dict(vars(self))
    state = vars(self)
    state.update(attributes)
    state["handle"] = handle


def init_handle(self: upstream.TensorHandle, data: np.ndarray, dtype: tl.dtype, attr: dict | None = None) -> None:
    """TensorHandle.__init__, whose check of the array's item size against the dtype is made once for each pair."""
    key = data.itemsize, dtype.name
    if key not in _FITTING:
        _init_handle(self, data, dtype)
        _FITTING.add(key)
    self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr


def unwrapped(value: object) -> object:
    """core._unwrap_if_constexpr, which otherwise asks four times what a value is not."""
    kind = type(value)
    return value if kind in _UNWRAPPED else value.value if kind is tl.constexpr else _unwrap(value)


def equal(self: tl.dtype, other: object) -> bool:
    """dtype.__eq__: of equal names."""
    other = unwrapped(other)
    return self is other or (isinstance(other, tl.dtype) and self.name == other.name)


def plain_shape(dtype: tl.dtype) -> tuple[int, ...]:
    """The shape of a block type as a plain tuple, () for a scalar type."""
    return tuple(dtype.shape.values) if type(dtype) is tl.block_type else ()
