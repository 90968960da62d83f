"""The oracle's decoder, code by code: against the NumPy double, which puts numbers together from their bits, against
torch's own casts, and against ml_dtypes, where it is installed (`pip install -e '.[crosscheck]'`)."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from moe_ref.contract.encoded import Encoded
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.vocabulary import Scheme
from moe_ref.oracle.decode import decode
from tests.double import encoded as double
from tests.made_encoded import SCHEMES, drawn, same

BYTES = torch.arange(256, dtype=torch.uint8)


def by_ml_dtypes(name: str, stored: np.ndarray) -> np.ndarray:
    """Numbers of codes by ml_dtypes' own conversion."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed; should be that of constraints.txt")
    return stored.view(getattr(ml_dtypes, name)).astype(np.float64)


TABLES: dict[str, tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]] = {
    "e4m3 by torch": (lambda: BYTES.view(torch.float8_e4m3fn).double().numpy(),
                      lambda: double.E4M3.numbers(BYTES.numpy())),
    "e8m0 by torch": (lambda: BYTES.view(torch.float8_e8m0fnu).double().numpy(),
                      lambda: double.scale_numbers(BYTES, ENCODINGS[Scheme.MXFP8].scales)),
    "e4m3 by ml_dtypes": (lambda: by_ml_dtypes("float8_e4m3fn", BYTES.numpy()),
                          lambda: double.E4M3.numbers(BYTES.numpy())),
    "e8m0 by ml_dtypes": (lambda: by_ml_dtypes("float8_e8m0fnu", BYTES.numpy()),
                          lambda: double.scale_numbers(BYTES, ENCODINGS[Scheme.MXFP8].scales)),
    "e2m1 by ml_dtypes": (lambda: by_ml_dtypes("float4_e2m1fn", BYTES.numpy()[:16]),
                          lambda: double.E2M1.numbers(BYTES.numpy()[:16])),
    "fp16 by torch": (lambda: every_half(torch.float16).double().numpy(),
                      lambda: double.FP16.numbers(np.arange(2**16))),
    "bf16 by torch": (lambda: every_half(torch.bfloat16).double().numpy(),
                      lambda: double.BF16.numbers(np.arange(2**16)))}


def every_half(dtype: torch.dtype) -> torch.Tensor:
    """All 65536 numbers of 16 bits, in the order of their codes."""
    return torch.arange(2**16).to(torch.int16).view(dtype)


@pytest.mark.parametrize("name", TABLES)
def test_formats_of_the_double(name: str) -> None:
    """The double is right about every number of every format, NaN and signed zeros included: others say the same."""
    theirs, ours = TABLES[name]
    assert same(theirs(), ours())


