"""OpenAI's triton_kernels on a GPU: `matmul_ogs`, with `swiglu_fn` fused where the layer is gpt-oss's (in vllm 0.33.0).

Written after its sources and never run: its kernels are specialised when they are compiled and cannot be interpreted.
The routing data are those of triton_kernels.torch; for a layer without swiglu the activation is torch's. It has no id
for "no expert".
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
    """Rows are stored in the model's dtype after bias and weight; where swiglu is fused, gate and up are not."""
    model = Format(dtype.value)
    stored = dict.fromkeys((Stage.GATE_UP, Stage.ACT, Stage.DOWN, Stage.MERGED, Stage.REDUCED), model)
    return Numerics(storage={Stage.LOGITS: Format.FP32, Stage.WEIGHTS: Format.FP32, **stored}, activation=model,
                    reduce=model, weight_at="down")


def experts(call: ExpertsCall) -> torch.Tensor:
    """Two grouped products; the second scatters and adds up by token."""
    library = _LIBRARY.matmul_ogs
    data, gather, scatter = routed(_LIBRARY.routing, call)
    w13_EHN, bias_EN, oai = interleaved(call)
    bias_EH = None if call.weights.w2_bias_EH is None else call.weights.w2_bias_EH.float()
    if oai:
        mlp = call.spec.experts
        specs = library.FnSpecs("swiglu", _LIBRARY.swiglu.swiglu_fn, ("alpha", "limit"))
        fused = library.FusedActivation(specs, (mlp.sigmoid_scale, mlp.limit), 2)
        act_RI = library.matmul_ogs(call.x_TH, w13_EHN, bias_EN, data, gather_indx=gather, fused_activation=fused)
    else:
        rows_RN = library.matmul_ogs(call.x_TH, w13_EHN, bias_EN, data, gather_indx=gather)
        act_RI = silu(rows_RN[:, ::2]) * rows_RN[:, 1::2]
    return library.matmul_ogs(act_RI, call.weights.w2_EHI.transpose(1, 2), bias_EH, data, scatter_indx=scatter,
                              gammas=data.gate_scal)


LAYER = ExpertsLayer(
    Capabilities(
        name="triton_kernels.matmul_ogs", version=version("vllm"), devices=("cuda",),
        numerics={dtype: _numerics(dtype) for dtype in (Dtype.FP16, Dtype.BF16)},
        stages=(Stage.IDS, Stage.WEIGHTS, Stage.MERGED), scores=("softmax", "sigmoid"),
        features=(Feature.RESIDUAL, Feature.LOGIT_BIAS, Feature.MLP_BIAS, Feature.LIMIT, Feature.SCALED_SWIGLU),
        max_tp=64, ranks=(Ranks.LOCAL, Ranks.NCCL), injected_routing=True, collectives_through_groups=True),
    experts)
