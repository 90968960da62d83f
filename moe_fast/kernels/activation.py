"""What becomes of gate and up between the two products, and the slopes of it: functions inside the kernels.

FORM is a moe_fast.form.Form, known to the compiler, so that an option costs nothing where it is not used. Formulas:
moe_ref.oracle.expert and moe_ref.oracle.backward.mlp. Comparisons are such that a NaN stays one.
"""

import triton
import triton.language as tl


@triton.jit
def softcap(value, CAP: tl.constexpr):
    """CAP tanh(value / CAP), to a few units in the last place also near 0 (tanh: Cephes)."""
    z = value * (1.0 / CAP)
    square = z * z
    series = ((((-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2) * square
               + 1.33314422036e-1) * square - 3.33332819422e-1) * square * z + z
    return CAP * tl.where(tl.abs(z) < 0.625, series, 2.0 * tl.sigmoid(2.0 * z) - 1.0)


@triton.jit
def softcap_slope(value, CAP: tl.constexpr):
    """sech(value / CAP)^2 = 4 s (1 - s), s = sigmoid(2 value / CAP); 1 - s is written so that it does not cancel."""
    z = value * (2.0 / CAP)
    return 4.0 * tl.sigmoid(z) * tl.sigmoid(-z)


@triton.jit
def activation(gate, FORM: tl.constexpr):
    """In fp32; tanh(z) of gelu is written 2 sigmoid(2z) - 1, which every backend has."""
    if FORM.activation == "silu":
        first = gate
        if FORM.gate_softcap != 0.0:
            first = softcap(gate, FORM.gate_softcap)
        result = first * tl.sigmoid(gate * FORM.sigmoid_scale)
    elif FORM.activation == "gelu":
        result = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif FORM.activation == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        result = gate * tl.sigmoid(2.0 * inner)
    else:
        result = tl.where(gate < 0.0, 0.0, gate)
        if FORM.activation == "relu_squared":
            result *= result
    return result


@triton.jit
def activation_slope(gate, FORM: tl.constexpr):
    """d activation(gate) / d gate in fp32; 1 - sigmoid(z) is written sigmoid(-z), which does not cancel."""
    if FORM.activation == "silu":
        scaled = gate * FORM.sigmoid_scale
        share = tl.sigmoid(scaled)
        if FORM.gate_softcap == 0.0:
            result = share + scaled * share * tl.sigmoid(-scaled)
        else:
            capped = softcap(gate, FORM.gate_softcap)
            first_slope = softcap_slope(gate, FORM.gate_softcap)
            result = share * (first_slope + FORM.sigmoid_scale * capped * tl.sigmoid(-scaled))
    elif FORM.activation == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        result = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476)) + gate * density
    elif FORM.activation == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        inner_slope = 0.7978845608028654 * (1.0 + 0.134145 * gate * gate)
        share = tl.sigmoid(2.0 * inner)
        result = share + 2.0 * gate * share * tl.sigmoid(-2.0 * inner) * inner_slope
    elif FORM.activation == "relu":
        result = tl.where(gate > 0.0, 1.0, 0.0)
    else:
        result = tl.where(gate < 0.0, 0.0, 2.0 * gate)
    return result


@triton.jit
def at_most(value, LIMIT: tl.constexpr):
    """min(value, LIMIT)."""
    return tl.where(value > LIMIT, LIMIT, value)


@triton.jit
def activate(gate, FORM: tl.constexpr):
    """The activation with its limit: all of the result without an up projection, else the factor of up."""
    if FORM.limit is not None and FORM.limit_at == "before":
        gate = at_most(gate, FORM.limit)
    result = activation(gate, FORM)
    if FORM.limit is not None and FORM.limit_at == "after":
        result = at_most(result, FORM.limit)
    return result


@triton.jit
def activate_slope(gate, FORM: tl.constexpr):
    """d activate(gate) / d gate; it passes at the edge of a limit."""
    if FORM.limit is None:
        result = activation_slope(gate, FORM)
    elif FORM.limit_at == "before":
        result = tl.where(gate <= FORM.limit, activation_slope(at_most(gate, FORM.limit), FORM), 0.0)
    else:
        result = tl.where(activation(gate, FORM) <= FORM.limit, activation_slope(gate, FORM), 0.0)
    return result


@triton.jit
def up_factor(up, FORM: tl.constexpr):
    """What the activation is multiplied with."""
    if FORM.limit is not None:
        up = tl.where(up < -FORM.limit, -FORM.limit, at_most(up, FORM.limit))
    if FORM.up_softcap != 0.0:
        up = softcap(up, FORM.up_softcap)
    if FORM.up_offset != 0.0:
        up += FORM.up_offset
    return up


@triton.jit
def pass_up(grad, up, FORM: tl.constexpr):
    """grad d up_factor(up) / d up: back through the limit or the softcap of up."""
    if FORM.limit is not None:
        grad = tl.where((up <= FORM.limit) & (up >= -FORM.limit), grad, 0.0)
    if FORM.up_softcap != 0.0:
        grad *= softcap_slope(up, FORM.up_softcap)
    return grad


@triton.jit
def from_products(gate, up, weight, bias_at, stride_bias_G, in_columns, HAS_BIAS: tl.constexpr, FORM: tl.constexpr):
    """Gate and up from their products over H: times the weight where it is on the input, plus their biases."""
    if FORM.weight_on_input:
        gate *= weight
        up *= weight
    if HAS_BIAS:
        gate += tl.load(bias_at, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        if FORM.gated:
            up += tl.load(bias_at + stride_bias_G, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    return gate, up


@triton.jit
def act_of(gate, up, FORM: tl.constexpr):
    """What the second product takes."""
    result = activate(gate, FORM)
    if FORM.gated:
        result *= up_factor(up, FORM)
    return result


@triton.jit
def through_act(grad, gate, up, FORM: tl.constexpr):
    """Gradients of gate and up from that of act_of(gate, up); the second means nothing without an up projection."""
    grad_gate = grad * activate_slope(gate, FORM)
    grad_up = grad
    if FORM.gated:
        grad_gate *= up_factor(up, FORM)
        grad_up = pass_up(grad * activate(gate, FORM), up, FORM)
    return grad_gate, grad_up
