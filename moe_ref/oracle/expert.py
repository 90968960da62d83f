"""One expert: an MLP, gated or not.

    gate = x @ w1^T + b1      up = x @ w3^T + b3      (w13 holds both: w13[0] is w1, w13[1] is w3)
    y    = (activation(gate) * (up + offset)) @ w2^T + b2
"""

import math

import torch
import torch.nn.functional as F

from moe_ref.contract.spec import MLP


def gate_up(x_RH: torch.Tensor, w13_GIH: torch.Tensor, bias_GI: torch.Tensor | None = None) -> torch.Tensor:
    """Both projections of R rows, (R, G, I), in fp64."""
    gate_up_RGI = (x_RH.double() @ packed(w13_GIH).flatten(0, 1).T).unflatten(1, w13_GIH.shape[:2])
    return gate_up_RGI if bias_GI is None else gate_up_RGI + bias_GI.double()


def activate(gate_up_RGI: torch.Tensor, mlp: MLP) -> torch.Tensor:
    """activation(gate) * (up + offset) with the limits and caps of the MLP, (R, I); activation(gate) if not gated."""
    gate_RI = gate_up_RGI[:, 0]
    if mlp.limit is not None and mlp.limit_at == "before":
        gate_RI = gate_RI.clamp(max=mlp.limit)
    act_RI = activation(gate_RI, mlp)
    if mlp.limit is not None and mlp.limit_at == "after":
        act_RI = act_RI.clamp(max=mlp.limit)
    return act_RI * up_factor(gate_up_RGI[:, 1], mlp) if mlp.gated else act_RI


def activation(gate: torch.Tensor, mlp: MLP) -> torch.Tensor:
    """silu: g * sigmoid(scale * g), its first factor soft-capped where declared; gelu: g * Phi(g), Phi by erfc;
    gelu_tanh: g * (1 + tanh z) / 2 (Hendrycks, Gimpel 2016), written g * sigmoid(2 z); relu; relu_squared (So et al.
    2021). 1 + erf and 1 + tanh would cancel for negative gates."""
    if mlp.activation == "silu":
        if mlp.gate_softcap:
            return softcap(gate, mlp.gate_softcap) * torch.sigmoid(mlp.sigmoid_scale * gate)
        return F.silu(gate) if mlp.sigmoid_scale == 1.0 else gate * torch.sigmoid(mlp.sigmoid_scale * gate)
    if mlp.activation == "gelu":
        return 0.5 * gate * torch.erfc(-gate / math.sqrt(2))
    if mlp.activation == "gelu_tanh":
        return gate * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))
    return torch.relu(gate) if mlp.activation == "relu" else torch.relu(gate) ** 2


def up_factor(up: torch.Tensor, mlp: MLP) -> torch.Tensor:
    """What the activation is multiplied with: up, clamped or soft-capped, plus the offset."""
    if mlp.limit is not None:
        up = up.clamp(-mlp.limit, mlp.limit)
    if mlp.up_softcap:
        up = softcap(up, mlp.up_softcap)
    return up + mlp.up_offset if mlp.up_offset else up


def softcap(value: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(value / cap)."""
    return cap * torch.tanh(value / cap)


def down(act_RI: torch.Tensor, w2_HI: torch.Tensor) -> torch.Tensor:
    """Back to the model width, (R, H), in fp64; the bias is added by the caller, once for all ranks."""
    return act_RI.double() @ packed(w2_HI).T


def packed(weight: torch.Tensor) -> torch.Tensor:
    """In fp64 and contiguous: BLAS sums in another order for other strides, and the layout of the weights must not
    show in the result."""
    return weight.to(torch.float64, memory_format=torch.contiguous_format).contiguous()
