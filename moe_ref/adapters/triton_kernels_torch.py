"""OpenAI's triton_kernels, its references in torch: routing_torch, matmul_ogs_torch, swiglu_torch (seen: in vllm
0.33.0).

Routing data are made from the given ids. swiglu is gpt-oss's, interleaved, clamped, with up + 1; for a layer without
those the activation between the two products is torch's, since the library has no other. It has no id for "no expert".
"""

from importlib.metadata import version

import torch
from torch.nn.functional import silu

from moe_ref.adapters.experts_layer import ExpertsCall, ExpertsLayer
from moe_ref.adapters.triton_kernels_package import interleaved, package, routed
from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.features import Feature
from moe_ref.contract.vocabulary import Dtype, Format, Ranks, Stage

_LIBRARY = package()


def _numerics(dtype: Dtype) -> Numerics:
    """matmul_ogs_torch multiplies in fp32, adds the bias, weights, and rounds rows once; the sum over slots is in fp32.

    swiglu_torch computes in the dtype of its rows, so that every step rounds.
    """
    model = Format(dtype.value)
    stored = dict.fromkeys((Stage.GATE_UP, Stage.ACT, Stage.DOWN, Stage.MERGED, Stage.REDUCED), model)
    return Numerics(storage={Stage.LOGITS: Format.FP32, Stage.WEIGHTS: Format.FP32, **stored}, activation=model,
                    reduce=model, weight_at="down")


def experts(call: ExpertsCall) -> torch.Tensor:
    """Two grouped products, the second weighted and added up by token; the fp32 sum is rounded here."""
    matmul = _LIBRARY.matmul_ogs.matmul_ogs_torch
    data, gather, scatter = routed(_LIBRARY.routing, call)
    w13_EHN, bias_EN, oai = interleaved(call)
    rows_RN = matmul(call.x_TH, w13_EHN, bias_EN, data, gather_indx=gather)
    if oai:
        mlp = call.spec.experts
        act_RI = _LIBRARY.swiglu.swiglu_torch(rows_RN, mlp.sigmoid_scale,
                                              _LIBRARY.swiglu.PrecisionConfig(limit=mlp.limit))
    else:
        act_RI = silu(rows_RN[:, ::2]) * rows_RN[:, 1::2]
    bias_EH = None if call.weights.w2_bias_EH is None else call.weights.w2_bias_EH.float()
    y_TH = matmul(act_RI, call.weights.w2_EHI.transpose(1, 2), bias_EH, data, scatter_indx=scatter,
                  gammas=data.gate_scal)
    served_S = ((call.ids_TK >= 0) & (call.ids_TK < call.spec.num_experts)).flatten()
    call.record(Stage.ACT, act_RI.detach()[gather.dst_indx.long()][served_S])
    return y_TH.to(call.x_TH.dtype)


LAYER = ExpertsLayer(
    Capabilities(
        name="triton_kernels.torch", version=version("vllm"), numerics={dtype: _numerics(dtype) for dtype in Dtype},
        stages=(Stage.IDS, Stage.WEIGHTS, Stage.ACT, Stage.MERGED), scores=("softmax", "sigmoid"),
        features=(Feature.RESIDUAL, Feature.LOGIT_BIAS, Feature.MLP_BIAS, Feature.LIMIT, Feature.SCALED_SWIGLU),
        max_tp=64, ranks=(Ranks.LOCAL, Ranks.GLOO), injected_routing=True, absent_ids=False,
        collectives_through_groups=True),
    experts)