def every_mx(scheme: Scheme) -> Encoded:
    """Row s has scale s, and every byte of codes."""
    codes = BYTES.repeat(256, 1)
    codes = codes.view(torch.float8_e4m3fn) if scheme is Scheme.MXFP8 else codes
    num_columns = 256 if scheme is Scheme.MXFP8 else 512
    scales = BYTES[:, None].repeat(1, num_columns // 32)
    return Encoded(scheme=scheme, codes=codes, scales=scales, num_columns=num_columns)


def every_nvfp4(second: float) -> Encoded:
    """Row s has scale s, and every byte of codes."""
    return Encoded(scheme=Scheme.NVFP4, codes=BYTES.repeat(256, 1), num_columns=512,
                   scales=BYTES[:, None].repeat(1, 32).view(torch.float8_e4m3fn),
                   second_scale=torch.tensor(second, dtype=torch.float32))


def every_zero(scheme: Scheme, dtype: torch.dtype) -> Encoded:
    """Row z has zero point z, and every byte of codes; scales differ by row and group."""
    groups = -(-512 // (ENCODINGS[scheme].columns or 512))
    scales = torch.rand(16, groups, generator=torch.Generator().manual_seed(2)).to(dtype)
    return Encoded(scheme=scheme, codes=BYTES.repeat(16, 1), num_columns=512, scales=scales,
                   zeros=torch.arange(16, dtype=torch.uint8)[:, None].repeat(1, groups))


def every_half_scale(dtype: torch.dtype) -> Encoded:
    """Row s has the 16-bit number s as its scale, infinities and NaN too, and codes 0, 1, 8 and 15."""
    codes = torch.tensor([0x10, 0xF8], dtype=torch.uint8).repeat(2**16, 1)
    return Encoded(scheme=Scheme.GPTQ, codes=codes, num_columns=4, scales=every_half(dtype)[:, None])


def fp32_scales(scheme: Scheme) -> Encoded:
    """Every code, with fp32 scales of random bits: subnormal ones, infinities and NaN among them."""
    bits = torch.randint(-2**31, 2**31, (512, 1), generator=torch.Generator().manual_seed(3)).to(torch.int32)
    bits[:6, 0] = torch.tensor([0, 1, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, -2**31])
    dtype = torch.int8 if scheme is Scheme.INT8 else torch.float8_e4m3fn
    codes = BYTES.repeat(512, 1).view(dtype)
    return Encoded(scheme=scheme, codes=codes, num_columns=256, scales=bits.view(torch.float32))


EXHAUSTIVE: dict[str, Callable[[], Encoded]] = {
    "e4m3 x e8m0": lambda: every_mx(Scheme.MXFP8), "e2m1 x e8m0": lambda: every_mx(Scheme.MXFP4),
    **{f"e2m1 x e4m3 x {second:g}": lambda second=second: every_nvfp4(second)
       for second in (1.0, 3.7e-5, 2.0**-149, 3.4e38)},
    **{f"int4 x zero points, {scheme}, {dtype}": lambda scheme=scheme, dtype=dtype: every_zero(scheme, dtype)
       for scheme in (Scheme.AWQ, Scheme.AWQ_32) for dtype in (torch.float16, torch.bfloat16)},
    "int4 x fp16": lambda: every_half_scale(torch.float16), "int4 x bf16": lambda: every_half_scale(torch.bfloat16),
    "int8 x fp32": lambda: fp32_scales(Scheme.INT8), "e4m3 x fp32": lambda: fp32_scales(Scheme.FP8_ROW)}


@pytest.mark.parametrize("name", EXHAUSTIVE)
def test_every_code_with_every_scale(name: str) -> None:
    """A decoder that is wrong for one code of 65536 gives a layer that looks right."""
    encoded = EXHAUSTIVE[name]()
    assert same(decode(encoded), double.decode(encoded))


def test_mx_tables_are_products_of_others_numbers() -> None:
    """The same two tables without the double: ml_dtypes' numbers of codes times ml_dtypes' numbers of scales."""
    scales = by_ml_dtypes("float8_e8m0fnu", BYTES.numpy())
    e2m1 = by_ml_dtypes("float4_e2m1fn", np.stack([BYTES.numpy() % 16, BYTES.numpy() // 16], 1).reshape(-1))
    assert same(decode(every_mx(Scheme.MXFP8)), scales[:, None] * by_ml_dtypes("float8_e4m3fn", BYTES.numpy()))
    assert same(decode(every_mx(Scheme.MXFP4)), scales[:, None] * e2m1)


@pytest.mark.parametrize("shape", [(1, 1), (5, 161), (130, 259), (2, 3, 7, 131), (3, 0, 40), (3, 5, 0)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_places_of_scales(scheme: Scheme, shape: tuple[int, ...]) -> None:
    """Whose scale an element has: random codes and scales, partial blocks, an odd number of columns, leading axes,
    matrices without rows or columns."""
    encoded = drawn(scheme, shape, seed=sum(shape))
    assert same(decode(encoded), double.decode(encoded))


@pytest.mark.parametrize("offsets", [(0, 1), (1, 0), (127, 15), (3, 31), (64, 127)], ids=str)
@pytest.mark.parametrize("scheme", [one for one in SCHEMES if not ENCODINGS[one].order])
def test_parts_that_begin_inside_a_block(scheme: Scheme, offsets: tuple[int, int]) -> None:
    """The first block of a part is shorter than the others."""
    sizes = (ENCODINGS[scheme].rows, ENCODINGS[scheme].columns)
    row_start, column_start = (offset % size if size else 0 for offset, size in zip(offsets, sizes, strict=True))
    encoded = drawn(scheme, (2, 131, 261), 5, row_start, column_start)
    assert same(decode(encoded), double.decode(encoded))
