"""SGLang's experts in plain torch: `moe_forward_native` (seen: sglang 0.5.23).

Where there is a GPU its package is imported, else its file alone, with `forward_native` of its
srt/layers/activation.py. What it compiles by torch.compile runs eagerly, in fp32 and rounded once, as compiled code
does. Translated: gate and up interleaved where there is a limit. It has no id for "no expert".
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace

import torch

from moe_ref.adapters.experts_layer import ExpertsCall, ExpertsLayer
from moe_ref.adapters.sglang_files import native_moe
from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.errors import raise_faults
from moe_ref.contract.features import Feature
from moe_ref.contract.vocabulary import Dtype, Format, Ranks, Stage

_ON_GPU = torch.cuda.is_available()
_NATIVE = native_moe()


def _numerics(dtype: Dtype) -> Numerics:
    """Every result of torch is rounded to the model's dtype; weights multiply and slots are added in fp32."""
    model = Format(dtype.value)
    stored = dict.fromkeys((Stage.GATE_UP, Stage.ACT, Stage.DOWN, Stage.MERGED, Stage.REDUCED), model)
    return Numerics(storage={Stage.LOGITS: Format.FP32, Stage.WEIGHTS: Format.FP32, **stored}, activation=model,
                    reduce=model, weight_at="merge")


def experts(call: ExpertsCall) -> torch.Tensor:
    """moe_forward_native on a stand-in for its layer, which holds nothing but the parameters."""
    weights, mlp = call.weights, call.spec.experts
    clamped = mlp.limit is not None
    plain = (mlp.limit, mlp.sigmoid_scale, mlp.up_offset) == (None, 1.0, 0.0)
    offered = plain or (clamped and mlp.limit_at == "before" and mlp.up_offset == 1.0)
    raise_faults("sglang.torch", [] if offered else [
        f"limit={mlp.limit}, limit_at={mlp.limit_at}, sigmoid_scale={mlp.sigmoid_scale}, up_offset={mlp.up_offset}, "
        "but should be a limit before the activation with up_offset 1, or none of them"])

    def order(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.transpose(1, 2) if clamped else tensor).flatten(1, 2)

    layer = SimpleNamespace(num_experts=call.spec.num_experts, w13_weight=order(weights.w13_EGIH),
                            w2_weight=weights.w2_EHI, w2_weight_bias=weights.w2_bias_EH, w13_weight_bias=None)
    if weights.w13_bias_EGI is not None:
        layer.w13_weight_bias = order(weights.w13_bias_EGI)
    options = SimpleNamespace(apply_router_weight_on_input=False, activation=mlp.activation,
                              gemm1_alpha=mlp.sigmoid_scale if clamped else None, gemm1_clamp_limit=mlp.limit)
    with nullcontext() if _ON_GPU else torch.compiler.set_stance("force_eager"):
        return _NATIVE.moe_forward_native(layer, call.x_TH, (call.weights_TK, call.ids_TK, None), options)


def _rounded_once(function: Callable, rows: torch.Tensor, *numbers: float) -> torch.Tensor:
    return function(rows.float(), *numbers).to(rows.dtype)


if not _ON_GPU:
    _name = "swiglu_gpt_oss_sigmoid_alpha"
    vars(_NATIVE)[_name] = partial(_rounded_once, getattr(_NATIVE, _name))

LAYER = ExpertsLayer(
    Capabilities(
        name="sglang.torch", version=version("sglang"), numerics={dtype: _numerics(dtype) for dtype in Dtype},
        stages=(Stage.IDS, Stage.WEIGHTS, Stage.MERGED), activations=("silu", "gelu"), scores=("softmax", "sigmoid"),
        features=(Feature.RESIDUAL, Feature.LOGIT_BIAS, Feature.MLP_BIAS, Feature.LIMIT, Feature.SCALED_SWIGLU),
        max_tp=64, ranks=(Ranks.LOCAL, Ranks.GLOO), injected_routing=True, absent_ids=False,
        collectives_through_groups=True),
    experts)
