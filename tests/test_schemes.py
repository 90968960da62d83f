"""Encoders: every rounding is the format's, every scale its definition's, and no other code would have been nearer."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from moe_ref.contract.encoded import Encoded, check_encoded, unpacked
from moe_ref.contract.errors import UsageTypeError, UsageValueError
from moe_ref.contract.schemes import ENCODINGS, Codes
from moe_ref.contract.vocabulary import Format, Scheme
from moe_ref.numerics import scaled
from moe_ref.numerics.formats import round_to
from moe_ref.oracle.decode import decode
from moe_ref.schemes import awq, fp8, gptq, int8, mx, nvfp4
from moe_ref.schemes.blocks import e2m1, e4m3
from moe_ref.schemes.encode import ENCODERS, encode
from tests.double import encoded as double
from tests.made_encoded import SCHEMES, same, same_tensors

NUMBERS = {
    Codes.E4M3: np.array([one for one in double.E4M3.numbers(np.arange(256)) if not math.isnan(one)]),
    Codes.E2M1: double.E2M1.numbers(np.arange(16)), Codes.INT8: np.arange(-127.0, 128), Codes.INT4: np.arange(16.0)}
"""What codes that an encoder may give stand for, in the order of their size, zero points not taken off."""


def matrix(*shape: int, seed: int = 1) -> torch.Tensor:
    """fp32: rows of zeros, tiny and huge rows, a row of one sign, one large element among small ones, and the rest."""
    w_NK = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    w_NK[..., 0, :] = 0
    w_NK[..., 1, :] *= 2.0**-20
    w_NK[..., 2, :] *= 2.0**12
    w_NK[..., 3, :] = w_NK[..., 3, :].abs() + 1
    w_NK[..., 4, 7] = 300
    return w_NK


def every_bf16() -> torch.Tensor:
    """All finite ones, fp32."""
    every = torch.arange(2**16).to(torch.int16).view(torch.bfloat16).float()
    return every[every.isfinite()]


def around_midpoints(numbers: np.ndarray) -> torch.Tensor:
    """Between all neighbours of a format: the midpoint, and the fp32 numbers next to it on both sides."""
    ordered = np.unique(numbers)
    middle = ((ordered[1:] + ordered[:-1]) / 2).astype(np.float32)
    both = [np.nextafter(middle, np.float32(side)) for side in (-np.inf, np.inf)]
    return torch.from_numpy(np.concatenate([middle, *both]))


# Rounding to a format.


@pytest.mark.parametrize("codes", [Codes.E4M3, Codes.E2M1])
def test_rounding_is_that_of_ml_dtypes(codes: Codes) -> None:
    """Over all bf16 numbers, all midpoints and their neighbours, code for code, zeros with their sign. Where ml_dtypes
    has NaN beyond the largest e4m3, a quantiser saturates."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed; should be that of constraints.txt")
    values = torch.cat([every_bf16(), around_midpoints(NUMBERS[codes])])
    limit = float(NUMBERS[codes].max())
    theirs = values.clamp(-limit, limit).numpy().astype(
        ml_dtypes.float8_e4m3fn if codes is Codes.E4M3 else ml_dtypes.float4_e2m1fn).view(np.uint8)
    ours = e4m3(values).view(torch.uint8) if codes is Codes.E4M3 else unpacked(e2m1(values[None]), len(values))[0]
    assert np.array_equal(ours.numpy(), theirs)


@pytest.mark.parametrize("codes", [Codes.E4M3, Codes.E2M1])
def test_rounding_is_to_the_nearest_even(codes: Codes) -> None:
    """The same numbers without another library: no code is nearer, and of two as near it is the one with an even
    fraction, which is an even code."""
    values = torch.cat([every_bf16(), around_midpoints(NUMBERS[codes])])
    values = values[values.abs() <= float(NUMBERS[codes].max())]
    ours = e4m3(values).view(torch.uint8) if codes is Codes.E4M3 else unpacked(e2m1(values[None]), len(values))[0]
    table = double.E4M3.numbers(np.arange(127)) if codes is Codes.E4M3 else double.E2M1.numbers(np.arange(8))
    size, chosen = values.abs().double().numpy(), ours.numpy() % (128 if codes is Codes.E4M3 else 8)
    off = np.abs(table[chosen] - size)
    for step in (-1, 1):
        other = np.clip(chosen.astype(int) + step, 0, len(table) - 1)
        other_off = np.abs(table[other] - size)
        assert bool(((off < other_off) | (other == chosen) | (off == other_off) & (chosen % 2 == 0)).all())


def test_e4m3_is_the_harness_own_rounding() -> None:
    """Bounds are made with round_to; a quantiser that rounds otherwise would be judged by another grid."""
    values = torch.cat([every_bf16(), around_midpoints(NUMBERS[Codes.E4M3])])
    assert same(e4m3(values).double(), round_to(values.double(), Format.E4M3))


