"""Start-up self-test: the corrected builder against torch's casts, so that an unknown Triton fails loudly.

Everything goes through the builder methods that triton.language calls, by the names it calls them: if a new
Triton routes a cast or an operation elsewhere, the corrections would silently be off, and this raises
instead.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as upstream
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from moe_fast.interpreter.casts import FP8_DTYPES, storage, values

_RTNE = upstream._ir.ROUNDING_MODE.RTNE
_PRECISION = upstream._ir.INPUT_PRECISION
# value, format, code: ties and carries worked out by hand (OCP FP8 specification, IEEE 754 rounding)
_KNOWN = (
    (1 + 2**-8, tl.bfloat16, 0x3F80), (1 + 3 * 2**-8, tl.bfloat16, 0x3F82), (2 - 2**-9, tl.bfloat16, 0x4000),
    (3.4e38, tl.bfloat16, 0x7F80), (2.0**-133, tl.bfloat16, 0x0001), (-0.0, tl.bfloat16, 0x8000),
    (1.984, tl.float8e4nv, 0x40), (1.0625, tl.float8e4nv, 0x38), (448.0, tl.float8e4nv, 0x7E),
    (1e9, tl.float8e4nv, 0x7E), (float("-inf"), tl.float8e4nv, 0xFE), (2.0**-9, tl.float8e4nv, 0x01),
    (2.0**-10, tl.float8e4nv, 0x00), (1.9, tl.float8e5, 0x40), (1e9, tl.float8e5, 0x7B),
    (2.0**-16, tl.float8e5, 0x01), (-0.0, tl.float8e5, 0x80),
    (1e9, tl.float8e4b8, 0x7F), (1e9, tl.float8e5b16, 0x7F),
)


@cache
def check_numerics(builder: InterpreterBuilder) -> None:
    """Run all comparisons, once per builder; raises RuntimeError with the first value that differs."""
    bf16_codes = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    _check_widening(builder, bf16_codes, tl.bfloat16, torch.bfloat16, builder.create_fp_ext)
    # every bf16 value with a fraction just below, at and just above the tie
    tails = np.array([0, 1, 0x7FFF, 0x8000, 0x8001], np.uint32)
    fp32 = ((bf16_codes.astype(np.uint32)[:, None] << np.uint32(16)) | tails).ravel().view(np.float32)
    fp16 = bf16_codes.view(np.float16)
    for reals, dtype in ((fp32, tl.float32), (fp16, tl.float16)):
        _check_narrowing(reals, dtype, tl.bfloat16, torch.bfloat16, builder.create_fp_trunc)
    for fp8, torch_fp8 in FP8_DTYPES.items():
        convert = lambda handle, dtype: builder.create_fp_to_fp(handle, dtype, _RTNE)  # noqa: E731
        _check_widening(builder, bf16_codes[:256].astype(np.uint8), fp8, torch_fp8, convert)
        _check_narrowing(fp16.astype(np.float32), tl.float32, fp8, torch_fp8, convert)
    _check_known(builder)
    _check_operations(builder)


def _check_widening(builder: InterpreterBuilder, codes: np.ndarray, dtype: tl.dtype, torch_dtype: torch.dtype,
                    convert: Callable) -> None:
    wanted = torch.from_numpy(codes.copy()).view(torch_dtype).float().numpy()
    got = convert(TensorHandle(codes, dtype), tl.float32).data
    _compare(f"{dtype} -> fp32", codes, got, wanted)


def _check_narrowing(reals: np.ndarray, source: tl.dtype, dtype: tl.dtype, torch_dtype: torch.dtype,
                     convert: Callable) -> None:
    exact = torch.from_numpy(reals.copy()).float()
    limit = torch.finfo(torch_dtype).max
    limited = exact if dtype == tl.bfloat16 else exact.clamp(-limit, limit)
    wanted = limited.to(torch_dtype).float().numpy()
    got = values(convert(TensorHandle(reals, source), dtype).data, dtype)
    _compare(f"{source} -> {dtype}", reals, got, wanted)


def _check_known(builder: InterpreterBuilder) -> None:
    for value, dtype, code in _KNOWN:
        handle = TensorHandle(np.array([value], np.float32), tl.float32)
        convert = builder.create_fp_trunc(handle, dtype) if dtype == tl.bfloat16 else \
            builder.create_fp_to_fp(handle, dtype, _RTNE)
        _compare(f"fp32 -> code of {dtype}", handle.data, convert.data, np.array([code], convert.data.dtype))


def _check_operations(builder: InterpreterBuilder) -> None:
    """bf16 operands are values, not bit patterns; a tf32 dot rounds its operands."""
    reals = np.array([[-5.0, 2.5], [1.5, -0.25]], np.float32)
    handle = TensorHandle(storage(reals, tl.bfloat16), tl.bfloat16)
    zero = TensorHandle(np.zeros((2, 2), np.float32), tl.float32)
    cases = (("add", builder.create_fadd, reals + reals), ("mul", builder.create_fmul, reals * reals),
             ("maximum", builder.create_maximumf, reals))
    for name, operation, wanted in cases:
        _compare(f"bf16 {name}", reals, values(operation(handle, handle).data, tl.bfloat16), wanted)
    less = builder.create_fcmpOLT(handle, TensorHandle(storage(reals.T, tl.bfloat16), tl.bfloat16))
    _compare("bf16 less than", reals, less.data, reals < reals.T)
    product = builder.create_dot(handle, handle, zero, _PRECISION.IEEE, 0).data
    _compare("bf16 dot", reals, product, reals @ reals)
    identity = TensorHandle(np.eye(2, dtype=np.float32), tl.float32)
    beyond_tie = TensorHandle(np.full((2, 2), 1 + 2**-11 + 2**-20, np.float32), tl.float32)
    product = builder.create_dot(beyond_tie, identity, zero, _PRECISION.TF32, 0).data
    _compare("tf32 dot", beyond_tie.data, product, np.full((2, 2), 1 + 2**-10, np.float32))


def _compare(what: str, inputs: np.ndarray, got: np.ndarray, wanted: np.ndarray) -> None:
    """Equal bit for bit, where all NaN are equal and the sign of zero counts."""
    both_nan = (got != got) & (wanted != wanted)
    differ = ~both_nan & ((got != wanted) | (np.signbit(got) != np.signbit(wanted)) if got.dtype.kind == "f"
                          else got != wanted)
    if differ.any():
        index = tuple(np.argwhere(differ)[0])
        raise RuntimeError(f"interpreter self-test, {what}: input {inputs[index]!r} gives "
                           f"{got[index]!r}, but should give {wanted[index]!r}; Triton {triton.__version__} "
                           "is not handled by moe_fast.interpreter")
