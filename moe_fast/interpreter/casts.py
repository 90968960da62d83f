"""Conversions between the interpreter's storage (bf16 as uint16, fp8 as uint8) and real values.

The interpreter of Triton 3.6 to 3.8 truncates fp32 -> bf16, loses the mantissa carry of fp8 casts (1.984 ->
1.0), flushes subnormals and misreads NaN (triton-lang/triton #8322; the open pull request #11897 mends the
fp8 part). Delete this file when the oldest supported Triton passes the `upstream` tests of
tests/test_interpreter.py.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as upstream

from moe_fast.interpreter.memo import np_dtype

FP8_DTYPES: dict[tl.dtype, torch.dtype] = {
    tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz, tl.float8e5b16: torch.float8_e5m2fnuz,
}
_ENCODED = frozenset(dtype.name for dtype in (tl.bfloat16, *FP8_DTYPES))
_FP8_MAX = {dtype: torch.finfo(torch_dtype).max for dtype, torch_dtype in FP8_DTYPES.items()}
_FP8_VALUES = {dtype: torch.arange(256, dtype=torch.uint8).view(torch_dtype).float().numpy()
               for dtype, torch_dtype in FP8_DTYPES.items()}
_HALF_WORD, _ONE, _BELOW_HALF = np.uint32(16), np.uint32(1), np.uint32(0x7FFF)
_BF16_NAN = np.uint16(0x7FC0)
_RTZ = upstream._ir.ROUNDING_MODE.RTZ


def is_encoded(dtype: tl.dtype) -> bool:
    """True for the dtypes that NumPy lacks, stored as bit patterns: bf16 and four fp8 formats."""
    return dtype.name in _ENCODED


def values(data: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Storage of `dtype` as real values: fp32 for bf16 and fp8 (exact), unchanged for NumPy's own dtypes."""
    if dtype == tl.bfloat16:
        bits = data.astype(np.uint32)
        bits <<= _HALF_WORD
        return bits.view(np.float32)
    table = _FP8_VALUES.get(dtype)
    return data if table is None else table[data]


def storage(reals: np.ndarray, dtype: tl.dtype, rounding: object = None) -> np.ndarray:
    """Real values as storage of `dtype`, rounded once to nearest even (toward zero with RTZ); fp8 saturates.

    The fp8 rule is cvt.rn.satfinite of the PTX ISA: infinities become the largest finite value, NaN stays
    NaN.
    """
    nearest = _nearest(reals, dtype)
    return _toward_zero(reals, nearest, dtype) if rounding == _RTZ else nearest


def _nearest(reals: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    if dtype == tl.bfloat16:
        return _bf16(_single(reals)).reshape(reals.shape)
    if dtype in FP8_DTYPES:
        # clamp keeps NaN and turns infinities into the largest finite value
        limited = _as_torch(reals).clamp(-_FP8_MAX[dtype], _FP8_MAX[dtype])
        return limited.to(FP8_DTYPES[dtype]).view(torch.uint8).numpy().reshape(reals.shape)
    return reals.astype(np_dtype(dtype), copy=False)


def _bf16(reals: np.ndarray) -> np.ndarray:
    """Codes of fp32, to nearest even by a carry out of the lower half; torch takes ten times as long for a tile."""
    bits = reals.view(np.uint32)
    codes = ((bits + (((bits >> _HALF_WORD) & _ONE) + _BELOW_HALF)) >> _HALF_WORD).astype(np.uint16)
    if (unknown := np.isnan(reals)).any():
        codes[unknown] = _BF16_NAN
    return codes


def _as_torch(reals: np.ndarray) -> torch.Tensor:
    """fp32 that rounds to fp8 as `reals` would."""
    contiguous = _single(reals)
    # torch warns about read-only memory, which np.broadcast_to returns
    return torch.from_numpy(contiguous if contiguous.flags.writeable else contiguous.copy())


def _single(reals: np.ndarray) -> np.ndarray:
    """Contiguous fp32 that rounds to bf16 and fp8 as `reals` would."""
    if reals.dtype.kind in "iu" and reals.dtype.itemsize > 2:
        reals = reals.astype(np.float64)
    if reals.dtype == np.float64:
        reals = _round_to_odd(reals)
    return np.ascontiguousarray(reals, dtype=np.float32)


def _round_to_odd(reals: np.ndarray) -> np.ndarray:
    """fp64 -> fp32 so that a second rounding gives the correctly rounded result: an inexact value gets an odd
    code.

    Boldo and Melquiond, Emulation of a FMA and Correctly Rounded Sums, IEEE Transactions on Computers 57
    (2008).
    """
    nearest = reals.astype(np.float32)
    codes = _toward_zero(reals, nearest, tl.float32).view(np.uint32)
    return (codes | ((nearest != reals) & (reals == reals)).astype(np.uint32)).view(np.float32)


def _toward_zero(reals: np.ndarray, nearest: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Step back one code where rounding went away from zero; an overflow becomes the largest finite value."""
    unsigned = np.dtype(f"uint{nearest.dtype.itemsize * 8}")
    codes = nearest.view(unsigned).copy()
    with np.errstate(invalid="ignore"):
        codes[np.abs(values(nearest, dtype)) > np.abs(reals)] -= unsigned.type(1)
    return codes.view(nearest.dtype)


def round_to_tf32(reals: np.ndarray) -> np.ndarray:
    """fp32 rounded to the 10 explicit mantissa bits of tf32, nearest even; NaN and infinity unchanged."""
    bits = np.ascontiguousarray(reals, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(reals), rounded.view(np.float32), reals)
