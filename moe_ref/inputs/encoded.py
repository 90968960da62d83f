"""Encoded weights drawn as codes and scales: nothing is encoded, so nothing is rounded.

Codes are all patterns of their bits but those that are no number, each as likely as the next. A scale is a mantissa
drawn at random times 2^-((3 e + 2 n + q) mod 5), so that it differs from those of every neighbour, along rows, along
columns and from expert to expert, and a scale read from a wrong place shows; a mantissa of formats that have none is 1.
"""

import numpy as np
import torch

from moe_ref.contract.encoded import CODE_DTYPES, Encoded, packed
from moe_ref.contract.schemes import ENCODINGS, Codes, Encoding, Scales
from moe_ref.contract.vocabulary import Data, Dtype, Scheme
from moe_ref.inputs.philox import random_integers, random_words

STEPS = 5
"""Exponents of scales: 0 to -4."""

RMS = {Codes.E4M3: 2.0**6, Codes.INT8: 2.0**6, Codes.INT4: 2.0**2, Codes.E2M1: 2.0**1}
"""About the root of the mean square of a code, less its zero point, as a power of two."""

SPREAD = {Scales.FP32: (-40, 6), Scales.E8M0: (-40, 6), Scales.HALF: (-40, 4), Scales.E4M3: (-4, 2)}
"""Exponents by which the scales of tiny and of huge rows differ from the others, in data extreme; those of fp16, which
has no more room below, by -6 and 2."""

_LARGEST = {Codes.E4M3: 0x7E, Codes.INT8: 127, Codes.INT4: 15, Codes.E2M1: 7}
_SECOND = 0xC8F5C3 * 2.0**-24
"""A second scale's significand: 24 bits, no power of two."""


