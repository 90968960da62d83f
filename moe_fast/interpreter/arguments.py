"""Host arguments as the handles a kernel works on."""

from collections.abc import Callable

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import TensorHandle
from triton.runtime.jit import JITFunction, TensorWrapper, mangle_type
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_ref.contract.errors import UsageTypeError, raise_faults

Address = Callable[[str, torch.Tensor], int]


class ArgumentBinder:
    """Turns one launch's arguments into handles; `address` gives the pointer value for a tensor argument."""

    def __init__(self, semantic: object, address: Address) -> None:
        self.semantic = semantic
        self.address = address

    def bind(self, kernel: JITFunction, arguments: dict[str, object]) -> list[object]:
        """The parameters of `kernel` in order; raises UsageValueError with every missing name at once."""
        missing = [f"argument {param.name} is missing" for param in kernel.params
                   if param.name not in arguments and not param.has_default]
        raise_faults(f"kernel {kernel.fn.__name__}", missing)
        return [self._parameter(param, arguments.get(param.name, param.default)) for param in kernel.params]

    def _parameter(self, param: object, value: object) -> object:
        if param.is_constexpr:
            return value.value if isinstance(value, tl.constexpr) else value
        return self._handle(param.name, value)

    def _handle(self, name: str, value: object) -> object:
        if isinstance(value, tl.constexpr):
            return value.value
        if isinstance(value, bool | int | float):
            return _scalar(value)
        if isinstance(value, torch.Tensor | TensorWrapper):
            return self._pointer(name, value)
        if isinstance(value, TensorDescriptor):
            return self._descriptor(name, value)
        if isinstance(value, tuple):
            members = [self._handle(f"{name}[{index}]", member) for index, member in enumerate(value)]
            return type(value)(*members) if hasattr(value, "_fields") else type(value)(members)
        return value

    def _pointer(self, name: str, tensor: torch.Tensor | TensorWrapper) -> tl.tensor:
        plain = tensor.base if isinstance(tensor, TensorWrapper) else tensor
        if plain.device.type != "cpu":
            raise UsageTypeError(f"argument {name}: a tensor on {plain.device}, but should be on cpu")
        dtype = _pointer_type(tensor)
        return tl.tensor(TensorHandle(np.array([self.address(name, plain)], dtype=np.uint64), dtype), dtype)

    def _descriptor(self, name: str, descriptor: TensorDescriptor) -> tl.tensor_descriptor:
        strides = [_scalar(stride) for stride in descriptor.strides[:-1]]
        return self.semantic.make_tensor_descriptor(
            base=self._pointer(name, descriptor.base), shape=[_scalar(size) for size in descriptor.shape],
            strides=[*strides, tl.constexpr(1)],
            block_shape=[tl.constexpr(size) for size in descriptor.block_shape],
            padding_option=descriptor.padding)


_POINTER_TYPES: dict[object, tl.dtype] = {}


def _pointer_type(tensor: torch.Tensor | TensorWrapper) -> tl.dtype:
    if tensor.dtype not in _POINTER_TYPES:
        _POINTER_TYPES[tensor.dtype] = tl.str_to_ty(mangle_type(tensor), None)
    return _POINTER_TYPES[tensor.dtype]


def _scalar(value: bool | int | float) -> tl.tensor:
    """A rank-0 tensor of the type a compiled kernel would get: int1, int32 / int64 / uint64 by size, fp32.

    Upstream hands a float over as a Python number, which takes the dtype of the tensor it meets: bf16 * 0.1
    would stay bf16 with 0.1 rounded to bf16, where a compiled kernel computes in fp32 (seen in Triton 3.6 to
    3.8).
    """
    if isinstance(value, bool):
        dtype, stored = tl.int1, np.bool_
    elif isinstance(value, float):
        dtype, stored = tl.float32, np.float32
    elif -2**31 <= value < 2**31:
        dtype, stored = tl.int32, np.int32
    elif -2**63 <= value < 2**63:
        dtype, stored = tl.int64, np.int64
    else:
        dtype, stored = tl.uint64, np.uint64
    return tl.tensor(TensorHandle(np.array([value], dtype=stored), dtype), dtype)
