"""Protects the bound on derivatives inside an expert: what fp32 makes of a gate within its error stays inside."""

import pytest
import torch

from moe_ref.contract.spec import MLP
from moe_ref.contract.vocabulary import Format
from moe_ref.oracle.backward.mlp import slope
from moe_ref.oracle.expert import activation, up_factor
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.bounds.rows import Rows
from moe_ref.verify.bounds.slopes import activation_slope, curvature, factor_slope
from tests.subjects.whole import whole_spec

MODEL = RoundingModel(load_tolerances(), "cpu", Format.FP32)
MLPS = {
    "silu": MLP(), "silu, scaled and clamped": MLP(limit=1.0, sigmoid_scale=1.702, up_offset=1.0),
    "silu, clamped after": MLP(limit=0.75, limit_at="after"), "gelu": MLP(activation="gelu"),
    "silu, capped": MLP(gate_softcap=1.5, up_softcap=2.0), "gelu_tanh": MLP(activation="gelu_tanh", limit=2.0),
    "relu": MLP(activation="relu", limit=1.0), "relu_squared": MLP(activation="relu_squared"),
}
ERRORS = (0.0, 2.0**-20, 2.0**-8, 2.0**-3)


def gates(error: float) -> torch.Tensor:
    """A fine grid, every kink of the table, and values that an error moves just over one, (R, 1)."""
    kinks = torch.tensor([0.0, 0.75, 1.0, 2.0, -1.0, 1.2061], dtype=torch.float64)
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    return torch.cat([grid, kinks, kinks + error / 2, kinks - error / 2]).float().double()[:, None]


def limited_activation(gate: torch.Tensor, mlp: MLP) -> torch.Tensor:
    """The oracle's activation with its limit."""
    if mlp.limit is None:
        return activation(gate, mlp)
    before = mlp.limit_at == "before"
    return activation(gate.clamp(max=mlp.limit), mlp) if before else activation(gate, mlp).clamp(max=mlp.limit)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", MLPS)
def test_derivatives_in_fp32_stay_inside(name: str, error: float) -> None:
    """Autograd in fp32 through a layer written otherwise, at both ends of the interval and in its middle."""
    mlp, gate_R1 = MLPS[name], gates(error)
    rows = Rows(gate_R1, torch.full_like(gate_R1, error))
    for bound, function in ((activation_slope(MODEL, rows, mlp, None), whole_spec.limited_activation),
                            (factor_slope(MODEL, rows, mlp, None), whole_spec.up_factor)):
        for moved in (-error, 0.0, error):
            leaf = (gate_R1 + moved).float().requires_grad_()
            # The grid is fp32's; a moved one is rounded back, which must not leave the interval.
            inside = (leaf.detach().double() - gate_R1).abs() <= error
            (slope,) = torch.autograd.grad(function(leaf, mlp).sum(), leaf, materialize_grads=True)
            excess = ((slope.double() - bound.value).abs() - bound.bound)[inside]
            assert float(excess.max()) <= 0


@pytest.mark.parametrize("name", MLPS)
def test_the_values_are_derivatives(name: str) -> None:
    """The wanted slopes are autograd's through the oracle's functions, kinks aside."""
    mlp, gate_R1 = MLPS[name], torch.linspace(-6, 6, 997, dtype=torch.float64)[:, None]
    exact = Rows(gate_R1, torch.zeros_like(gate_R1))

    for found, function in ((activation_slope(MODEL, exact, mlp, None), limited_activation),
                            (factor_slope(MODEL, exact, mlp, None), up_factor)):
        leaf = gate_R1.clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(leaf, mlp).sum(), leaf)
        # Two ways to write the same function in fp64: some dozen roundings each, of terms of order 1 + |gate|.
        assert bool(((found.value - slope).abs() <= 64 * 2.0**-53 * (1 + gate_R1.abs())).all())


@pytest.mark.parametrize("name", [name for name in MLPS if name != "relu"])
def test_no_second_derivative_passes_its_limit(name: str) -> None:
    """The mean value theorem needs the largest; found here on a fine grid, a little short of the table's."""
    mlp = MLPS[name]
    gate = torch.linspace(-15, 15, 300_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(activation(gate, mlp).sum(), gate, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), gate)
    assert 0.4 * curvature(mlp) < float(second.abs().max()) <= curvature(mlp)


def test_a_wrong_derivative_is_outside() -> None:
    """silu's for gelu's, a clamp that lets everything pass, a kink on the wrong side by more than the error."""
    gate_R1 = gates(2.0**-8)
    rows = Rows(gate_R1, torch.full_like(gate_R1, 2.0**-8))
    silu, gelu = (activation_slope(MODEL, rows, MLPS[name], None) for name in ("silu", "gelu"))
    assert bool(((silu.value - gelu.value).abs() > gelu.bound).any())
    clamped = activation_slope(MODEL, rows, MLPS["relu"], None)
    passing_R1 = (gate_R1 > 0).double()
    off_R1 = (passing_R1 - clamped.value).abs() > clamped.bound
    assert torch.equal(off_R1, gate_R1 - 1.0 > 2.0**-8 * (1 + 2.0**-14))


@pytest.mark.sampled(every=5)
@pytest.mark.parametrize("name", MLPS)
@pytest.mark.parametrize("deviation", ERRORS[1:])
def test_slopes_vary_as_predicted(name: str, deviation: float) -> None:
    """Gates with Gaussian errors: squared errors of the slope average to the variance, at a kink to no more than it."""
    mlp, gate_R1 = MLPS[name], gates(deviation)
    rows = Rows(gate_R1, torch.full_like(gate_R1, 9 * deviation), torch.full_like(gate_R1, deviation**2))
    moved_RN = gate_R1 + deviation * torch.randn(len(gate_R1), 400, generator=torch.Generator().manual_seed(1),
                                                 dtype=torch.float64)
    for bound, function in ((activation_slope(MODEL, rows, mlp, None), limited_activation),
                            (factor_slope(MODEL, rows, mlp, None), up_factor)):
        leaf = moved_RN.clone().requires_grad_()
        (found,) = torch.autograd.grad(function(leaf, mlp).sum(), leaf, materialize_grads=True)
        mean_R1 = (found - bound.value).square().mean(-1, keepdim=True)
        assert bound.variance is not None
        # A mean over 400 squares of a Gaussian is off by 7 %: seven times that, and a little for rounding in fp64.
        assert bool((mean_R1 <= 1.5 * bound.variance + 2.0**-90).all())


def test_a_variance_is_no_larger_than_slopes_vary() -> None:
    """silu far from its flat places, with errors of a bf16 gate: the prediction is less than twice what is seen."""
    mlp, deviation = MLPS["silu"], 2.0**-8
    gate_R1 = torch.linspace(-1.5, 1.5, 61, dtype=torch.float64)[:, None]
    rows = Rows(gate_R1, torch.full_like(gate_R1, 9 * deviation), torch.full_like(gate_R1, deviation**2))
    found = activation_slope(MODEL, rows, mlp, None)
    slope_RN = slope(gate_R1 + deviation * torch.randn(61, 400, generator=torch.Generator().manual_seed(1),
                                                       dtype=torch.float64), mlp)
    assert found.variance is not None
    assert bool((found.variance <= 2 * (slope_RN - found.value).square().mean(-1, keepdim=True)).all())
