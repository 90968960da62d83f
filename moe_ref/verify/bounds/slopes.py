"""How far the derivatives of activation(gate) and of up's factor may be off; see docs/bounds.md.

Where a kink may lie between the value and what an implementation has for it, the bound covers both sides, and so does
the variance: it is the square of the whole step.
"""

import math
from dataclasses import replace

import torch

from moe_ref.contract.spec import MLP
from moe_ref.contract.vocabulary import Format
from moe_ref.oracle.backward.mlp import slope, up_slope
from moe_ref.verify.bounds.activation import activation
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.bounds.rows import Rows, exact, total_variance

_LIMIT_UNITS = 3.0
"""A limit that the format cannot hold is rounded, as in the forward pass."""

_REACH = 3.0
"""In standard deviations: how far from a gate its slope is looked at, as in the forward pass."""
_BEYOND = 9.0
"""In standard deviations: a kink farther away than this is not reached."""

LARGEST_TANH_CURVATURE = 0.77
"""Largest |derivative| of sech^2, the slope of tanh: 4 / (3 sqrt 3) = 0.7698."""


def curvature(mlp: MLP) -> float:
    """Largest |second derivative| of the activation.

    silu 1/2 at 0, times its sigmoid_scale a; under a cap c there are c'' s, 2 c' a s' and c a^2 s'', at most
    0.77 / cap, a / 2 and, since |c| <= |g|, a / 5. gelu 0.798 at 0, gelu_tanh 0.798. relu has a kink, relu_squared 2.
    """
    if mlp.activation == "silu":
        capped = LARGEST_TANH_CURVATURE / mlp.gate_softcap + 0.2 * mlp.sigmoid_scale if mlp.gate_softcap else 0.0
        return 0.5 * mlp.sigmoid_scale + capped
    return {"gelu": 0.8, "gelu_tanh": 0.8, "relu": 0.0, "relu_squared": 2.0}[mlp.activation]


def activation_slope(model: RoundingModel, gate: Rows, mlp: MLP, inner: Format | None) -> Rows:
    """Derivative of the limited activation with respect to the gate."""
    unit, floor = model.elementwise(inner)
    inside = gate.value if mlp.limit is None or mlp.limit_at == "after" else gate.value.clamp(max=mlp.limit)
    free, evaluated = slope(inside, mlp), unit * _units(inside, mlp)
    error = curvature(mlp) * gate.bound + evaluated + floor * (1 + inside.abs())
    variance = total_variance(_moved(gate, inside, mlp), (unit * _likely_units(inside, mlp)).square(), floor**2)
    if mlp.activation == "relu":
        kink = gate.value.abs() <= gate.bound
        error = torch.where(kink, 1.0, 0.0)
        variance = total_variance(variance, (kink & _reaches(gate, gate.value.abs())).double())
    result = Rows(free, error, variance)
    return result if mlp.limit is None else _limited(model, gate, result, mlp, mlp.limit, inner)


def _limited(model: RoundingModel, gate: Rows, free: Rows, mlp: MLP, limit: float, inner: Format | None) -> Rows:
    """The slope below the limit and 0 beyond it; where that may be reached, either."""
    reached = gate if mlp.limit_at == "before" else activation(model, gate, replace(
        mlp, limit=None, limit_at="before"), inner)
    passed, rounded = reached.value <= limit, _LIMIT_UNITS * model.elementwise(inner)[0] * limit
    distance = (reached.value - limit).abs()
    near = distance <= reached.bound + rounded
    error, variance = torch.where(passed, free.bound, 0.0), free.variance
    both = torch.ones_like(error) if mlp.activation == "relu" else free.largest
    if variance is not None:
        likely = near & _reaches(reached, distance - rounded)
        variance = torch.where(passed, variance, 0.0) + likely * free.value.square()
    return Rows(torch.where(passed, free.value, 0.0), torch.where(near, error + both, error), variance)


def _moved(gate: Rows, inside: torch.Tensor, mlp: MLP) -> torch.Tensor | None:
    """Variance of a slope that has no kink nearby, from that of its gate: its change over a few standard deviations."""
    if gate.variance is None:
        return None
    if mlp.activation == "relu":
        return torch.zeros_like(inside)
    # relu_squared is flat below 0: farther out nothing would be predicted of what is not 0.
    deviations = _BEYOND if mlp.activation == "relu_squared" else _REACH
    reach, free = deviations * gate.variance.sqrt(), slope(inside, mlp)
    change = torch.maximum((slope(inside + reach, mlp) - free).abs(), (slope(inside - reach, mlp) - free).abs())
    return (change / deviations).square()


def _reaches(rows: Rows, distance: torch.Tensor) -> torch.Tensor:
    """Whether the error of a value may be as large as a distance."""
    if rows.variance is None:
        return torch.ones_like(distance, dtype=torch.bool)
    return distance <= _BEYOND * rows.variance.sqrt()


def _units(gate: torch.Tensor, mlp: MLP) -> torch.Tensor:
    """Error of evaluating the derivative, in units, absolute.

    s (1 + a g (1 - s)): a sigmoid is off by 8 + 2 |a g| relative, 1 - s by that of s, so the whole by
    s (1 + |a g|) (21 + 4 |a g|); a cap adds 8 to its value and to its slope. gelu: the two terms by 8 + g^2 each,
    1 + erf cancels. gelu_tanh: 1 - tanh^2 cancels, times |g| z'.
    """
    size = gate.abs()
    if mlp.activation == "silu":
        argument, s = mlp.sigmoid_scale * size, torch.sigmoid(mlp.sigmoid_scale * gate)
        units = s * (1 + argument) * (21 + 4 * argument)
        return units + s * 8 * (1 + mlp.sigmoid_scale * mlp.gate_softcap) if mlp.gate_softcap else units
    if mlp.activation == "gelu":
        return 16 + size * torch.exp(-gate**2 / 2) / math.sqrt(2 * math.pi) * (8 + 2 * gate**2)
    if mlp.activation == "gelu_tanh":
        return 16 + 12 * size * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * gate**2)
    return 2 * torch.relu(gate) if mlp.activation == "relu_squared" else torch.zeros_like(gate)


def _likely_units(gate: torch.Tensor, mlp: MLP) -> torch.Tensor:
    """Usual error of evaluating the derivative, in units: a quarter of the bound, but of silu's.

    s and a g (1 - s) are off by some three units, and by that of the argument of exp, which moves s by s (1 - s) |a g|.
    """
    if mlp.activation != "silu" or mlp.gate_softcap:
        return _units(gate, mlp) / 4
    argument, s = mlp.sigmoid_scale * gate.abs(), torch.sigmoid(mlp.sigmoid_scale * gate)
    return s * (1 + argument) * (3 + (1 - s) * argument)


def factor_slope(model: RoundingModel, up: Rows, mlp: MLP, inner: Format | None) -> Rows:
    """Derivative of what the activation is multiplied with, with respect to up."""
    unit, value = model.elementwise(inner)[0], up_slope(up.value, mlp)
    if mlp.limit is not None:
        distance, rounded = (up.value.abs() - mlp.limit).abs(), _LIMIT_UNITS * unit * mlp.limit
        near = distance <= up.bound + rounded
        return Rows(value, near.double(), (near & _reaches(up, distance - rounded)).double())
    if mlp.up_softcap:
        largest, evaluated = LARGEST_TANH_CURVATURE / mlp.up_softcap, torch.full_like(value, 16 * unit)
        variance = None if up.variance is None else largest**2 * up.variance
        return Rows(value, largest * up.bound + evaluated, total_variance(variance, model.evaluated(evaluated)))
    return exact(value)
