"""How far the derivatives of activation(gate) and of up's factor may be off; see docs/bounds.md.

Where a kink may lie between the value and what an implementation has for it, the bound covers both sides.
"""

import math
from dataclasses import replace

import torch

from moe_ref.contract.spec import MLP
from moe_ref.contract.vocabulary import Format
from moe_ref.oracle.backward.mlp import slope, up_slope
from moe_ref.verify.bounds.activation import activation
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.bounds.rows import Rows

_LIMIT_UNITS = 3.0
"""A limit that the format cannot hold is rounded, as in the forward pass."""

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
    inside, passed, near = gate.value, torch.ones_like(gate.value, dtype=torch.bool), None
    if mlp.limit is not None:
        reached = gate if mlp.limit_at == "before" else activation(model, gate, replace(
            mlp, limit=None, limit_at="before"), inner)
        passed = reached.value <= mlp.limit
        near = (reached.value - mlp.limit).abs() <= reached.bound + _LIMIT_UNITS * unit * mlp.limit
        inside = gate.value.clamp(max=mlp.limit) if mlp.limit_at == "before" else inside
    free = slope(inside, mlp)
    error = curvature(mlp) * gate.bound + unit * _units(inside, mlp) + floor * (1 + inside.abs())
    if mlp.activation == "relu":
        error = torch.where(gate.value.abs() <= gate.bound, 1.0, 0.0)
    if near is None:
        return Rows(free, error)
    error = torch.where(passed, error, 0.0)
    both = free.abs() + curvature(mlp) * gate.bound + unit * _units(inside, mlp)
    if mlp.activation == "relu":
        both = torch.ones_like(both)
    return Rows(torch.where(passed, free, 0.0), torch.where(near, error + both, error))


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


def factor_slope(model: RoundingModel, up: Rows, mlp: MLP, inner: Format | None) -> Rows:
    """Derivative of what the activation is multiplied with, with respect to up."""
    unit, value = model.elementwise(inner)[0], up_slope(up.value, mlp)
    if mlp.limit is not None:
        near = (up.value.abs() - mlp.limit).abs() <= up.bound + _LIMIT_UNITS * unit * mlp.limit
        return Rows(value, near.double())
    if mlp.up_softcap:
        return Rows(value, LARGEST_TANH_CURVATURE / mlp.up_softcap * up.bound + 16 * unit)
    return Rows(value, torch.zeros_like(value))
