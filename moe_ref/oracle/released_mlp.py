"""One expert as released code computes it: every step in fp64, rounded where that code rounds."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from moe_ref.contract.released import At
from moe_ref.contract.spec import MLP
from moe_ref.contract.weights import ExpertWeights
from moe_ref.oracle.expert import softcap

Round = Callable[[torch.Tensor], torch.Tensor]


def to_dtype(dtype: torch.dtype) -> Round:
    """Rounds fp64 values to `dtype` by way of fp32, where the hardware computes, and returns them in fp64."""
    return lambda value: value.float().to(dtype).double()


def mlp_as_released(x_RH: torch.Tensor, expert: ExpertWeights, mlp: MLP, activation: At, at_rows: Round,
                    act_weight_R1: torch.Tensor | None = None) -> torch.Tensor:
    """Rows of one MLP, (R, H) in fp64, from rows in fp64; products and what is stored are rounded `at_rows`.

    act_weight_R1 multiplies the stored activation, and so the bias of the rows.
    """
    w13_GIH, w2_HI, w13_bias_GI, w2_bias_H = expert
    gate_up_RGI = at_rows((x_RH @ w13_GIH.double().flatten(0, 1).T).unflatten(1, w13_GIH.shape[:2]))
    if w13_bias_GI is not None:
        gate_up_RGI = at_rows(gate_up_RGI + w13_bias_GI.double())
    act_RI = at_rows(_activate(gate_up_RGI, mlp, at_rows if activation == "model" else lambda value: value))
    if act_weight_R1 is not None:
        act_RI = at_rows(act_RI * act_weight_R1)
    down_RH = at_rows(act_RI @ w2_HI.double().T)
    if w2_bias_H is None:
        return down_RH
    bias_RH = w2_bias_H.double() if act_weight_R1 is None else at_rows(act_weight_R1 * w2_bias_H.double())
    return at_rows(down_RH + bias_RH)


def _activate(gate_up_RGI: torch.Tensor, mlp: MLP, rounded: Round) -> torch.Tensor:
    """activation(gate) * (up + offset), `rounded` after every elementwise step."""
    gate_RI, limit = gate_up_RGI[:, 0], mlp.limit
    if limit is not None and mlp.limit_at == "before":
        gate_RI = gate_RI.clamp(max=limit)
    act_RI = _activation(gate_RI, mlp, rounded)
    if limit is not None and mlp.limit_at == "after":
        act_RI = act_RI.clamp(max=limit)
    if not mlp.gated:
        return act_RI
    up_RI = gate_up_RGI[:, 1]
    if limit is not None:
        up_RI = up_RI.clamp(-limit, limit)
    if mlp.up_softcap:
        up_RI = rounded(softcap(up_RI, mlp.up_softcap))
    if mlp.up_offset:
        up_RI = rounded(up_RI + mlp.up_offset)
    return rounded(act_RI * up_RI)


def _activation(gate_RI: torch.Tensor, mlp: MLP, rounded: Round) -> torch.Tensor:
    if mlp.activation == "silu" and (mlp.gate_softcap or mlp.sigmoid_scale != 1.0):
        scaled_RI = gate_RI if mlp.sigmoid_scale == 1.0 else rounded(gate_RI * mlp.sigmoid_scale)
        factor_RI = rounded(softcap(gate_RI, mlp.gate_softcap)) if mlp.gate_softcap else gate_RI
        return rounded(factor_RI * rounded(torch.sigmoid(scaled_RI)))
    if mlp.activation == "silu":
        return rounded(F.silu(gate_RI))
    if mlp.activation in ("gelu", "gelu_tanh"):
        return rounded(F.gelu(gate_RI, approximate="tanh" if mlp.activation == "gelu_tanh" else "none"))
    relu_RI = torch.relu(gate_RI)
    return relu_RI if mlp.activation == "relu" else rounded(relu_RI.square())
