"""Protects 8-bit operands with scales: codes and scales by hand, what products lose, predicted and measured."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Format
from moe_ref.numerics.formats import round_to
from moe_ref.numerics.scaled import (
    PER_ROW,
    PER_TENSOR,
    TOKEN_BLOCKS,
    WEIGHT_BLOCKS,
    ScaleRule,
    decode,
    product_error,
    quantise,
    scaled_matmul,
)
from moe_ref.numerics.tensor_core import tensor_core
from moe_ref.tolerances.load import load_tolerances

KINDS = {"tensor": (PER_TENSOR, PER_TENSOR), "row": (PER_ROW, PER_ROW), "blocks": (TOKEN_BLOCKS, WEIGHT_BLOCKS)}
RULES = {f"{kind}{'-power' * power}-{stored}": tuple(replace(rule, power_of_two=power, stored=stored) for rule in pair)
         for kind, pair in KINDS.items() for power in (False, True) for stored in (Format.E4M3, Format.E5M2)}
TORCH = {Format.E4M3: torch.float8_e4m3fn, Format.E5M2: torch.float8_e5m2}
LARGEST = {Format.E4M3: 448, Format.E5M2: 57344}


def random(shape: tuple[int, int], seed: int, spread: float = 0.0) -> torch.Tensor:
    """bf16 numbers; spread: standard deviation of the binary logarithm of a factor for each column."""
    drawn = torch.Generator().manual_seed(seed)
    value = torch.randn(shape, generator=drawn, dtype=torch.float64)
    factor = torch.exp2(spread * torch.randn(1, shape[1], generator=drawn, dtype=torch.float64))
    return round_to(value * factor, Format.BF16)


@pytest.mark.parametrize("name", RULES)
def test_scales_and_codes_by_hand(name: str) -> None:
    """Every block's largest value over the format's largest number, and every code that of torch's own conversion."""
    for rule in RULES[name]:
        values_RK = random((130, 300), 1)
        codes_RK, scales = quantise(values_RK, rule)
        rows, columns = rule.rows or 130, rule.columns or 300
        assert scales.shape == (-(-130 // rows), -(-300 // columns))
        for index, scale in enumerate(scales.flatten().tolist()):
            row, column = divmod(index, scales.shape[1])
            block = slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns)
            exact = Fraction(values_RK[block].abs().max().item()) / LARGEST[rule.stored]
            if rule.power_of_two:
                assert math.frexp(scale)[0] == 0.5
                assert Fraction(scale) / 2 < exact <= Fraction(scale)
            else:
                assert scale == torch.tensor(float(exact), dtype=torch.float32).item()
            quotient = values_RK[block].float() / torch.tensor(scale, dtype=torch.float32)
            wanted = quotient.clamp(-LARGEST[rule.stored], LARGEST[rule.stored]).to(TORCH[rule.stored])
            assert torch.equal(codes_RK[block], wanted.double())
        assert torch.equal(decode(codes_RK, scales, rule)[-1, -1], codes_RK[-1, -1] * scales[-1, -1])


def test_the_largest_value_of_a_block_comes_back() -> None:
    """But for the rounding of its scale to fp32; zeros stay zeros, with scale 1."""
    values_RK = random((4, 256), 2)
    values_RK[2] = 0.0
    codes_RK, scales = quantise(values_RK, TOKEN_BLOCKS)
    assert scales[2].tolist() == [1.0, 1.0]
    assert not codes_RK[2].any()
    back = decode(codes_RK, scales, TOKEN_BLOCKS)
    largest = values_RK.abs().unflatten(1, (2, 128)).amax(2)
    assert torch.allclose(back.abs().unflatten(1, (2, 128)).amax(2), largest, rtol=2.0**-23, atol=0.0)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_values_too_small_for_a_scale_are_zeros(power_of_two: bool) -> None:
    """A subnormal scale would be off by more than the codes' range allows; the bound holds the loss."""
    rule, one = ScaleRule(power_of_two=power_of_two), torch.ones(1, 1, dtype=torch.float64)
    codes, scales = quantise(one * 2.0**-130, rule)
    assert (codes.item(), scales.item()) == (0.0, 1.0)
    assert product_error(one * 2.0**-130, one, rule, rule).bound.item() > 2.0**-130
    assert quantise(one * 2.0**-117, rule)[0].item() != 0.0


@pytest.mark.sampled(every=5)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_the_loss_of_a_product_is_as_predicted(name: str, spread: float) -> None:
    """Measured over predicted root mean square between 0.9 and 1.06, and no element beyond its bound."""
    rule_a, rule_w = RULES[name]
    a_MK, w_NK = random((48, 640), 3, spread), random((256, 640), 4)
    back_a, back_w = decode(*quantise(a_MK, rule_a), rule_a), decode(*quantise(w_NK, rule_w), rule_w)
    lost = back_a @ back_w.T - a_MK @ w_NK.T
    predicted = product_error(a_MK, w_NK, rule_a, rule_w)
    ratio = (lost.square() / predicted.variance).mean().sqrt().item()
    assert 0.9 < ratio < 1.06
    assert bool((lost.abs() <= predicted.bound).all())
    assert ((lost.abs() / predicted.bound).max() > 0.02).item()


def test_the_bound_is_reached() -> None:
    """Values in the middle of their cells: all of it with one such factor, all but the sign with two of them."""
    rule = ScaleRule(power_of_two=True)
    a_MK = torch.tensor([[448.0, 17.0]], dtype=torch.float64)
    on_w = torch.tensor([[0.0, 256.0]], dtype=torch.float64)
    off_w = torch.tensor([[448.0, 0.0], [0.0, 17.0]], dtype=torch.float64)
    lost = decode(*quantise(a_MK, rule), rule) @ on_w.T - a_MK @ on_w.T
    assert lost.abs().item() == 256.0
    assert lost.abs().item() <= product_error(a_MK, on_w, rule, rule).bound.item()
    both = product_error(a_MK, off_w, rule, rule).bound[0, 1].item()
    back = decode(*quantise(a_MK, rule), rule) @ decode(*quantise(off_w, rule), rule).T - a_MK @ off_w.T
    assert back[0, 1].abs().item() == 33.0
    assert back[0, 1].abs().item() <= both == pytest.approx(35.0, rel=2.0**-17)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scaled_product_is_near_that_of_what_codes_stand_for(kind: str) -> None:
    """Blackwell's sums lose a ten-millionth of it, Hopper's fp8 sums a thousandth and less."""
    rule_a, rule_w = KINDS[kind]
    a_MK, w_NK = random((16, 512), 5), random((32, 512), 6)
    truth = decode(*quantise(a_MK, rule_a), rule_a) @ decode(*quantise(w_NK, rule_w), rule_w).T
    scale = truth.square().mean().sqrt()
    for name, least, most in (("sm100", 1e-9, 1e-6), ("sm90", 1e-6, 1e-3)):
        core = tensor_core(load_tolerances().file.hardware[name], Format.E4M3)
        off = (scaled_matmul(a_MK, w_NK, rule_a, rule_w, core) - truth).square().mean().sqrt() / scale
        assert least < off.item() < most


def test_wrong_operands_are_refused() -> None:
    """Other dtypes, shapes and formats, what is not finite, and blocks that do not meet."""
    one = torch.ones(2, 2, dtype=torch.float64)
    for wrong in (one.float(), one[0], one / 0, one[:0]):
        with pytest.raises(UsageValueError, match="should be finite"):
            quantise(wrong, PER_TENSOR)
    with pytest.raises(UsageValueError, match="stored=bf16"):
        ScaleRule(stored=Format.BF16)
    with pytest.raises(UsageValueError, match="rows=0"):
        ScaleRule(rows=0)
    core = tensor_core(load_tolerances().file.hardware["sm90"], Format.E4M3)
    with pytest.raises(UsageValueError, match="blocks of 128 and None columns"):
        scaled_matmul(one, one, TOKEN_BLOCKS, PER_ROW, core)
