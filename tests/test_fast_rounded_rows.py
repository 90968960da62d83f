"""Numbers and rows as codes of e4m3 in the fast path: codes and scales to the bit, as a torch double makes them."""

from math import inf, nan

import pytest
import torch
import triton
import triton.language as tl

from moe_fast.interpreter import interpret
from moe_fast.kernels import round_rows as rounding
from moe_fast.kernels.align import align
from moe_fast.kernels.e4m3 import e4m3_as_half, e4m3_of, scale_in_single
from moe_fast.operators.scaled import SCHEMES
from moe_ref.contract.vocabulary import Scheme

TENSOR, ROW, BLOCK, MX = SCHEMES
SIZES = {TENSOR: 0, ROW: 0, BLOCK: 128, MX: 32}
"""Columns that share a scale; 0: all of a row."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
E4M3 = torch.float8_e4m3fn


# One number


@triton.jit
def every_number_kernel(values, codes, halves, scales, SIZE: tl.constexpr):
    """Codes of fp32 numbers, the numbers of these codes, and what their bytes are as power-of-two scales."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    code = e4m3_of(tl.load(values + at))
    tl.store(codes + at, code)
    tl.store(halves + at, e4m3_as_half(code))
    tl.store(scales + at, scale_in_single(code))


def through_kernel(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    found = (torch.empty(len(values), dtype=dtype) for dtype in (torch.uint8, torch.float16, torch.float32))
    codes, halves, scales = found
    interpret(every_number_kernel, (len(values) // 256,), {"values": values, "codes": codes, "halves": halves,
                                                           "scales": scales, "SIZE": 256})
    return codes, halves, scales


def test_every_code_and_every_border_between_two() -> None:
    """Each code's own number, the middles between neighbours, and the fp32 numbers beside these, of both signs.

    Middles go to the even code; beyond 448 codes saturate, also where nearest would be the NaN of that format.
    """
    numbers = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    exact = torch.cat([numbers, middles, torch.tensor([448.0, 464.0, 465.0, 480.0, 3e38, 2.0**-149, 2.0**-11])])
    beside = [torch.nextafter(exact, torch.tensor(far)) for far in (inf, -inf)]
    values = torch.cat([exact, *beside])
    values = torch.nn.functional.pad(torch.cat([values, -values]), (0, -2 * len(values) % 256))
    codes, halves, _ = through_kernel(values)
    expected = values.clamp(-448, 448).to(E4M3)
    assert torch.equal(codes, expected.view(torch.uint8))
    assert torch.equal(halves.float(), expected.float())
    assert len(set(codes.tolist())) == 2 * 127


def test_nan_stays_nan() -> None:
    """A quotient may be infinite where a number is finite and its scale small: that saturates."""
    codes, halves, _ = through_kernel(torch.tensor([nan, inf, -inf, 1.0]).repeat(64))
    assert (codes & 0x7F).tolist() == [0x7F, 0x7E, 0x7E, 0x38] * 64
    assert halves.isnan().tolist() == [True, False, False, False] * 64


def test_every_power_of_two_scale() -> None:
    """Of all bytes that codes can be; 2^-127 is subnormal, and a byte of 255 would be NaN."""
    codes, _, scales = through_kernel(torch.arange(256, dtype=torch.uint8).view(E4M3).float())
    exponents = codes.double() - 127
    assert torch.equal(torch.where(codes == 255, nan, exponents.exp2()).nan_to_num(-1), scales.double().nan_to_num(-1))


# Rows


def expected_rows(rows_RK: torch.Tensor, scheme: Scheme, column_start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The rules of Numerics.products in plain torch: codes as numbers, and scales of blocks."""
    values = rows_RK.float()
    size = SIZES[scheme] or values.shape[1]
    padded = torch.nn.functional.pad(values, (column_start, -(column_start + values.shape[1]) % size))
    blocks = padded.unflatten(1, (-1, size))
    largest = torch.where(blocks.isfinite(), blocks, 0).abs().amax(2)
    scales = largest / 448
    if scheme is MX:
        mantissa, exponent = torch.frexp(largest.double() / 448)
        scales = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int()).float()
    scales = torch.where(scales < 2.0**-126, 1.0, scales)
    spread = scales.repeat_interleave(size, 1)[:, column_start:column_start + values.shape[1]]
    return torch.where(values.isfinite(), codes_of(values, spread), nan), scales


def codes_of(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Clamped, which keeps NaN."""
    return (values / scales).clamp(-448, 448).to(E4M3).float()


def wide_rows(num_columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of usual, tiny, huge and mixed sizes, of zeros, of one number alone, and of numbers that are powers of 2."""
    generator = torch.Generator().manual_seed(num_columns)
    rows = torch.randn(11, num_columns, generator=generator, dtype=torch.float64)
    rows[1] *= 2.0**-14
    rows[2] *= 2.0**13
    rows[3] *= torch.randint(-12, 12, (num_columns,), generator=generator).double().exp2()
    rows[4] = 0
    rows[5], rows[5, num_columns // 2] = 0, -3
    rows[6] = rows[6].sign() * 448 * 2.0**-5
    rows[7] = torch.where(rows[7] > 0, 1.0, -1.0)
    rows[8] *= 2.0**-124  # subnormal scales in formats that reach so far; zeros in fp16
    rows[9] = rows[9].sign() * 1.75 * 2.0**-119 * (1 + (torch.arange(num_columns) % 2))
    rows[10] = -0.0
    return rows.to(dtype)


def rounded(rows_RK: torch.Tensor, scheme: Scheme, column_start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """By the kernel, of tokens."""
    ids_T1 = torch.zeros(len(rows_RK), 1, dtype=torch.int64)
    found = rounding.round_rows(rows_RK, scheme, column_start, None, align(ids_T1, ids_T1[0], 16), 1)
    return found.codes_RK.view(E4M3).float(), found.scales_RB


@pytest.mark.sampled(every=7)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scheme", "column_start"), [(ROW, 0), (BLOCK, 0), (BLOCK, 72), (MX, 0), (MX, 8)])
@pytest.mark.parametrize("num_columns", [24, 128, 200, 1100])
def test_codes_and_scales_of_rows(scheme: Scheme, column_start: int, num_columns: int, dtype: torch.dtype) -> None:
    """To the bit, whatever the sizes, and also where blocks begin before the first column."""
    rows_RK = wide_rows(num_columns, dtype)
    codes_RK, scales_RB = rounded(rows_RK, scheme, column_start)
    expected_codes, expected_scales = expected_rows(rows_RK, scheme, column_start)
    assert torch.equal(scales_RB, expected_scales)
    assert torch.equal(codes_RK, expected_codes)
    assert torch.equal(codes_RK.signbit(), rows_RK.signbit())
    assert bool((scales_RB[10] == 1).all())


def test_every_bf16_number_under_a_fixed_scale() -> None:
    """Each of 2^16, by experts of several scales; what is beyond 448 of them saturates, an infinity too."""
    rows_RK = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).view(256, 256)
    ids_T1, scale_E = torch.arange(256)[:, None] % 3, torch.tensor([1.0, 2.0**-20, 0.3])
    alignment = align(ids_T1, torch.arange(3), 16)
    found = rounding.round_rows(rows_RK, TENSOR, 0, scale_E, alignment, 1)
    rows = alignment.sorted_rows_R.long()
    expected = codes_of(rows_RK.float(), scale_E[ids_T1])[rows]
    assert torch.equal(found.codes_RK.float().nan_to_num(1000), expected.nan_to_num(1000))
    assert torch.equal(found.scales_RB, scale_E[ids_T1][rows])


@pytest.mark.parametrize("scheme", [ROW, BLOCK, MX])
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_what_is_not_finite_has_no_part_in_a_scale(scheme: Scheme, bad: float) -> None:
    """Its own code is NaN; all other codes of the row are those that they would be beside a zero."""
    rows_RK = torch.randn(3, 300, generator=torch.Generator().manual_seed(1))
    rows_RK[1, 130] = 0
    clean_codes, clean_scales = rounded(rows_RK, scheme)
    rows_RK[1, 130] = bad
    codes_RK, scales_RB = rounded(rows_RK, scheme)
    assert torch.equal(scales_RB, clean_scales)
    assert codes_RK.isnan().nonzero().tolist() == [[1, 130]]
    assert torch.equal(codes_RK.nan_to_num(0), clean_codes)
