"""Encoded matrices of random codes and scales, and the comparison of two results bit for bit."""

import numpy as np
import torch

from moe_ref.contract.encoded import CODE_DTYPES, Encoded, packed
from moe_ref.contract.schemes import ENCODINGS, Codes, Scales
from moe_ref.contract.vocabulary import Scheme

SCHEMES = tuple(ENCODINGS)


def drawn(scheme: Scheme, shape: tuple[int, ...], seed: int = 0, row_start: int = 0, column_start: int = 0,
          half: torch.dtype = torch.float16) -> Encoded:
    """(L, N, K): all codes but NaN; scales of all signs and sizes that are finite, those of e8m0 up to 2^60."""
    generator, encoding = torch.Generator().manual_seed(seed), ENCODINGS[scheme]
    *leading, num_rows, num_columns = shape
    codes = torch.randint(256 if encoding.codes.per_byte == 1 else 16, shape, generator=generator, dtype=torch.uint8)
    if encoding.codes is Codes.E4M3:
        codes[codes % 128 == 127] -= 1
    codes = codes.view(CODE_DTYPES[encoding.codes]) if encoding.codes.per_byte == 1 else packed(codes)
    blocks = encoding.blocks(num_rows, num_columns, row_start, column_start)
    second = torch.rand(leading, generator=generator).add(0.5) if encoding.second else None
    zeros = groups = None
    if encoding.zeros:
        zeros = torch.randint(16, (*leading, num_rows, blocks[1]), generator=generator, dtype=torch.uint8)
    if encoding.order:
        groups = torch.rand((*leading, num_columns), generator=generator).argsort(-1).div(
            encoding.columns, rounding_mode="floor").int()
    return Encoded(scheme=scheme, codes=codes, scales=_scales(encoding.scales, (*leading, *blocks), half, generator),
                   zeros=zeros, groups=groups, second_scale=second, num_columns=num_columns, row_start=row_start,
                   column_start=column_start)


def _scales(kind: Scales, shape: tuple[int, ...], half: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if kind is Scales.E8M0:
        return torch.randint(67, 188, shape, generator=generator, dtype=torch.uint8)
    sizes = torch.exp2(torch.randint(-9, 8, shape, generator=generator).float())
    signs = torch.rand(shape, generator=generator).sub(0.2).sign()
    numbers = sizes * torch.rand(shape, generator=generator).add(1) * signs
    return numbers.to({Scales.FP32: torch.float32, Scales.HALF: half, Scales.E4M3: torch.float8_e4m3fn}[kind])


def bits(values: torch.Tensor | np.ndarray) -> np.ndarray:
    """fp64 as integers, every NaN the same one; zeros keep their sign."""
    array = np.asarray(values, np.float64)
    return np.where(np.isnan(array), np.int64(-1), array.view(np.int64))


def same_tensors(one: Encoded, other: Encoded) -> bool:
    """Whether both have the same codes, scales and what goes with them, to the bit."""
    return one.tensors.keys() == other.tensors.keys() and all(
        tensor.shape == other.tensors[name].shape and tensor.dtype == other.tensors[name].dtype
        and torch.equal(tensor.flatten().view(torch.uint8), other.tensors[name].flatten().view(torch.uint8))
        for name, tensor in one.tensors.items())


def same(one: torch.Tensor | np.ndarray, other: torch.Tensor | np.ndarray) -> bool:
    """Whether shapes and all bits agree."""
    return one.shape == other.shape and bool((bits(one) == bits(other)).all())
