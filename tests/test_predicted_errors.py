"""Predicted errors of long sums: of the size that simulated accumulators make, in every order, on all data."""

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ref.contract.vocabulary import Dtype, Format
from moe_ref.numerics import summation, tensor_core
from moe_ref.numerics.accumulation import Accumulation, running_sum, sorted_sum
from moe_ref.numerics.formats import cell_distance, half_cell, round_to, unit_in_last_place
from moe_ref.numerics.gauges import gauges
from moe_ref.numerics.magnitudes import nonnegative_product
from moe_ref.tolerances.load import load_tolerances
from moe_ref.tolerances.quantile import tau
from moe_ref.verify.bounds.rounding import RoundingModel
from tests.subjects.base import TorchMoE

FP32 = Accumulation(2.0**-24)
CHECKS = load_tolerances().file.checks


def operands(data: str, terms: int, stored: Format, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """a (12, K) and w (48, K) in fp64 on the format's grid."""
    drawn = torch.Generator().manual_seed(seed * 7919 + terms)
    a, w = (torch.randn(rows, terms, generator=drawn, dtype=torch.float64) for rows in (12, 48))
    if data == "positive":
        a, w = a.abs(), w.abs()
    if data == "outlier":
        a[:, :: max(1, terms // 4)] *= 100.0
    if data == "graded":
        scale = torch.exp2(-20 * torch.arange(terms, dtype=torch.float64) / terms)
        a, w = a * scale, w * scale.sqrt()
    if data == "sorted":  # the first half of all channels adds up, the second half takes it away
        a, w = a.abs() * torch.where(torch.arange(terms) < terms // 2, 1.0, -1.0), w.abs()
    return round_to(a, stored), round_to(w, stored)


def z(a_MK: torch.Tensor, w_NK: torch.Tensor, got: torch.Tensor, model: Accumulation) -> torch.Tensor:
    """Errors in predicted standard deviations."""
    sums = gauges(a_MK, w_NK, absolute=True)
    return (got - sums.value) / model.variance(sums, a_MK.shape[1]).sqrt()


@pytest.mark.sampled(every=10)
@pytest.mark.parametrize("order", summation.ORDERS)
@pytest.mark.parametrize("data", ["unit", "positive", "outlier", "graded"])
@pytest.mark.parametrize("stored", [Format.BF16, Format.FP32])
@pytest.mark.parametrize("terms", [16, 256, 4096])
def test_right_sums_stay_far_inside(terms: int, stored: Format, data: str, order: summation.Order) -> None:
    """Every order of a right sum: below a third of what a stage is allowed, as a whole hardly more than predicted."""
    a_MK, w_NK = operands(data, terms, stored)
    off = z(a_MK, w_NK, summation.matmul(a_MK, w_NK.T, order), FP32)
    assert float(off.abs().max()) < CHECKS.stage.sigmas_factor * tau(off.numel(), CHECKS.stage.alpha) / 3
    assert float(off.square().mean().sqrt()) < 1.15


@pytest.mark.parametrize("terms", [256, 4096])
@pytest.mark.parametrize("data", ["unit", "positive", "graded"])
def test_the_natural_order_is_what_is_predicted(data: str, terms: int) -> None:
    """fp32 operands, one addition after the other: the prediction is no mere upper limit."""
    a_MK, w_NK = operands(data, terms, Format.FP32)
    off = z(a_MK, w_NK, summation.matmul(a_MK, w_NK.T, "sequential"), FP32)
    assert 0.6 < float(off.square().mean().sqrt()) < 1.1


def test_channels_that_are_sorted_by_sign_do_not_accuse() -> None:
    """Partial sums a hundred times the result are followed, from either end; a bridge misses them."""
    a_MK, w_NK = operands("sorted", 4096, Format.BF16)
    sums = gauges(a_MK, w_NK)
    assert float((sums.path / (sums.value.square() / 3 + sums.squares / 6)).min()) > 50
    for order in ("sequential", "reversed", "blocked"):
        off = z(a_MK, w_NK, summation.matmul(a_MK, w_NK.T, order), FP32)
        assert float(off.square().mean().sqrt()) < 1.1


@pytest.mark.sampled(every=10)
@pytest.mark.parametrize("name", ["sm80", "sm90", "sm100"])
@pytest.mark.parametrize("data", ["unit", "positive", "outlier", "graded"])
@pytest.mark.parametrize("terms", [64, 1024, 8192])
def test_truncating_accumulators_stay_inside_their_class(terms: int, data: str, name: str) -> None:
    """Tensor cores add up coherent losses; the class of the hardware says so, and is not much too generous."""
    hardware = load_tolerances().file.hardware[name]
    a_MK, w_NK = operands(data, terms, Format.BF16)
    got = tensor_core.matmul(a_MK, w_NK.T, tensor_core.tensor_core(hardware, Format.BF16))
    model = RoundingModel(load_tolerances(), name, Format.FP32).accumulation
    off = z(a_MK, w_NK, got, model)
    assert 0.05 < float(off.square().mean().sqrt()) < 1.3
    assert float(off.abs().max()) < CHECKS.stage.sigmas_factor * tau(off.numel(), CHECKS.stage.alpha) / 3


def test_a_truncating_accumulator_is_no_rounding_one() -> None:
    """Judged as a sum that rounds, positive data give it away at K = 1024: losses agree in sign."""
    a_MK, w_NK = operands("positive", 8192, Format.BF16)
    core = tensor_core.tensor_core(load_tolerances().file.hardware["sm80"], Format.BF16)
    off = z(a_MK, w_NK, tensor_core.matmul(a_MK, w_NK.T, core), FP32)
    assert float(off.mean()) < -5


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize("products", ["tf32", "tf32x3"])
@pytest.mark.parametrize("name", ["sm80", "sm90"])
@pytest.mark.parametrize("data", ["unit", "positive", "outlier"])
def test_tf32_operands_are_expected_where_they_are_declared(data: str, name: str, products: str) -> None:
    """Rounded or cut operands, three products: inside bound and expectation; declared exact, they leave it."""
    hardware, tolerances = load_tolerances().file.hardware[name], load_tolerances()
    a_MK, w_NK = operands(data, 512, Format.FP32)
    core = tensor_core.tensor_core(hardware, Format.TF32)
    matmul = tensor_core.tf32_matmul if products == "tf32" else tensor_core.tf32x3_matmul
    got, sums = matmul(a_MK, w_NK.T, core, hardware.tf32_operands), gauges(a_MK, w_NK, absolute=True)
    model = RoundingModel(tolerances, name, Format.FP32, Format.TF32, products == "tf32x3")
    off = (got - sums.value) / model.summed_variance(sums, 512).sqrt()
    assert 0.02 < float(off.square().mean().sqrt()) < 1.3
    gauge = a_MK.abs() @ w_NK.abs().T
    assert float(((got - sums.value).abs() / model.summed(gauge, 512)).max()) < 1
    if products == "tf32":
        exact = RoundingModel(tolerances, name, Format.FP32, Format.FP32)
        assert float(((got - sums.value) / exact.summed_variance(sums, 512).sqrt()).abs().max()) > 100


@settings(max_examples=200, deadline=None)
@given(st.floats(min_value=-1e4, max_value=1e4), st.sampled_from([Format.BF16, Format.FP16, Format.FP32]))
def test_a_number_lies_in_the_cell_of_what_it_is_rounded_to(value: float, stored: Format) -> None:
    """So the distance to the cell never exceeds the error before the store: the check of stages rests on this."""
    target = torch.tensor([[value]], dtype=torch.float64)
    got = round_to(target, stored)
    assert float(cell_distance(target, got, stored)) == 0
    unit = unit_in_last_place(got, stored)
    other = got + unit
    # The neighbour's cell ends half a unit away from it, so the target is as far as it is from the midpoint.
    expected = ((other - target).abs() - half_cell(target, other, stored)).clamp(min=0)
    assert float(cell_distance(target, other, stored)) == float(expected)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("scale", [1e-120, 1e-30, 1.0, 1e30])
def test_gauges_in_fp32_are_upper_bounds(scale: float, power: int) -> None:
    """Sums of absolute and squared products are taken in fp32; whatever the range of the data, not too small."""
    drawn = torch.Generator().manual_seed(3)
    a_MK = torch.rand(9, 700, generator=drawn, dtype=torch.float64) * scale
    a_MK[0] *= 1e-25  # rows of very different size
    w_NK = torch.randn(11, 700, generator=drawn, dtype=torch.float64) * max(scale, 1e-30)
    wide = a_MK @ w_NK.abs().pow(power).T
    ratio = nonnegative_product(a_MK, w_NK, power) / wide
    assert float(ratio.min()) >= 1.0
    assert float(ratio.max()) < 1.001


@pytest.mark.parametrize("power", [1, 2])
def test_what_underflows_is_added(power: int) -> None:
    """An entry 2^-150 of its row's largest is lost in fp32; the large entry that it meets must not be lost with it."""
    a_MK = torch.tensor([[1.0, 2.0**-150]], dtype=torch.float64)
    w_NK = torch.tensor([[0.0, 2.0**19]], dtype=torch.float64)
    assert float(nonnegative_product(a_MK, w_NK, power)) >= float(a_MK @ w_NK.pow(power).T)


@pytest.mark.parametrize("addends", [2, 3, 5])
def test_a_running_sum_averages_over_all_orders(addends: int) -> None:
    """Against every permutation; the largest first makes the largest partial sums."""
    drawn = torch.randn(addends, 500, generator=torch.Generator().manual_seed(addends), dtype=torch.float64)
    orders = [drawn[list(order)].cumsum(0)[1:].square().sum(0) for order in permutations(range(addends))]
    total, squares = drawn.sum(0), drawn.square().sum(0)
    mean = torch.stack(orders).mean(0)
    assert torch.allclose(running_sum(total, squares, addends), mean, rtol=1e-9)
    assert float(sorted_sum(total, squares, addends).mean()) > float(mean.mean())


def test_the_model_of_a_contract() -> None:
    """fp32 operands are added one by one on any device, 16-bit ones by what it has, tf32 only where declared."""
    tolerances, numerics = load_tolerances(), TorchMoE().CAPABILITIES.numerics[Dtype.FP32]
    assert RoundingModel.of(tolerances, "sm90", numerics, Dtype.FP32).accumulation == FP32
    assert RoundingModel.of(tolerances, "sm90", numerics, Dtype.BF16).accumulation.truncates
    assert RoundingModel.of(tolerances, "cpu", numerics, Dtype.BF16).accumulation == FP32
