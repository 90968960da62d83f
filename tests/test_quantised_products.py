"""Contracts whose products round both operands to MXFP8: right layers pass as closely as in bf16, and mistakes of a
quantiser fail. The quantiser here is written on torch's own e4m3, apart from the one that the truth is made with."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from moe_ref.adapters.experts_layer import ExpertsLayer
from moe_ref.adapters.grouped_rows import DECLARED, grouped_experts, rounded
from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.vocabulary import Direction, Dtype, Format, Ranks, Stage, Verdict
from moe_ref.verify.bounds.operands import MXFP8, rounded_operand, rounded_rows, scale_rows
from moe_ref.verify.bounds.rows import Rows
from tests.in_process import judged

CASE = "v1-T33.H128.I256.E8.K2-bf16-norm"
Quantiser = Callable[[torch.Tensor], torch.Tensor]


def mxfp8(values: torch.Tensor, size: int = 32, rounding: Callable = torch.ceil,
          change: Callable[[torch.Tensor], torch.Tensor] = lambda scale: scale) -> torch.Tensor:
    """Numbers of bf16 as they are after e4m3 in blocks; change: of the scales that they are read with."""
    blocks = values.float().unflatten(-1, (-1, size))
    amax = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    scale = torch.exp2(rounding(torch.log2(amax / 448)))
    codes = (blocks / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return (codes.float() * change(scale)).flatten(-2).to(values.dtype)


def doubled_last(scale: torch.Tensor) -> torch.Tensor:
    """The last block of each row is read twice as large."""
    return torch.cat([scale[..., :-1, :], 2 * scale[..., -1:, :]], -2)


MISTAKES: dict[str, Quantiser] = {
    "operands in bf16": lambda values: values,
    "one scale lost": partial(mxfp8, change=doubled_last),
    "scales of the next block": partial(mxfp8, change=lambda scale: scale.roll(1, -2)),
    "scales rounded down": partial(mxfp8, rounding=torch.floor),
    "e5m2": lambda values: values.to(torch.float8_e5m2).to(values.dtype),
}


# A scale shared by too many elements is no mistake that shows: a power of two moves no rounding border, but those of
# numbers 2^14 below the largest of their block.


def layer(quantiser: Quantiser) -> ExpertsLayer:
    """Grouped products of rounded operands, in bf16 and by torch."""

    def product(rows_RK: torch.Tensor, w_EKN: torch.Tensor, rows_E: torch.Tensor) -> torch.Tensor:
        parts = quantiser(rows_RK).split(rows_E.tolist())
        w_ENK = quantiser(w_EKN.transpose(1, 2))
        return torch.cat([part @ w_NK.T for part, w_NK in zip(parts, w_ENK, strict=True)])

    numerics = replace(rounded(Dtype.BF16), products="mxfp8")
    return ExpertsLayer(Capabilities(name="quantised", version="1", numerics={Dtype.BF16: numerics},
                                     directions=tuple(Direction), ranks=(Ranks.LOCAL,), intermediate_multiple=32,
                                     **DECLARED), lambda call: grouped_experts(call, product))


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("words", ["norm", "norm-tp2", "norm-zipf-outlier", "norm-large", "norm-zipf-nonfinite"])
def test_right_layers_pass(words: str) -> None:
    line = judged(layer(mxfp8), f"v1-T33.H128.I256.E8.K2-bf16-{words}")
    assert line.verdict is Verdict.PASS, line.message


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_of_a_quantiser_fail(mistake: str) -> None:
    """At the stage of the first product: what is multiplied is known to the bit, so that bf16 decides."""
    line = judged(layer(MISTAKES[mistake]), CASE)
    assert line.verdict is Verdict.MISMATCH
    assert line.stages is not None
    assert [float(stage.ratio) > 1 for stage in line.stages if stage.stage == Stage.ACT] == [True]


def test_quantised_under_a_plain_contract_fails() -> None:
    """Rounding operands without saying so is what the contract is there for."""
    quiet = layer(mxfp8)
    plain = replace(quiet, CAPABILITIES=replace(quiet.CAPABILITIES, numerics={Dtype.BF16: rounded(Dtype.BF16)}))
    assert judged(plain, CASE).verdict is Verdict.MISMATCH


def test_what_it_cannot_judge_is_refused() -> None:
    """Gradients have products of their own; exact data need 6 bits where e4m3 has 4."""
    reasons = [judged(layer(mxfp8), f"{CASE}-{words}").reason for words in ("exact", "bwd")]
    assert reasons == [f"not declared: {what} with operands in e4m3" for what in ("exact data", "gradients")]


def test_operands_with_errors_of_their_own() -> None:
    """Rows that err, here by a store in bf16, are rounded to other numbers now and then: within the bound, and as often
    as the variance says."""
    generator = torch.Generator().manual_seed(7)
    value = torch.randn(512, 64, generator=generator, dtype=torch.float64)
    stored = value.bfloat16().double()
    half = torch.exp2(torch.floor(torch.log2(value.abs()))) * 2.0**-8
    got = rounded_rows(Rows(value, half, half.square() / 3, torch.zeros_like(half), Format.BF16), MXFP8)
    error = (rounded_operand(stored, MXFP8) - got.value).abs()
    assert got.variance is not None
    assert bool((error <= got.bound).all())
    assert 0.8 < float(error.square().mean() / got.variance.mean()) < 1.05


def test_a_scale_of_one_is_judged() -> None:
    """A block whose largest number is 300 has the scale 1.0 under MXFP8, and a 2.0 in its place is an error;
    only a block of zeros has a scale of no consequence, which by rule is 1.0 as well."""
    value = torch.zeros(2, 64, dtype=torch.float64)
    value[0, :] = 300.0
    nothing = torch.zeros_like(value)
    shown = scale_rows(Rows(value, nothing, nothing, nothing, None), MXFP8)
    assert shown.value.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert shown.bound.tolist() == [[0.0, 0.0], [torch.inf, torch.inf]]
