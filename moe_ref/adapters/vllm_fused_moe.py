"""vLLM's fused experts in Triton: `fused_experts_impl`, whole (seen: vllm 0.33.0).

Where there is a GPU it is called as it is. On a CPU its file is loaded alone and its kernel interpreted, with its
default tiles; in plain torch are, in the place of CUDA operators, the rows sorted by expert (moe_align_block_size), the
activation (`forward_native` of vLLM's layers/activation.py) and the sum over slots (moe_sum).

Translated: gate and up interleaved for swigluoai, which is clamped at 7 with alpha 1.702 and up + 1 and takes no other
numbers; ids that name no expert are -1, which moe_align_block_size ignores.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch

from moe_ref.adapters.experts_layer import EncodedCall, ExpertsCall, ExpertsLayer
from moe_ref.adapters.fused_moe_encoded import INT4, LEAST_GROUP, fused_moe_arguments, show_operands
from moe_ref.adapters.vllm_files import activations, fused_moe
from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.errors import raise_faults
from moe_ref.contract.features import GPT_OSS_CLAMP, Feature
from moe_ref.contract.spec import MLP
from moe_ref.contract.vocabulary import Dtype, Format, Ranks, Scheme, Stage

_ON_GPU = torch.cuda.is_available()
_OAI = MLP(bias=True, limit=7.0, sigmoid_scale=1.702, up_offset=1.0)
_seen: dict[Stage, torch.Tensor] = {}
"""Rows that the last call handed to what stands for operators here."""
_quantized: list[tuple[torch.Tensor, torch.Tensor]] = []
"""Codes and scales of the rows of both products of the last call."""


def _activate(kind: Any, output: torch.Tensor, rows: torch.Tensor) -> None:
    assert _ACTIVATIONS is not None
    module, name, rows = _ACTIVATIONS, kind.value, rows.float()    # rounded once, by copy_
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
_FUSED_MOE = fused_moe(_activate, _add_up, lambda codes, scales: _quantized.append((codes, scales)))


def _numerics(dtype: Dtype) -> Numerics:
    """As fused_moe_kernel and fused_experts_impl store.

    The kernel's fp32 sum takes bias and routing weight and is stored once in the dtype of the tokens; no tl.dot asks
    for a precision, so fp32 takes Triton's default, tf32. The CUDA operators between the products round each of their
    steps, forward_native on a CPU once. torch.sum adds in fp32; moe_sum on a GPU adds up to four slots in the dtype of
    the tokens (csrc/moe/moe_align_sum_kernels.cu).
    """
    model = Format(dtype.value)
    stepwise = model if _ON_GPU else None
    stored = dict.fromkeys((Stage.GATE_UP, Stage.ACT, Stage.DOWN, Stage.MERGED, Stage.REDUCED), model)
    return Numerics(storage={Stage.LOGITS: Format.FP32, Stage.WEIGHTS: Format.FP32, **stored}, products="tf32",
                    activation=stepwise, merge=stepwise, reduce=model, weight_at="down")


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
    return _called(call, bias_EGI, w1=w13_EGIH.flatten(1, 2), w2=weights.w2_EHI, activation=kind)


def encoded_experts(int8_rows: bool) -> Callable[[EncodedCall], torch.Tensor]:
    """fused_experts_impl on the rank's encoded experts; int8_rows: of int8, whether rows are rounded too."""
    def encoded(call: EncodedCall) -> torch.Tensor:
        return _called(call, call.weights.w13_bias_EGI, activation=_activation(call.spec.experts),
                       **fused_moe_arguments(call.weights, int8_rows))

    return encoded


def _called(call: ExpertsCall | EncodedCall, bias_EGI: torch.Tensor | None, **arguments: object) -> torch.Tensor:
    served_TK = call.served_TK
    y_TH = _FUSED_MOE.fused_experts_impl(
        call.x_TH.contiguous(), topk_weights=call.weights_TK.contiguous(),
        topk_ids=call.ids_TK.where(served_TK, -1).int(), apply_router_weight_on_input=call.spec.weight_on == "input",
        w1_bias=None if bias_EGI is None else bias_EGI.flatten(1, 2), w2_bias=call.weights.w2_bias_EH, **arguments)
    for stage, rows in () if _ON_GPU else _seen.items():
        call.record(stage, rows[served_TK.flatten()])
    if isinstance(call, EncodedCall) and _quantized:
        show_operands(call, _quantized)
    _seen.clear()
    _quantized.clear()
    return y_TH


def _schemes(*schemes: Scheme, **rounds: Any) -> dict[Scheme, dict[Dtype, Numerics]]:
    return {scheme: {dtype: replace(_numerics(dtype), **rounds) for dtype in Dtype} for scheme in schemes}


def _decoded() -> dict[Scheme, dict[Dtype, Numerics]]:
    """fused_moe_kernel_gptq_awq: (code - zero point) * scale in fp32, exactly, then rounded to the dtype of the tokens.
    """
    return {scheme: {dtype: replace(_numerics(dtype), decoded=Format(dtype.value)) for dtype in Dtype}
            for scheme in INT4}


_SHOWN = (Stage.PERMUTE_SCALES, Stage.PERMUTE_CODES, Stage.ACT, Stage.ACT_SCALES, Stage.ACT_CODES, Stage.DOWN)
_PLAIN = Capabilities(
    name="vllm.fused_moe", version=version("vllm"), numerics={dtype: _numerics(dtype) for dtype in Dtype},
    schemes=_schemes(Scheme.FP8_ROW, products="fp8_row") | _schemes(Scheme.INT8),
    stages=(Stage.LOGITS, Stage.IDS, Stage.WEIGHTS, *(() if _ON_GPU else _SHOWN), Stage.MERGED),
    activations=("silu", "gelu", "gelu_tanh"), scores=("softmax", "sigmoid"),
    features=(Feature.RESIDUAL, Feature.LOGIT_BIAS, Feature.MLP_BIAS, Feature.WEIGHT_ON_INPUT),
    max_tp=64, ranks=(Ranks.LOCAL, Ranks.GLOO), injected_routing=True, collectives_through_groups=True)
_CLAMPED = replace(_PLAIN, schemes={}, features=(*_PLAIN.features, Feature.LIMIT, Feature.SCALED_SWIGLU),
                   needs=(GPT_OSS_CLAMP,))
# The sum of a block is one tl.dot, scaled and added in fp32; of rows tl.dot adds to the accumulator that it is handed.
_BLOCKS = replace(_PLAIN, numerics={},
                  schemes=_schemes(Scheme.FP8_BLOCK, products="fp8_block", promoted_after=128),
                  hidden_multiple=128, intermediate_multiple=128, whole_blocks=True)
_GROUPS = replace(_PLAIN, numerics={}, schemes=_decoded(), hidden_multiple=LEAST_GROUP,
                  intermediate_multiple=LEAST_GROUP,
                  features=tuple(feature for feature in _PLAIN.features if feature is not Feature.MLP_BIAS))

LAYER = ExpertsLayer(replace(_PLAIN, others=(_CLAMPED, _BLOCKS, _GROUPS)), experts, encoded_experts(int8_rows=False))
INT8_ROWS = ExpertsLayer(
    replace(_PLAIN, name="vllm.fused_moe.int8_w8a8", numerics={}, schemes=_schemes(Scheme.INT8, products="int8_row")),
    experts, encoded_experts(int8_rows=True))
