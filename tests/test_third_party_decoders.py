"""The oracle's decoder against those of torch, transformers, torchao, compressed-tensors, AutoGPTQ, AutoAWQ, vLLM and
SGLang, value for value, and for every pattern of bits of a scale; docs/quantised.md has the table.

A library that is not installed is skipped with what is missing, as those of the adapters are.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_ref.contract.encoded import Encoded, packed
from moe_ref.contract.schemes import ENCODINGS, Scales
from moe_ref.contract.vocabulary import Scheme
from moe_ref.oracle.decode import decode
from moe_ref.schemes import mx
from tests.made_encoded import SCHEMES
from tests.third_party.decoders import DECODERS
from tests.third_party.decoders.compare import agreement, random, wrong_rows
from tests.third_party.decoders.decoder import Decoder, codes_of
from tests.third_party.decoders.of_torch import TORCH
from tests.third_party.decoders.of_torchao import TORCHAO

PAIRS = [pytest.param(decoder, scheme, id=f"{decoder.library.distribution} {decoder.function} {scheme}")
         for decoder in DECODERS for scheme in decoder.schemes]


# Their imports warn of their own internals.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("decoder", "scheme"), PAIRS)
def test_decoder(decoder: Decoder, scheme: Scheme) -> None:
    """Random codes and scales agree to the bit; the scales that are read otherwise are those declared, no more."""
    if lacking := decoder.library.lacking():
        pytest.skip(lacking)
    assert agreement(decoder, scheme).differs == decoder.differs


def test_every_scheme_has_a_decoder_of_somebody_else() -> None:
    assert {scheme for decoder in DECODERS for scheme in decoder.schemes} == set(SCHEMES)


def test_the_document_names_every_decoder() -> None:
    """The table is printed by hand; a decoder without a row would go unnoticed."""
    text = (Path(__file__).resolve().parents[1] / "docs" / "quantised.md").read_text()
    assert [f"{decoder.function} {scheme}" for decoder in DECODERS for scheme in decoder.schemes
            if f"| {decoder.function} | {scheme} |" not in text] == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rounding", ["floor", "ceil"])
@pytest.mark.parametrize("scheme", [Scheme.MXFP4, Scheme.MXFP8])
def test_mx_encoders_are_those_of_torchao(scheme: Scheme, rounding: mx.Rounding) -> None:
    """Both roundings of the scale, FLOOR and RCEIL, code for code; but that a block of zeros has scale 2^-127 there and
    1 here, and of smaller scales than 2^-126 torchao divides by 2^-126."""
    if lacking := TORCHAO.lacking():
        pytest.skip(lacking)
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx
    generator = torch.Generator().manual_seed(5)
    w_NK = torch.randn(512, 256, generator=generator)
    w_NK *= torch.exp2(torch.randint(-100, 100, (512, 1), generator=generator).float())
    w_NK[0] = 448
    mode = {"floor": ScaleCalculationMode.FLOOR, "ceil": ScaleCalculationMode.RCEIL}[rounding]
    kind = torch.float8_e4m3fn if scheme is Scheme.MXFP8 else torch.float4_e2m1fn_x2
    scales, codes = to_mx(w_NK, kind, 32, mode)
    ours = mx.encode(scheme, w_NK, rounding=rounding)
    assert torch.equal(ours.scales, scales.view(torch.uint8))
    assert torch.equal(ours.codes.view(torch.uint8), codes.view(torch.uint8))


MISTAKES: dict[str, tuple[Scheme, Callable[[Encoded], Encoded]]] = {
    "the halves of a byte exchanged": (Scheme.MXFP4, lambda one: replace(
        one, codes=packed(codes_of(one).unflatten(-1, (-1, 2)).flip(-1).flatten(-2)))),
    "a zero point of 7": (Scheme.GPTQ, lambda one: replace(one, scheme=Scheme.AWQ, zeros=torch.full(
        one.scales.shape, 7, dtype=torch.uint8))),
    "zero points exchanged": (Scheme.AWQ_32, lambda one: replace(
        one, zeros=None if one.zeros is None else one.zeros.flip(-1))),
    "the next block's scale": (Scheme.NVFP4, lambda one: replace(
        one, scales=one.scales.view(torch.uint8).roll(1, -1).view(torch.float8_e4m3fn))),
    "a bias of 128": (Scheme.MXFP8, lambda one: replace(one, scales=one.scales - 1)),
    "groups of neighbours": (Scheme.GPTQ_ORDER, lambda one: replace(one, scheme=Scheme.GPTQ, groups=None)),
    "the inverse of the second scale": (Scheme.NVFP4, lambda one: replace(
        one, second_scale=None if one.second_scale is None else 1 / one.second_scale)),
    "scales of other rows": (Scheme.FP8_BLOCK, lambda one: replace(one, scales=one.scales.flip(-2)))}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake: str) -> None:
    """Agreement means something only if the data would have shown the mistake: in every row."""
    scheme, change = MISTAKES[mistake]
    wrong = Decoder(TORCH, mistake, (scheme,), lambda one: decode(change(one)).float())
    right = replace(wrong, decode=lambda one: decode(one).float())
    # A second scale that is a power of two, so that exact values and those rounded twice are the same.
    encoded = random(scheme, 0)
    assert not wrong_rows(right, encoded).any()
    assert wrong_rows(wrong, encoded).all()


@pytest.mark.parametrize("scheme", [one for one in SCHEMES if ENCODINGS[one].scales is Scales.E8M0])
def test_a_scale_of_nan(scheme: Scheme) -> None:
    """255 is NaN by the format, and so are all elements, zeros too; most decoders have an infinity there."""
    encoded = random(scheme, 0)
    nan = replace(encoded, scales=torch.full_like(encoded.scales, 255))
    assert bool(decode(nan).isnan().all())
