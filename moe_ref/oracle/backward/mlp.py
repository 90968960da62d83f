"""One expert backward: what moe_ref.oracle.expert computes, differentiated by hand, in fp64.

    y = act @ w2^T + b2               d_act = d_y @ w2      d_w2 = d_y^T @ act     d_b2 = sum over rows of d_y
    act = f(gate) * h(up)             d_gate = d_act * h(up) * f'(gate)            d_up = d_act * f(gate) * h'(up)
    gate = x @ w1^T + b1, up = ...    d_x = d_gate @ w1 + d_up @ w3    d_w1 = d_gate^T @ x    d_b1 = sum of d_gate

At a clamp's edge the gradient passes, and relu has slope 0 at 0: torch's conventions.
"""

import math

import torch

from moe_ref.contract.gradients import ExpertGradients
from moe_ref.contract.spec import MLP
from moe_ref.contract.weights import ExpertWeights
from moe_ref.oracle import expert as formula


def projections_backward(grad_down_RH: torch.Tensor, grad_act_RI: torch.Tensor, x_RH: torch.Tensor,
                         gate_up_RGI: torch.Tensor, act_RI: torch.Tensor, expert: ExpertWeights,
                         mlp: MLP) -> tuple[torch.Tensor, ExpertGradients]:
    """Gradients of the expert's input rows, (R, H), and of its parameters.

    grad_down_RH: of the rows that the down projection returns; grad_act_RI: of what activate returned;
    act_RI: what the down projection took.
    """
    grad_RGI = activate_backward(grad_act_RI, gate_up_RGI, mlp)
    flat_RN = grad_RGI.flatten(1)
    w13_GIH = (flat_RN.T @ x_RH).unflatten(0, expert.w13_GIH.shape[:2])
    biases = [None if expert.w13_bias_GI is None else grad_RGI.sum(0),
              None if expert.w2_bias_H is None else grad_down_RH.sum(0)]
    grad_x_RH = flat_RN @ formula.packed(expert.w13_GIH).flatten(0, 1)
    return grad_x_RH, ExpertGradients(w13_GIH, grad_down_RH.T @ act_RI, *biases)


def activate_backward(grad_act_RI: torch.Tensor, gate_up_RGI: torch.Tensor, mlp: MLP) -> torch.Tensor:
    """Gradient of gate and up, (R, G, I), from that of activation(gate) * (up + offset)."""
    gate_RI = gate_up_RGI[:, 0]
    passed_RI = torch.ones_like(gate_RI, dtype=torch.bool)
    if mlp.limit is not None and mlp.limit_at == "before":
        passed_RI = within(gate_RI, None, mlp.limit)
        gate_RI = gate_RI.clamp(max=mlp.limit)
    act_RI = formula.activation(gate_RI, mlp)
    if mlp.limit is not None and mlp.limit_at == "after":
        passed_RI = within(act_RI, None, mlp.limit)
        act_RI = act_RI.clamp(max=mlp.limit)
    grad_gate_RI = grad_act_RI * torch.where(passed_RI, slope(gate_RI, mlp), 0.0)
    if not mlp.gated:
        return grad_gate_RI[:, None]
    up_RI = gate_up_RGI[:, 1]
    grad_up_RI = grad_act_RI * act_RI * up_slope(up_RI, mlp)
    return torch.stack([grad_gate_RI * formula.up_factor(up_RI, mlp), grad_up_RI], 1)


def slope(gate: torch.Tensor, mlp: MLP) -> torch.Tensor:
    """Derivative of expert.activation.

    silu, a = sigmoid_scale, s = sigmoid(a g): s * (1 + a g (1 - s)); under a softcap c(g): c' s + c a s (1 - s);
    gelu: Phi(g) + g phi(g); gelu_tanh, z = sqrt(2 / pi) (g + 0.044715 g^3): (1 + tanh z) / 2 + g sech(z)^2 z' / 2;
    relu: 1 above 0; relu_squared: 2 relu(g).
    """
    if mlp.activation == "silu":
        s, rest = torch.sigmoid(mlp.sigmoid_scale * gate), torch.sigmoid(-mlp.sigmoid_scale * gate)
        first, first_slope = ((formula.softcap(gate, mlp.gate_softcap), softcap_slope(gate, mlp.gate_softcap))
                              if mlp.gate_softcap else (gate, 1.0))
        return s * (first_slope + first * mlp.sigmoid_scale * rest)
    if mlp.activation == "gelu":
        return 0.5 * torch.erfc(-gate / math.sqrt(2)) + gate * torch.exp(-gate**2 / 2) / math.sqrt(2 * math.pi)
    if mlp.activation == "gelu_tanh":
        z = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        z_slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * gate**2)
        # (1 + tanh z) / 2 = sigmoid(2 z), and sech(z)^2 / 2 = 2 sigmoid(2 z) sigmoid(-2 z), without cancellation.
        half = torch.sigmoid(2 * z)
        return half + 2 * gate * z_slope * half * torch.sigmoid(-2 * z)
    return (gate > 0).double() if mlp.activation == "relu" else 2 * torch.relu(gate)


def up_slope(up: torch.Tensor, mlp: MLP) -> torch.Tensor:
    """Derivative of expert.up_factor: of the clamp or of the softcap; the offset has none."""
    if mlp.limit is not None:
        return within(up, -mlp.limit, mlp.limit).double()
    return softcap_slope(up, mlp.up_softcap) if mlp.up_softcap else torch.ones_like(up)


def softcap_slope(value: torch.Tensor, cap: float) -> torch.Tensor:
    """Derivative of cap * tanh(value / cap): sech(value / cap)^2, exact to its last digits unlike 1 - tanh^2."""
    return 1 / torch.cosh(value / cap) ** 2


def within(value: torch.Tensor, low: float | None, high: float) -> torch.Tensor:
    """Where a clamp lets the gradient pass, its edges included."""
    passed = value <= high
    return passed if low is None else passed & (value >= low)