@pytest.mark.parametrize("rounding", ["floor", "ceil"])
@pytest.mark.parametrize(("scheme", "last", "emax"), [(Scheme.MXFP4, 6, 2), (Scheme.MXFP8, 448, 8)])
def test_exponents_of_mx_scales(scheme: Scheme, last: int, emax: int, rounding: mx.Rounding) -> None:
    """Of every bf16 number as the largest of its block, and of the numbers next to the largest code times a power of
    two, in exact fractions: floor(log2(amax)) - emax (OCP Microscaling 1.0, section 6.3), or the least power of two
    with which amax is no more than the last code."""
    powers = np.ldexp(np.float32(last), np.arange(-120, 100)).astype(np.float32)
    edges = [np.nextafter(powers, np.float32(side)) for side in (0, np.inf)]
    amax = torch.cat([every_bf16().abs().unique(), torch.from_numpy(np.concatenate([powers, *edges]))])
    scales = mx.encode(scheme, amax[:, None], rounding=rounding).scales[:, 0].tolist()

    def wanted(value: float) -> int:
        if value == 0:
            return 127
        exponent = math.frexp(value)[1] - 1 - emax
        if rounding == "ceil":
            exponent -= 1
            while Fraction(value) > last * Fraction(2) ** exponent:
                exponent += 1
        return min(max(exponent, -127), 127) + 127

    assert scales == [wanted(value) for value in amax.tolist()]


# Scales and codes of a matrix.


