"""torch.nn.functional.grouped_mm as a building block: rows sorted by expert, two grouped products, one sum."""

import torch
from torch.nn.functional import grouped_mm, silu

from moe_ref.adapters.experts_layer import ExpertsCall, ExpertsLayer
from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.features import Feature
from moe_ref.contract.vocabulary import Direction, Dtype, Format, Ranks, Stage


def _numerics(dtype: Dtype) -> Numerics:
    """Every result of torch is rounded to the model's dtype; routing weights and the sum over slots are in fp32."""
    model = Format(dtype.value)
    stored = dict.fromkeys((Stage.GATE_UP, Stage.ACT, Stage.DOWN, Stage.MERGED, Stage.REDUCED), model)
    return Numerics(storage={Stage.LOGITS: Format.FP32, Stage.WEIGHTS: Format.FP32, **stored}, activation=model,
                    reduce=model, weight_at="merge")


def experts(call: ExpertsCall) -> torch.Tensor:
    """Rows of one expert after the other, as grouped_mm takes them; slots that name no expert are left out."""
    num_experts, top_k = call.spec.num_experts, call.ids_TK.shape[1]
    served_S = ((call.ids_TK >= 0) & (call.ids_TK < num_experts)).flatten()
    slot_R = served_S.nonzero().squeeze(1)
    slot_R = slot_R[torch.sort(call.ids_TK.flatten()[slot_R], stable=True).indices]
    ids_R, token_R = call.ids_TK.flatten()[slot_R], slot_R // top_k
    ends_E = torch.bincount(ids_R, minlength=num_experts).cumsum(0).to(torch.int32)
    w13_EHN = call.weights.w13_EGIH.flatten(1, 2).transpose(1, 2)
    gate_RI, up_RI = grouped_mm(call.x_TH[token_R], w13_EHN, offs=ends_E).chunk(2, dim=-1)
    act_RI = silu(gate_RI) * up_RI
    down_RH = grouped_mm(act_RI, call.weights.w2_EHI.transpose(1, 2), offs=ends_E)
    order_R = torch.argsort(slot_R)
    call.record(Stage.ACT, act_RI.detach()[order_R])
    call.record(Stage.DOWN, down_RH.detach()[order_R])
    weighted_RH = down_RH.float() * call.weights_TK.flatten()[slot_R, None]
    y_TH = torch.zeros(call.x_TH.shape, dtype=torch.float32, device=call.x_TH.device).index_add(0, token_R, weighted_RH)
    return y_TH.to(call.x_TH.dtype)


GROUPED_MM = ExpertsLayer(
    Capabilities(
        name="torch.grouped_mm", version=str(torch.__version__), numerics={dtype: _numerics(dtype) for dtype in Dtype},
        stages=(Stage.IDS, Stage.WEIGHTS, Stage.ACT, Stage.DOWN, Stage.MERGED), scores=("softmax", "sigmoid"),
        features=(Feature.RESIDUAL,), directions=tuple(Direction), max_tp=64, ranks=(Ranks.LOCAL, Ranks.GLOO),
        injected_routing=True, collectives_through_groups=True, hidden_multiple=16, intermediate_multiple=16),
    experts)
