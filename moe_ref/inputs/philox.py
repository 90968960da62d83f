"""Random integers mapped exactly onto a storage grid.

The bits come from NumPy's Philox4x64-10 bit generator (Salmon et al. 2011), keyed by SHA-256 of the
problem id, the tensor's name and the expert; NumPy guarantees the raw stream of a bit generator
across versions. No normal distribution, no transcendental function: both differ between libraries.
"""

import hashlib

import numpy as np
import torch

from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.vocabulary import Dtype

SIGNIFICANT_BITS = {Dtype.FP32: 24, Dtype.FP16: 11, Dtype.BF16: 8}


def random_words(problem_id: str, tensor: str, index: int, count: int) -> np.ndarray:
    """`count` uint64 words of the stream that belongs to (problem id, tensor name, index)."""
    digest = hashlib.sha256(f"{problem_id}|{tensor}|{index}".encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)


def random_integers(problem_id: str, tensor: str, index: int, count: int, bits: int) -> np.ndarray:
    """`count` integers, uniform in [-2^(bits-1), 2^(bits-1)), from the top bits of 16- or 32-bit lanes."""
    lanes = _lanes(problem_id, tensor, index, count, 16 if bits <= 16 else 32)
    return lanes >> (lanes.dtype.itemsize * 8 - bits)


def _lanes(problem_id: str, tensor: str, index: int, count: int, width: int) -> np.ndarray:
    words = random_words(problem_id, tensor, index, -(-count * width // 64))
    lanes = words.astype("<u8").view(f"<i{width // 8}")[:count]
    return lanes.astype(lanes.dtype.newbyteorder("="), copy=False)


SHIFTS = 4
"""Exponents an element may have: 0, -1, -2, -3."""


def grid_tensor(problem_id: str, tensor: str, shape: tuple[int, ...], dtype: Dtype, amplitude: float,
                index: int = 0) -> torch.Tensor:
    """A tensor in [-amplitude, amplitude), every element exactly representable in `dtype`; amplitude a power of two.

    An element is amplitude * n / 2^p * 2^-s: p the significant bits of the format, n uniform with |n| <= 2^p,
    s uniform in 0..3. n uses the whole significand, so that tf32 or bf16 copies of fp32 inputs differ; s spreads the
    products over so many binary places that sums of them must be rounded in fp32 (of integers alone,
    2000 products of bf16 numbers would still be exact, and hide how a kernel accumulates).
    """
    bits, count = SIGNIFICANT_BITS[dtype], int(np.prod(shape, dtype=np.int64))
    lanes = _lanes(problem_id, tensor, index, count, 16 if bits < 16 else 32)
    integers, shifts = lanes >> (lanes.dtype.itemsize * 8 - bits - 1), lanes & (SHIFTS - 1)
    # n * 2^(3 - s) still fits the lane, and fp32 holds it exactly: no more than p significant bits.
    scaled = torch.from_numpy(np.left_shift(integers, SHIFTS - 1 - shifts)).to(torch.float32)
    values = scaled.mul_(amplitude * 2.0 ** -(bits + SHIFTS - 1))
    return values.to(TORCH_DTYPES[dtype]).reshape(shape)