@pytest.mark.parametrize("shape", [
    pytest.param((2, 3, 131, 261), marks=pytest.mark.nightly("smaller matrices run by default")), (6, 33)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_other_code_is_nearer(scheme: Scheme, shape: tuple[int, ...]) -> None:
    """With the block's scale and zero point, up to the quotient's rounding to fp32: so an element is off by half a step
    at most, or by what lies beyond the last code."""
    w_NK = matrix(*shape)
    encoded, encoding = encode(scheme, w_NK), ENCODINGS[scheme]
    check_encoded("matrix", encoded, scheme, tuple(w_NK.shape))
    error = np.abs(decode(encoded).numpy() - w_NK.double().numpy())
    for code in NUMBERS[encoding.codes]:
        off = np.abs(double.decode(with_code(encoded, code)) - w_NK.double().numpy())
        assert bool((error <= off + 2.0**-23 * w_NK.abs().numpy()).all()), code


def with_code(encoded: Encoded, number: float) -> Encoded:
    """The same scales, and every code the one of that number."""
    encoding = ENCODINGS[encoded.scheme]
    if encoding.codes is Codes.INT8:
        codes = torch.full_like(encoded.codes, int(number))
    elif encoding.codes is Codes.E4M3:
        codes = torch.full(encoded.codes.shape, number).to(torch.float8_e4m3fn)
    else:
        codes = torch.full_like(encoded.codes, 17 * int(np.argmax(NUMBERS[encoding.codes] == number)))
    return Encoded(**{**vars(encoded), "codes": codes})


DOCUMENTED = {Codes.E4M3: 16.0, Codes.INT8: 0.5, Codes.INT4: 0.5 + 15 * 2.0**-11, Codes.E2M1: 1.0}
"""Half of the largest step, in units of a scale, and the rounding of fp16 scales."""
SATURATING = {Scheme.MXFP8: 64.0, Scheme.MXFP4: 2.0}


def scales_off(encoded: Encoded, w_NK: torch.Tensor) -> float:
    """The largest error, in units of its block's scale."""
    unit = double.decode(with_code(encoded, 1.0)) - double.decode(with_code(encoded, 0.0))
    return float((np.abs(decode(encoded).numpy() - w_NK.double().numpy()) / unit).max())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_documented_error(scheme: Scheme) -> None:
    """Half a step of the block, or what lies beyond the last code: 64 scales of mxfp8 and 2 of mxfp4, whose scales are
    rounded down; with mx scales rounded up, half a step. It is no looser than it must be."""
    w_NK, half = matrix(2, 131, 261), DOCUMENTED[ENCODINGS[scheme].codes]
    w_NK[..., 1, :] = 1  # too small for normal scales in 16 bits or e4m3
    found, bound = scales_off(encode(scheme, w_NK), w_NK), SATURATING.get(scheme, half)
    assert 0.9 * bound < found <= bound * (1 + 2.0**-20)
    if scheme in SATURATING:
        assert 0.9 * half < scales_off(mx.encode(scheme, w_NK, rounding="ceil"), w_NK) <= half


@pytest.mark.parametrize(("scheme", "rule"), [(Scheme.FP8_TENSOR, scaled.PER_TENSOR), (Scheme.FP8_ROW, scaled.PER_ROW),
                                              (Scheme.FP8_BLOCK, scaled.WEIGHT_BLOCKS)])
def test_fp8_is_the_harness_own_quantiser(scheme: Scheme, rule: scaled.ScaleRule) -> None:
    """Rows of activations are rounded by moe_ref.numerics.scaled; the weights' codes and scales are the same function,
    down to blocks whose scale would be no normal number."""
    w_NK = matrix(200, 300)
    w_NK[130:, :128] *= 2.0**-140
    codes_NK, scales = scaled.quantise(w_NK.double(), rule)
    encoded = encode(scheme, w_NK)
    assert same(encoded.codes.double(), codes_NK)
    assert same(encoded.scales.double(), scales)


def test_mxfp8_rounded_up_is_the_harness_own_quantiser() -> None:
    """The scale rule of MXFP8 activations, powers of two rounded up."""
    w_NK = matrix(40, 96)
    codes_NK, scales = scaled.quantise(w_NK.double(), scaled.ScaleRule(rows=1, columns=32, power_of_two=True))
    encoded = mx.encode(Scheme.MXFP8, w_NK, rounding="ceil")
    assert same(encoded.codes.double(), codes_NK)
    assert encoded.scales.tolist() == (scales.log2() + 127).tolist()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_matrix_of_zeros(scheme: Scheme) -> None:
    """Scales of 1 and zeros that are zeros: no division by the largest value, which is 0."""
    encoded = encode(scheme, torch.zeros(3, 150))
    assert same(decode(encoded), np.zeros((3, 150)))
    assert set(double.scale_numbers(encoded.scales, ENCODINGS[scheme].scales).flatten()) == {1.0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_number_decides_not_its_dtype(scheme: Scheme, dtype: torch.dtype) -> None:
    """The same numbers in bf16 and wider give the same codes and scales."""
    w_NK = matrix(9, 70).clamp(-1e3, 1e3).half().bfloat16().half().bfloat16()
    w_NK = w_NK.where(w_NK.half().bfloat16() == w_NK, 0)
    one, other = encode(scheme, w_NK), encode(scheme, w_NK.to(dtype))
    assert same_tensors(one, other)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_leading_axes_are_matrices_of_their_own(scheme: Scheme) -> None:
    """Experts and gate and up share no scale, not even the second one of nvfp4."""
    w_EGNK = matrix(2, 2, 7, 133)
    whole = encode(scheme, w_EGNK)
    for e in range(2):
        for g in range(2):
            alone = encode(scheme, w_EGNK[e, g])
            assert same_tensors(whole.at(e).at(g), alone)


@pytest.mark.parametrize("scheme", [Scheme.MXFP4, Scheme.MXFP8])
def test_mx_encodes_what_it_decodes(scheme: Scheme) -> None:
    """Of numbers that are codes times powers of two nothing is lost: gpt-oss comes back as it was."""
    once = decode(encode(scheme, matrix(9, 70)))
    assert same(decode(encode(scheme, once)), once)


# Act-order.


@pytest.mark.parametrize(("ordered", "plain"), [(Scheme.GPTQ_ORDER, Scheme.GPTQ),
                                                (Scheme.GPTQ_ORDER_32, Scheme.GPTQ_32)])
def test_act_order_is_the_plain_scheme_on_ordered_columns(ordered: Scheme, plain: Scheme) -> None:
    """desc_act quantises the columns in the order of importance and stores each at its old place, with its group."""
    w_NK = matrix(2, 6, 261)
    order_K = torch.stack([torch.randperm(261, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    encoded = gptq.encode(ordered, w_NK, order_K=order_K)
    sorted_NK = w_NK.gather(-1, order_K[:, None].expand_as(w_NK))
    assert same(decode(encoded).gather(-1, order_K[:, None].expand_as(w_NK)), decode(encode(plain, sorted_NK)))
    assert encoded.groups is not None
    size = ENCODINGS[ordered].columns
    assert torch.equal(encoded.groups.gather(-1, order_K), (torch.arange(261) // size).int().expand(2, -1))


def test_the_order_without_data() -> None:
    """The largest columns fill the first group, as data would have important ones do; ties keep their order."""
    w_NK = torch.ones(2, 256)
    w_NK[:, 100:228] = 2
    groups = encode(Scheme.GPTQ_ORDER, w_NK).groups
    assert groups is not None
    assert groups.tolist() == [1] * 100 + [0] * 128 + [1] * 28
    assert torch.equal(gptq.encode(Scheme.GPTQ_ORDER, w_NK, order_K=torch.arange(256)).codes,
                       encode(Scheme.GPTQ, w_NK).codes)


# Scales in 16 bits.


@pytest.mark.parametrize("scheme", [Scheme.GPTQ, Scheme.AWQ, Scheme.GPTQ_ORDER])
def test_scales_in_bf16(scheme: Scheme) -> None:
    """Checkpoints in bf16 have them; what fp16 cannot hold is refused with both numbers, not stored as infinity."""
    w_NK = matrix(6, 40) * 1e6
    with pytest.raises(UsageValueError, match=r"scales: .*e\+09, but should be at most 65504 of torch\.float16"):
        encode(scheme, w_NK)
    encoder: Any = ENCODERS[scheme]
    encoded = encoder(scheme, w_NK, scale_dtype=torch.bfloat16)
    assert encoded.scales.dtype == torch.bfloat16
    assert float((decode(encoded) - w_NK).abs().max()) < float(w_NK.abs().max())
    with pytest.raises(UsageTypeError, match=r"dtype torch\.float32, but should be torch\.float16 or torch\.bfloat16"):
        encoder(scheme, w_NK, scale_dtype=torch.float32)


@pytest.mark.parametrize("scheme", [Scheme.GPTQ, Scheme.AWQ])
def test_scales_below_fp16(scheme: Scheme) -> None:
    """The smallest number stands in for a scale that would be zero, and no element grows."""
    w_NK = torch.full((1, 64), 2.0**-28)
    encoded = encode(scheme, w_NK)
    assert double.scale_numbers(encoded.scales, ENCODINGS[scheme].scales).tolist() == [[2.0**-24]]
    assert not decode(encoded).any()


# Wrong use.

MISTAKES: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "no matrix": (fp8, {"w_NK": torch.zeros(5)}, UsageValueError, r"shape \(5,\), but should be \(L, N, K\)"),
    "no columns": (int8, {"w_NK": torch.zeros(5, 0)}, UsageValueError, r"shape \(5, 0\), but should"),
    "integers": (awq, {"w_NK": torch.zeros(5, 5, dtype=torch.int32)}, UsageTypeError, r"torch\.int32, but should"),
    "codes already": (nvfp4, {"w_NK": torch.zeros(5, 5).to(torch.float8_e4m3fn)}, UsageTypeError, "float8_e4m3fn, but"),
    "no tensor": (mx, {"w_NK": [[1.0]]}, UsageTypeError, "list, but should be a tensor"),
    "an infinity in bf16": (mx, {"w_NK": torch.tensor([[1.0, math.inf]]).bfloat16()}, UsageValueError,
                            "1 elements are not finite or beyond fp32, but should be 0"),
    "NaN": (fp8, {"w_NK": torch.tensor([[math.nan, math.nan]])}, UsageValueError, "2 elements are not finite"),
    "beyond fp32": (fp8, {"w_NK": torch.tensor([[1e39]], dtype=torch.float64)}, UsageValueError, "1 elements"),
    "another rounding": (mx, {"w_NK": torch.ones(1, 4), "rounding": "even"}, UsageValueError,
                         "rounding='even', but should be one of floor, ceil"),
    "an order of neighbours": (gptq, {"w_NK": torch.ones(1, 4), "order_K": torch.arange(4)}, UsageValueError,
                               "order_K is given, but gptq has groups of neighbouring columns")}
SCHEME_OF = {fp8: Scheme.FP8_ROW, int8: Scheme.INT8, awq: Scheme.AWQ, nvfp4: Scheme.NVFP4, mx: Scheme.MXFP4,
             gptq: Scheme.GPTQ}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(name: str) -> None:
    """Before anything is computed, with what was found and what should be there."""
    module, arguments, kind, words = MISTAKES[name]
    with pytest.raises(kind, match=words):
        module.encode(SCHEME_OF[module], **arguments)


@pytest.mark.parametrize(("order", "kind", "words"), [
    (torch.zeros(4, dtype=torch.int64), UsageValueError, "1 orders are no permutation of 0 to 3, but should be 0"),
    (torch.arange(3), UsageValueError, r"shape \(3,\), but should be \(4,\) or \(4,\)"),
    (torch.arange(4).float(), UsageTypeError, r"torch\.float32, but should be torch\.int32 or torch\.int64"),
    ([0, 1, 2, 3], UsageTypeError, "list, but should be")])
def test_wrong_orders(order: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        gptq.encode(Scheme.GPTQ_ORDER, torch.ones(1, 4), order_K=order)


def test_every_scheme_has_an_encoder() -> None:
    """But plain, which is refused by name."""
    assert set(ENCODERS) == set(SCHEMES)
    with pytest.raises(UsageValueError, match="but should be one of fp8tensor, fp8row"):
        encode(Scheme.PLAIN, torch.ones(1, 4))
