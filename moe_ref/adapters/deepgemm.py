"""DeepGEMM's `m_grouped_bf16_gemm_nt_contiguous`, twice, with torch's silu between: GPU only.

Written after its documentation and never run. Rows of an expert are padded to its alignment, and padded rows name no
expert (-1); slots that name none are left out. Router, activation, weights and sum are torch's.
"""

from importlib.metadata import version

import deep_gemm  # type: ignore[missing-import]
import torch
from torch.nn.functional import silu

from moe_ref.adapters.aligned_rows import aligned_rows
from moe_ref.adapters.experts_layer import ExpertsCall, ExpertsLayer
from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.features import Feature
from moe_ref.contract.vocabulary import Dtype, Format, Ranks, Stage

_MODEL = Format.BF16
_NUMERICS = Numerics(
    storage={Stage.LOGITS: Format.FP32, Stage.WEIGHTS: Format.FP32,
             **dict.fromkeys((Stage.GATE_UP, Stage.ACT, Stage.DOWN, Stage.MERGED, Stage.REDUCED), _MODEL)},
    activation=_MODEL, reduce=_MODEL, weight_at="merge")
"""Products are stored in bf16, torch rounds every step between them; weights and the sum over slots are in fp32."""


def experts(call: ExpertsCall) -> torch.Tensor:
    """Rows by expert, two grouped products, one sum."""
    top_k, slots = call.ids_TK.shape[1], call.ids_TK.numel()
    block = deep_gemm.get_mk_alignment_for_contiguous_layout()
    slot_R, expert_B, _ = aligned_rows(call.ids_TK, block, call.spec.num_experts, keep_none=False)
    taken_R = slot_R < slots
    expert_R = expert_B.repeat_interleave(block).where(taken_R, -1).contiguous()
    slot_R = slot_R.long().where(taken_R, 0)
    rows_RH = call.x_TH[slot_R // top_k] * taken_R[:, None]
    w13_ENH, w2_EHI = call.weights.w13_EGIH.flatten(1, 2).contiguous(), call.weights.w2_EHI.contiguous()
    gate_up_RN = rows_RH.new_empty(len(slot_R), w13_ENH.shape[1])
    deep_gemm.m_grouped_bf16_gemm_nt_contiguous(rows_RH, w13_ENH, gate_up_RN, expert_R)
    gate_RI, up_RI = gate_up_RN.chunk(2, dim=-1)
    act_RI = silu(gate_RI) * up_RI
    down_RH = torch.empty_like(rows_RH)
    deep_gemm.m_grouped_bf16_gemm_nt_contiguous(act_RI, w2_EHI, down_RH, expert_R)
    slot_R, act_RI, down_RH = slot_R[taken_R], act_RI[taken_R], down_RH[taken_R]
    order_R = torch.argsort(slot_R)
    call.record(Stage.ACT, act_RI[order_R])
    call.record(Stage.DOWN, down_RH[order_R])
    weighted_RH = down_RH.float() * call.weights_TK.flatten()[slot_R, None]
    y_TH = torch.zeros(call.x_TH.shape, dtype=torch.float32, device=call.x_TH.device)
    return y_TH.index_add(0, slot_R // top_k, weighted_RH).to(call.x_TH.dtype)


LAYER = ExpertsLayer(
    Capabilities(
        name="deepgemm", version=version("deep_gemm"), devices=("cuda",), numerics={Dtype.BF16: _NUMERICS},
        stages=(Stage.IDS, Stage.WEIGHTS, Stage.ACT, Stage.DOWN, Stage.MERGED), scores=("softmax", "sigmoid"),
        features=(Feature.RESIDUAL,), max_tp=64, ranks=(Ranks.LOCAL, Ranks.NCCL), injected_routing=True,
        collectives_through_groups=True, hidden_multiple=64, intermediate_multiple=64),
    experts)
