"""Encoded matrices decoded a second time, from the bits of codes and scales by the definitions of the formats.

Nothing here converts by torch or NumPy: a number is sign * significand * 2^exponent, put together from its fields, and
an element finds its block by counting from the start of the first one.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from moe_ref.contract.encoded import Encoded
from moe_ref.contract.schemes import ENCODINGS, Codes, Scales


@dataclass(frozen=True)
class Binary:
    """A floating-point format of a sign, exponent bits and fraction bits.

    top: what the largest exponent field stands for: infinity and NaN as in IEEE 754, NaN where all bits are set
    (e4m3 of OCP FP8), or numbers as any other.
    """

    exponent_bits: int
    fraction_bits: int
    top: Literal["ieee", "all ones", "numbers"] = "ieee"

    def numbers(self, bits: np.ndarray) -> np.ndarray:
        """What integers of 1 + exponent_bits + fraction_bits bits stand for, fp64."""
        bits = bits.astype(np.int64)
        most = 2**self.exponent_bits - 1
        fraction = bits % 2**self.fraction_bits
        field = bits >> self.fraction_bits & most
        sign = np.where(bits >> self.fraction_bits + self.exponent_bits & 1, -1.0, 1.0)
        whole = np.where(field > 0, fraction + 2**self.fraction_bits, fraction)
        bias = 2**(self.exponent_bits - 1) - 1
        value = sign * np.ldexp(whole.astype(np.float64), np.maximum(field, 1) - bias - self.fraction_bits)
        if self.top == "ieee":
            return np.where(field == most, np.where(fraction > 0, np.nan, sign * np.inf), value)
        if self.top == "all ones":
            return np.where((field == most) & (fraction == 2**self.fraction_bits - 1), np.nan, value)
        return value


E2M1, E4M3 = Binary(2, 1, "numbers"), Binary(4, 3, "all ones")
FP16, BF16, FP32 = Binary(5, 10), Binary(8, 7), Binary(8, 23)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    """The bits of every element as an integer that is not negative."""
    size = tensor.element_size()
    return tensor.contiguous().view(INTEGERS[size]).numpy().astype(np.int64) % 2**(8 * size)


def scale_numbers(scales: torch.Tensor, kind: Scales) -> np.ndarray:
    """Scales as numbers, fp64."""
    bits = bits_of(scales)
    if kind is Scales.E8M0:
        return np.where(bits == 255, np.nan, np.ldexp(1.0, bits - 127))
    if kind is Scales.HALF:
        return (FP16 if scales.dtype == torch.float16 else BF16).numbers(bits)
    return (E4M3 if kind is Scales.E4M3 else FP32).numbers(bits)


def code_numbers(encoded: Encoded, codes: Codes) -> np.ndarray:
    """Codes as numbers, (L, N, K): of int4 the 16 of them as they are stored, without their zero point."""
    stored = bits_of(encoded.codes)
    if codes is Codes.INT8:
        return np.where(stored < 128, stored, stored - 256).astype(np.float64)
    if codes is Codes.E4M3:
        return E4M3.numbers(stored)
    halves = np.empty((*stored.shape[:-1], 2 * stored.shape[-1]), np.int64)
    halves[..., 0::2], halves[..., 1::2] = stored % 16, stored // 16
    halves = halves[..., :encoded.num_columns]
    return E2M1.numbers(halves) if codes is Codes.E2M1 else halves.astype(np.float64)


def blocks_of(count: int, start: int, size: int | None) -> np.ndarray:
    """The number of the block that each of `count` elements lies in, counted one by one."""
    found, block, inside = [], 0, start
    for _ in range(count):
        if inside == size:
            block, inside = block + 1, 0
        found.append(block)
        inside += 1
    return np.array([0] * count if size is None else found, np.int64)


def decode(encoded: Encoded) -> np.ndarray:
    """second scale * scale[block] * (code - zero[block]), (L, N, K) in fp64."""
    encoding = ENCODINGS[encoded.scheme]
    number = code_numbers(encoded, encoding.codes)
    *leading, num_rows, num_columns = number.shape
    row = blocks_of(num_rows, encoded.row_start, encoding.rows)
    column = blocks_of(num_columns, encoded.column_start, encoding.columns)
    scale = scale_numbers(encoded.scales, encoding.scales)
    value = np.empty(number.shape)
    for place in np.ndindex(*leading):
        at = column if encoded.groups is None else bits_of(encoded.groups)[place]
        steps = number[place]
        if encoding.codes is Codes.INT4:
            steps = steps - (8.0 if encoded.zeros is None else bits_of(encoded.zeros)[place][:, at].astype(np.float64))
        with np.errstate(invalid="ignore"):  # zero times an infinite scale is NaN
            value[place] = steps * scale[place][row][:, at]
        if encoded.second_scale is not None:
            value[place] *= FP32.numbers(bits_of(encoded.second_scale[place]))
    return value
