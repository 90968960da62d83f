"""How far activation(gate) * (up + offset) may be off, from the errors of gate and up; see docs/bounds.md."""

import torch

from moe_ref.contract.spec import MLP
from moe_ref.contract.vocabulary import Format
from moe_ref.numerics.accumulation import ROUNDING
from moe_ref.oracle import expert as formula
from moe_ref.oracle.backward.mlp import slope, up_slope
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.bounds.rows import Rows, exact, total_drift, total_variance

SLOPE = {"silu": 1.1, "gelu": 1.13, "gelu_tanh": 1.13, "relu": 1.0}
"""Largest |derivative|: silu 1.0998 at g = 2.40 for every sigmoid_scale and gate_softcap, gelu 1.1290 at
g = sqrt 2. That of relu_squared grows with the gate."""

_REACH = 9.0
"""In standard deviations: how far from a gate its slope is looked at."""
_BEYOND = 9.0
"""In standard deviations: so far beyond a limit nothing of an error is left."""

_LIMIT_UNITS = 3.0
"""A limit that the format cannot hold is rounded; its relative error grows by a factor of at most 2."""


def activated(model: RoundingModel, gate_up_RGI: Rows, mlp: MLP, inner: Format | None) -> Rows:
    """act before it is stored, (R, I); `inner` is the format of every step inside, None the evaluation's."""
    unit, floor = model.elementwise(inner)
    gate = gate_up_RGI.mapped(lambda one: one[:, 0])
    factor = activation(model, gate, mlp, inner)
    if mlp.gated:
        up = gate_up_RGI.mapped(lambda one: one[:, 1])
        other = up_factor(model, up, mlp, inner)
    else:
        up = other = exact(torch.ones_like(gate.value))
    error = factor.bound * other.largest + factor.value.abs() * other.bound
    # The sigmoid of a large negative gate is flushed, or its exponential overflows: it may be 0 below 2^-126.
    error = error + floor * (1 + gate.value.abs()) * (1 + up.value.abs())
    value, variance = formula.activate(gate_up_RGI.value, mlp), None
    if factor.variance is not None and other.variance is not None:
        variance = (factor.variance * (other.value.square() + other.variance) + factor.value.square() * other.variance
                    + (floor * (1 + gate.value.abs()) * (1 + up.value.abs())).square()
                    + ROUNDING * (unit * value).square())
    drift = None
    if gate.drift is not None:
        drift = slope(gate.value, mlp) * gate.drift * other.value
    if up.drift is not None:
        drift = total_drift(drift, factor.value * up_slope(up.value, mlp) * up.drift)
    if inner is None:
        return Rows(value, error, variance, drift=drift)
    # A step that overflows its format makes everything after it right.
    widest = torch.stack([gate.largest, factor.largest, up.largest, other.largest, value.abs() + error]).amax(0)
    known = Rows(value, error + unit * (value.abs() + error), variance, drift=drift)
    return known.masked(widest >= model.largest(inner))


def activation(model: RoundingModel, gate: Rows, mlp: MLP, inner: Format | None) -> Rows:
    """activation(gate) with its limit, and the error of evaluating it.

    silu's error is relative to its value and grows with the exponent's argument; gelu cancels for negative
    gates, so its error is relative to the gate.
    """
    unit, _ = model.elementwise(inner)
    units = torch.full_like(gate.value, model.tolerances.file.evaluations.activation.units)
    if mlp.limit is not None:
        units = units + _LIMIT_UNITS
        if mlp.limit_at == "before":
            gate = _clamped(gate, -torch.inf, mlp.limit)
    value = formula.activation(gate.value, mlp)
    propagated = _propagated(gate, mlp)
    argument = gate.value.abs()
    if mlp.activation == "silu":
        # Two roundings of the exponent's argument where it is scaled.
        units = units + argument * (mlp.sigmoid_scale * (1 + (mlp.sigmoid_scale != 1.0)))
    elif mlp.activation.startswith("gelu"):
        units = units + argument
    scale = argument if mlp.activation.startswith("gelu") else value.abs()
    evaluated = torch.expm1(units * unit) * scale
    error = propagated + evaluated + torch.expm1(units * unit) * propagated
    if mlp.gate_softcap:
        capped = model.softcap_error(gate, mlp.gate_softcap, inner)
        error, evaluated = error + capped, evaluated + capped
    variance = None if gate.variance is None else _propagated_variance(gate, mlp) + model.evaluated(evaluated)
    result = Rows(value, error, variance)
    if mlp.limit is not None and mlp.limit_at == "after":
        result = _clamped(result, -torch.inf, mlp.limit)
    return Rows(result.value, result.bound + (0.0 if mlp.limit is None else unit * result.value.abs()), result.variance)


def _propagated_variance(gate: Rows, mlp: MLP) -> torch.Tensor:
    """Variance through the activation: its slope, and at a kink or limit within reach the slope beyond."""
    assert gate.variance is not None
    if not bool(gate.variance.any()):
        return gate.variance
    reach = _REACH * gate.variance.sqrt()
    here, below, above = (slope(gate.value + step, mlp).abs() for step in (0.0, -reach, reach))
    return torch.maximum(here, torch.maximum(below, above)).square() * gate.variance


def _propagated(gate: Rows, mlp: MLP) -> torch.Tensor:
    """What the gate's error does, by the mean value theorem on [gate - d, gate + d]."""
    if mlp.activation == "relu_squared":
        return gate.bound * (2 * torch.relu(gate.value) + gate.bound)
    return SLOPE[mlp.activation] * gate.bound


def up_factor(model: RoundingModel, up: Rows, mlp: MLP, inner: Format | None) -> Rows:
    """up, clamped or soft-capped, plus the offset."""
    unit, floor = model.elementwise(inner)
    error, variance, plain = up.bound, up.variance, mlp.limit is None and not mlp.up_softcap and not mlp.up_offset
    if mlp.limit is not None:
        clamped = _clamped(up, -mlp.limit, mlp.limit)
        error, variance = clamped.bound, clamped.variance
    if mlp.up_softcap:
        error = error + model.softcap_error(up, mlp.up_softcap, inner)
    value = formula.up_factor(up.value, mlp)
    if plain and inner is None:
        return Rows(value, error, variance)
    # One rounding of up, of the limit or the offset, and of the sum.
    gauge, relative = value.abs() + 2 * abs(mlp.up_offset), torch.expm1(torch.tensor(3 * unit))
    evaluated = relative * gauge + floor
    if mlp.up_softcap:
        evaluated = evaluated + model.softcap_error(up, mlp.up_softcap, inner)
    return Rows(value, error + relative * (gauge + error) + floor, total_variance(variance, model.evaluated(evaluated)))


def _clamped(rows: Rows, low: float, high: float) -> Rows:
    """Clamped values; the error is that of the clamped interval, which is never wider, nor is the variance."""
    value = rows.value.clamp(low, high)
    above = (rows.value + rows.bound).clamp(low, high) - value
    below = value - (rows.value - rows.bound).clamp(low, high)
    variance = rows.variance
    if variance is not None:
        variance = variance.masked_fill((rows.value - value).abs() > _BEYOND * variance.sqrt(), 0.0)
    return Rows(value, torch.maximum(above, below), variance)