def encoded_matrix(problem_id: str, name: str, scheme: Scheme, dtype: Dtype, data: Data, shape: tuple[int, ...],
                   amplitude: float, index: int) -> Encoded:
    """A matrix (N, K) or several (G, N, K) of expert `index`, whose elements are of the size of `amplitude`.

    amplitude: a power of two. dtype: of the model, whose scales are fp16 beside fp16, where a scheme has them in
    16 bits, and bf16 else. Data equal gives all blocks one scale, data extreme tiny and huge ones, runs of code 0, and
    rows of largest codes.
    """
    encoding = ENCODINGS[scheme]
    *leading, num_rows, num_columns = shape
    blocks = encoding.blocks(num_rows, num_columns)
    exponents = _exponents(encoding, data, dtype, (*leading, *blocks), index)
    base = float(np.log2(amplitude)) - float(np.log2(RMS[encoding.codes]))
    second = None
    if encoding.second:
        second = torch.full(tuple(leading), _SECOND * 2.0**(base - 2.0))
        base = 2.0
    scales = _scales(problem_id, name, encoding, data, dtype, exponents + int(base), index)
    zeros = groups = None
    if encoding.zeros:
        zeros = _integers(problem_id, name + "_zeros", (*leading, num_rows, blocks[1]), index, 4)
        zeros = torch.full_like(zeros, 5) if data is Data.EQUAL else zeros
    if encoding.order:
        assert encoding.columns is not None
        order = np.argsort(random_words(problem_id, name + "_groups", index, num_columns), kind="stable")
        group_K = torch.from_numpy(np.argsort(order, kind="stable") // encoding.columns).to(torch.int32)
        groups = group_K.expand(*leading, num_columns).contiguous()
    return Encoded(scheme=scheme, codes=_codes(problem_id, name, encoding, data, shape, index), scales=scales,
                   num_columns=num_columns, zeros=zeros, groups=groups, second_scale=second)


def input_scale(index: int, factor: float) -> torch.Tensor:
    """The fixed scale of the rows of expert `index`, fp32: 448 of it is from 2.6 to 3.0 times `factor`."""
    return torch.tensor((48 + (5 * index + 1) % 7) * 2.0**-13 * factor, dtype=torch.float32)


def _integers(problem_id: str, name: str, shape: tuple[int, ...], index: int, bits: int) -> torch.Tensor:
    """Uniform from 0 to 2^bits - 1, uint8."""
    drawn = random_integers(problem_id, name, index, int(np.prod(shape, dtype=np.int64)), bits)
    return torch.from_numpy((drawn + 2**(bits - 1)).astype(np.uint8)).reshape(shape)


def _codes(problem_id: str, name: str, encoding: Encoding, data: Data, shape: tuple[int, ...],
           index: int) -> torch.Tensor:
    codes = _integers(problem_id, name + "_codes", shape, index, 8 // encoding.codes.per_byte)
    if encoding.codes is Codes.E4M3:  # the two NaN become the largest number
        codes = torch.where(codes & 127 == 127, codes - 1, codes)
    if data is Data.EXTREME:
        sign = codes & (0x80 if encoding.codes is Codes.E4M3 else 8 if encoding.codes is Codes.E2M1 else 0)
        largest = _LARGEST[encoding.codes] | sign
        if encoding.codes in (Codes.INT8, Codes.INT4):
            lowest = 0x80 if encoding.codes is Codes.INT8 else 0
            largest = torch.where(codes % 2 == 1, _LARGEST[encoding.codes], lowest).to(torch.uint8)
        codes[..., 3::8, :] = largest[..., 3::8, :]
        codes[..., 5::8, :8] = 0
    return packed(codes) if encoding.codes.per_byte == 2 else codes.view(CODE_DTYPES[encoding.codes])


def _exponents(encoding: Encoding, data: Data, dtype: Dtype, shape: tuple[int, ...], index: int) -> torch.Tensor:
    """Of every block's scale, relative to the usual one, int64."""
    *leading, row_blocks, column_blocks = shape
    if data is Data.EQUAL:
        return torch.zeros(shape, dtype=torch.int64)
    place = torch.arange(row_blocks)[:, None] * 2 + torch.arange(column_blocks)
    for depth, count in enumerate(reversed(leading)):
        axis = torch.arange(count).view(-1, *[1] * (2 + depth))
        place = place + 3 * axis
    exponents = -((place + 3 * index) % STEPS)
    if data is Data.EXTREME and encoding.rows is not None and row_blocks > 1:
        tiny, huge = SPREAD[encoding.scales]
        tiny = max(tiny, -6) if dtype is Dtype.FP16 else tiny
        huge = min(huge, 2) if dtype is Dtype.FP16 else huge
        row = torch.arange(row_blocks)[:, None] % 8
        exponents = exponents + torch.where(row == 1, tiny, torch.where(row == 6, huge, 0))
    return exponents.broadcast_to(shape)


def _scales(problem_id: str, name: str, encoding: Encoding, data: Data, dtype: Dtype, exponents: torch.Tensor,
            index: int) -> torch.Tensor:
    shape = tuple(exponents.shape)
    if encoding.scales is Scales.E8M0:
        return (exponents + 127).clamp(0, 254).to(torch.uint8)
    half = torch.float16 if dtype is Dtype.FP16 else torch.bfloat16
    stored, bits = {Scales.FP32: (torch.float32, 23), Scales.E4M3: (torch.float8_e4m3fn, 3),
                    Scales.HALF: (half, 10 if half is torch.float16 else 7)}[encoding.scales]
    drawn = random_integers(problem_id, name + "_scales", index, int(np.prod(shape, dtype=np.int64)), bits)
    fraction = torch.from_numpy(drawn.astype(np.int64)).reshape(shape) + 2**(bits - 1)
    if data is Data.EQUAL:
        fraction = torch.full(shape, 2**bits // 3)
    mantissa = 1.0 + fraction.double() * 2.0**-bits
    return (mantissa * torch.exp2(exponents.double())).to(stored)
