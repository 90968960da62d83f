"""One expert: a gated MLP.

    gate = x @ w1^T      up = x @ w3^T      (w13 holds both: w13[0] is w1, w13[1] is w3)
    y    = (activation(gate) * up) @ w2^T
"""

import math

import torch
import torch.nn.functional as F

from moe_ref.contract.spec import MLP


def gate_up(x_RH: torch.Tensor, w13_GIH: torch.Tensor) -> torch.Tensor:
    """Both projections of R rows, (R, 2, I), in fp64."""
    return torch.stack([x_RH.double() @ w13_GIH[g].double().T for g in (0, 1)], dim=1)


def activate(gate_up_RGI: torch.Tensor, mlp: MLP) -> torch.Tensor:
    """activation(gate) * up, (R, I)."""
    gate_RI, up_RI = gate_up_RGI.unbind(1)
    return activation(gate_RI, mlp) * up_RI


def activation(gate: torch.Tensor, mlp: MLP) -> torch.Tensor:
    """silu: g * sigmoid(g); gelu: g * Phi(g), erf form; gelu_tanh: its tanh approximation (Hendrycks, Gimpel 2016)."""
    if mlp.activation == "silu":
        return F.silu(gate)
    if mlp.activation == "gelu":
        return 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))
    return 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))


def down(act_RI: torch.Tensor, w2_HI: torch.Tensor) -> torch.Tensor:
    """Back to the model width, (R, H), in fp64."""
    return act_RI.double() @ w2_HI.double().T
