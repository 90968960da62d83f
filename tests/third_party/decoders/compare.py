"""A decoder beside the oracle: random codes and scales, and every pattern of bits that a scale can have."""

from dataclasses import dataclass, replace

import torch

from moe_ref.contract.encoded import Encoded
from moe_ref.contract.schemes import ENCODINGS, Scales
from moe_ref.contract.vocabulary import Scheme
from moe_ref.oracle.decode import decode
from tests.made_encoded import bits, drawn
from tests.third_party.decoders.decoder import Decoder

ROWS, COLUMNS = 256, 384


@dataclass(frozen=True)
class Agreement:
    """What was compared, and the scales with which any value differs, as the integers of their bits."""

    values: int
    scales: int
    differs: frozenset[int]


def rounded_alike(encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
    """The exact values rounded once to that dtype; where there is a second scale the product of both scales is rounded
    to fp32 first, as everybody does."""
    if encoded.second_scale is None:
        return decode(encoded).to(dtype)
    one = torch.ones((), dtype=torch.float32)
    plain = replace(encoded, scales=torch.ones_like(encoded.scales.float()).to(encoded.scales.dtype), second_scale=one)
    scale = decode(replace(encoded, codes=torch.full_like(encoded.codes, 0x22)))  # code 2 is 1
    return (decode(plain) * scale.float().double()).to(dtype)


def wrong_rows(decoder: Decoder, encoded: Encoded) -> torch.Tensor:
    """Whether each row has a value that differs, NaN for NaN, but for the sign of a zero."""
    theirs = decoder.decode(encoded)
    ours = rounded_alike(encoded, theirs.dtype)
    assert theirs.shape == ours.shape
    return torch.from_numpy((bits(theirs.double() + 0.0) != bits(ours.double() + 0.0)).any(-1))


def random(scheme: Scheme, seed: int, half: torch.dtype = torch.float16) -> Encoded:
    """Whole blocks, as most decoders want them; the second scale a power of two for seed 0."""
    encoded = drawn(scheme, (ROWS, COLUMNS), seed, half=half)
    if encoded.second_scale is not None and seed == 0:
        return replace(encoded, second_scale=torch.tensor(0.125))
    return encoded


def every_scale(scheme: Scheme, finite: bool) -> tuple[Encoded, torch.Tensor]:
    """Random codes, and a row for each scale, all over the row: with the integers of their bits.

    Of fp32 the powers of two, subnormal ones too, and random numbers; finite: no infinity and no NaN, and no product
    with a code that would be.
    """
    kind = ENCODINGS[scheme].scales
    if kind is Scales.FP32:
        powers = torch.exp2(torch.arange(-149, 128).double()).float()
        random_bits = torch.randint(-2**31, 2**31, (747,), generator=torch.Generator().manual_seed(7))
        scales = torch.cat([powers, random_bits.int().view(torch.float32)])
    elif kind is Scales.HALF:
        scales = torch.arange(2**16).to(torch.int16).view(torch.float16)
    else:
        scales = torch.arange(256, dtype=torch.uint8)
        scales = scales.view(torch.float8_e4m3fn) if kind is Scales.E4M3 else scales
    if finite:
        scales = scales.where(scales.abs() < (2.0**118 if kind is Scales.FP32 else torch.inf), 1)
    columns = 128 if ENCODINGS[scheme].columns != 32 else 32
    encoded = drawn(scheme, (len(scales), columns), 3)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[scales.element_size()]
    scales_N = scales[:, None].expand(-1, encoded.scales.shape[-1]).contiguous()
    second = None if encoded.second_scale is None else torch.tensor(0.125)
    return replace(encoded, scales=scales_N, second_scale=second), scales.view(integer).long()


def agreement(decoder: Decoder, scheme: Scheme) -> Agreement:
    """Random matrices must agree everywhere, raising AssertionError; of every scale it is said which do not.

    Schemes with a scale for several rows have no row for every scale: random ones alone.
    """
    values = 0
    halves = (torch.float16, torch.bfloat16) if ENCODINGS[scheme].scales is Scales.HALF else (torch.float16,)
    for half in halves:
        for seed in range(2 if scheme is not Scheme.NVFP4 or decoder.exact_second else 1):
            encoded = random(scheme, seed, half)
            wrong = wrong_rows(decoder, encoded)
            assert not wrong.any(), f"{decoder.function} [{scheme}]: {int(wrong.sum())} of {ROWS} rows differ"
            values += ROWS * COLUMNS
    if ENCODINGS[scheme].rows != 1:
        return Agreement(values, 0, frozenset())
    encoded, integers = every_scale(scheme, decoder.multiplies)
    wrong = wrong_rows(decoder, encoded)
    return Agreement(values + encoded.codes.shape[0] * encoded.num_columns, len(integers.unique()),
                     frozenset(integers[wrong].tolist()))
