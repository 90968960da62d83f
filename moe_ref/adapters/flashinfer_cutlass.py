"""FlashInfer's `fused_moe.cutlass_fused_moe` without quantisation: GPU only.

Written after its documentation and never run. Translated: w13 holds up before gate there; ids are int32. It is handed
tokens and a routing, and has no id for "no expert".
"""

from importlib.metadata import version

import torch
from flashinfer.fused_moe import cutlass_fused_moe  # type: ignore[missing-import]

from moe_ref.adapters.experts_layer import ExpertsCall, ExpertsLayer
from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.features import Feature
from moe_ref.contract.vocabulary import Dtype, Format, Ranks, Stage


def _numerics(dtype: Dtype) -> Numerics:
    """Rows are stored between the two products and before the weighted sum, which is in fp32; not checked by a run."""
    model = Format(dtype.value)
    stored = dict.fromkeys((Stage.GATE_UP, Stage.ACT, Stage.DOWN, Stage.MERGED, Stage.REDUCED), model)
    return Numerics(storage={Stage.LOGITS: Format.FP32, Stage.WEIGHTS: Format.FP32, **stored}, reduce=model,
                    weight_at="merge")


def experts(call: ExpertsCall) -> torch.Tensor:
    """The whole of the experts is one call, into a tensor of its own."""
    y_TH = torch.empty_like(call.x_TH)
    cutlass_fused_moe(call.x_TH.contiguous(), call.ids_TK.int(), call.weights_TK.contiguous(),
                      call.weights.w13_EGIH.flip(1).flatten(1, 2), call.weights.w2_EHI.contiguous(), call.x_TH.dtype,
                      quant_scales=None, output=y_TH)
    return y_TH


LAYER = ExpertsLayer(
    Capabilities(
        name="flashinfer", version=version("flashinfer-python"), devices=("cuda",),
        numerics={dtype: _numerics(dtype) for dtype in (Dtype.FP16, Dtype.BF16)},
        stages=(Stage.IDS, Stage.WEIGHTS, Stage.MERGED), scores=("softmax", "sigmoid"), features=(Feature.RESIDUAL,),
        max_tp=64, ranks=(Ranks.LOCAL, Ranks.NCCL), injected_routing=True, collectives_through_groups=True,
        hidden_multiple=128, intermediate_multiple=128),
    experts)
