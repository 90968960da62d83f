"""Experts by a grouped product of some library: rows sorted by expert, two products, a sum over slots in fp32."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import silu

from moe_ref.adapters.experts_layer import ExpertsCall
from moe_ref.contract.capabilities import Numerics
from moe_ref.contract.vocabulary import Dtype, Format, Ranks, Stage

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""rows_RK sorted by group, w_EKN and rows_E of each group (int64) -> (R, N), a row by the matrix of its group.

w_EKN is a transposed view of (E, N, K), whose strides are those of the harness."""

SHOWN = (Stage.IDS, Stage.WEIGHTS, Stage.ACT, Stage.DOWN, Stage.MERGED)
"""Stages that a layer around `grouped_experts` shows."""

DECLARED: dict[str, Any] = {"stages": SHOWN, "scores": ("softmax", "sigmoid"), "max_tp": 64, "injected_routing": True,
                            "collectives_through_groups": True}
"""What every such layer can declare, whatever makes its products, beside the ranks that it runs on."""

FORKED = (Ranks.LOCAL, Ranks.GLOO)
"""Ranks of libraries without threads of their own: process ranks are forked from a child that may have run them."""


def rounded(dtype: Dtype) -> Numerics:
    """Every result of a product or a step is rounded to the model's dtype; weights and the sum over slots are fp32."""
    model = Format(dtype.value)
    stored = dict.fromkeys((Stage.GATE_UP, Stage.ACT, Stage.DOWN, Stage.MERGED, Stage.REDUCED), model)
    return Numerics(storage={Stage.LOGITS: Format.FP32, Stage.WEIGHTS: Format.FP32, **stored}, activation=model,
                    reduce=model, weight_at="merge")


def silu_product(gate_RI: torch.Tensor, up_RI: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up by torch, two steps."""
    return silu(gate_RI) * up_RI


def grouped_experts(call: ExpertsCall, product: Product,
                    activation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = silu_product) -> torch.Tensor:
    """Rows of one expert after the other; slots that name no expert are left out. Shows `act` and `down`."""
    num_experts, top_k = call.spec.num_experts, call.ids_TK.shape[1]
    served_S = ((call.ids_TK >= 0) & (call.ids_TK < num_experts)).flatten()
    slot_R = served_S.nonzero().squeeze(1)
    slot_R = slot_R[torch.sort(call.ids_TK.flatten()[slot_R], stable=True).indices]
    ids_R, token_R = call.ids_TK.flatten()[slot_R], slot_R // top_k
    rows_E = torch.bincount(ids_R, minlength=num_experts)
    w13_EHN = call.weights.w13_EGIH.flatten(1, 2).transpose(1, 2)
    gate_RI, up_RI = product(call.x_TH[token_R], w13_EHN, rows_E).chunk(2, dim=-1)
    act_RI = activation(gate_RI, up_RI)
    down_RH = product(act_RI, call.weights.w2_EHI.transpose(1, 2), rows_E)
    order_R = torch.argsort(slot_R)
    call.record(Stage.ACT, act_RI.detach()[order_R])
    call.record(Stage.DOWN, down_RH.detach()[order_R])
    weighted_RH = down_RH.float() * call.weights_TK.flatten()[slot_R, None]
    y_TH = torch.zeros(call.x_TH.shape, dtype=torch.float32, device=call.x_TH.device).index_add(0, token_R, weighted_RH)
    return y_TH.to(call.x_TH.dtype)
