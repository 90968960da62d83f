"""vLLM's fused experts in Triton: `fused_experts_impl`, whole (seen: vllm 0.33.0).

Where there is a GPU it is called as it is. On a CPU its file is loaded alone and its kernel interpreted, with its
default tiles; in plain torch are, in the place of CUDA operators, the rows sorted by expert (moe_align_block_size), the
activation (`forward_native` of vLLM's layers/activation.py) and the sum over slots (moe_sum).

Translated: gate and up interleaved for swigluoai, which is clamped at 7 with alpha 1.702 and up + 1 and takes no other
numbers; ids that name no expert are -1, which moe_align_block_size ignores.
"""

from dataclasses import replace
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch

from moe_ref.adapters.experts_layer import ExpertsCall, ExpertsLayer
from moe_ref.adapters.vllm_files import activations, fused_moe
from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.errors import raise_faults
from moe_ref.contract.features import GPT_OSS_CLAMP, Feature
from moe_ref.contract.spec import MLP
from moe_ref.contract.vocabulary import Dtype, Format, Ranks, Stage

_ON_GPU = torch.cuda.is_available()
_OAI = MLP(bias=True, limit=7.0, sigmoid_scale=1.702, up_offset=1.0)
_seen: dict[Stage, torch.Tensor] = {}
"""Rows that the last call handed to what stands for operators here."""


def _activate(kind: Any, output: torch.Tensor, rows: torch.Tensor) -> None:
    assert _ACTIVATIONS is not None
    module, name = _ACTIVATIONS, kind.value
    if name == "silu":
        output.copy_(module.SiluAndMul.forward_native(rows))
    elif name == "swigluoai":
        options = SimpleNamespace(alpha=_OAI.sigmoid_scale, limit=_OAI.limit)
        output.copy_(module.SwigluOAIAndMul.forward_native(options, rows))
    else:
        options = SimpleNamespace(approximate={"gelu": "none", "gelu_tanh": "tanh"}[name])
        output.copy_(module.GeluAndMul.forward_native(options, rows))
    _seen[Stage.ACT] = output


def _add_up(rows_TKH: torch.Tensor, output_TH: torch.Tensor) -> None:
    _seen[Stage.DOWN] = rows_TKH.flatten(0, 1)
    torch.sum(rows_TKH, dim=1, out=output_TH)


_ACTIVATIONS = None if _ON_GPU else activations()
_FUSED_MOE = fused_moe(_activate, _add_up)


def _numerics(dtype: Dtype) -> Numerics:
    """As fused_moe_kernel and fused_experts_impl store.

    The kernel's fp32 sum takes bias and routing weight and is stored once in the dtype of the tokens; no tl.dot asks
    for a precision, so fp32 takes Triton's default, tf32. Between the two products every step of forward_native rounds
    (the CUDA operators round no more). torch.sum adds in fp32; moe_sum on a GPU adds up to four slots in the dtype of
    the tokens (csrc/moe/moe_align_sum_kernels.cu).
    """
    model = Format(dtype.value)
    stored = dict.fromkeys((Stage.GATE_UP, Stage.ACT, Stage.DOWN, Stage.MERGED, Stage.REDUCED), model)
    return Numerics(storage={Stage.LOGITS: Format.FP32, Stage.WEIGHTS: Format.FP32, **stored}, products="tf32",
                    activation=model, merge=model if _ON_GPU else None, reduce=model, weight_at="down")


def _activation(mlp: MLP) -> str:
    """The name that vLLM has for it; raises UsageValueError for numbers that its operators do not take."""
    if mlp.limit is None and mlp.sigmoid_scale == 1.0 and mlp.up_offset == 0.0:
        return mlp.activation
    shown = (mlp.limit, mlp.limit_at, mlp.sigmoid_scale, mlp.up_offset)
    wanted = (_OAI.limit, _OAI.limit_at, _OAI.sigmoid_scale, _OAI.up_offset)
    raise_faults("vllm.fused_moe", [f"limit, limit_at, sigmoid_scale, up_offset {shown}, but should be {wanted}"]
                 if shown != wanted else [])
    return "swigluoai"


def experts(call: ExpertsCall) -> torch.Tensor:
    """fused_experts_impl on the rank's experts."""
    weights, kind = call.weights, _activation(call.spec.experts)
    w13_EGIH, bias_EGI = weights.w13_EGIH, weights.w13_bias_EGI
    if kind == "swigluoai":
        w13_EGIH = w13_EGIH.transpose(1, 2)
        bias_EGI = None if bias_EGI is None else bias_EGI.transpose(1, 2)
    served_TK = (call.ids_TK >= 0) & (call.ids_TK < call.spec.num_experts)
    y_TH = _FUSED_MOE.fused_experts_impl(
        call.x_TH.contiguous(), w13_EGIH.flatten(1, 2), weights.w2_EHI, call.weights_TK.contiguous(),
        call.ids_TK.where(served_TK, -1).int(), activation=kind,
        apply_router_weight_on_input=call.spec.weight_on == "input",
        w1_bias=None if bias_EGI is None else bias_EGI.flatten(1, 2), w2_bias=weights.w2_bias_EH)
    for stage, rows in () if _ON_GPU else _seen.items():
        call.record(stage, rows[served_TK.flatten()])
    _seen.clear()
    return y_TH


_PLAIN = Capabilities(
    name="vllm.fused_moe", version=version("vllm"), numerics={dtype: _numerics(dtype) for dtype in Dtype},
    stages=(Stage.LOGITS, Stage.IDS, Stage.WEIGHTS, *(() if _ON_GPU else (Stage.ACT, Stage.DOWN)), Stage.MERGED),
    activations=("silu", "gelu", "gelu_tanh"), scores=("softmax", "sigmoid"),
    features=(Feature.RESIDUAL, Feature.LOGIT_BIAS, Feature.MLP_BIAS, Feature.WEIGHT_ON_INPUT),
    max_tp=64, ranks=(Ranks.LOCAL, Ranks.GLOO), injected_routing=True, collectives_through_groups=True)
_CLAMPED = replace(_PLAIN, features=(*_PLAIN.features, Feature.LIMIT, Feature.SCALED_SWIGLU), needs=(GPT_OSS_CLAMP,))

LAYER = ExpertsLayer(replace(_PLAIN, others=(_CLAMPED,)), experts)
