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
    lane = 16 if bits <= 16 else 32
    words = random_words(problem_id, tensor, index, -(-count * lane // 64))
    lanes = words.astype("<u8").view(f"<i{lane // 8}")[:count]
    return (lanes >> (lane - bits)).astype(lanes.dtype.newbyteorder("="))


def grid_tensor(problem_id: str, tensor: str, shape: tuple[int, ...], dtype: Dtype, amplitude: float,
                index: int = 0) -> torch.Tensor:
    """A tensor uniform in [-amplitude, amplitude), every element exactly representable in `dtype`.

    amplitude must be a power of two. An element is amplitude * n / 2^p with p the significant bits of
    the format and |n| <= 2^p, so it uses the whole significand: tf32 or bf16 copies of fp32 inputs differ.
    """
    bits = SIGNIFICANT_BITS[dtype]
    integers = random_integers(problem_id, tensor, index, int(np.prod(shape, dtype=np.int64)), bits + 1)
    values = torch.from_numpy(integers).to(torch.float32).mul_(amplitude * 2.0**-bits)
    return values.to(TORCH_DTYPES[dtype]).reshape(shape)
