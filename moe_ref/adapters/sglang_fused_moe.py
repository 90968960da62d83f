"""SGLang's fused experts in Triton: `fused_experts_impl`, whole (seen: sglang 0.5.23).

Where there is a GPU it is called as it is. On a CPU its files are loaded alone, told that there is a GPU, and its
kernel is interpreted, with its default tiles; in plain torch are, in the place of CUDA operators, the rows sorted by
expert (moe_align_block_size), the activation and the sum over slots (moe_sum_reduce). What it compiles by torch.compile
runs eagerly, in fp32 and rounded once, as its compiled code does.

Translated: ids that name no expert are -1, SGLang's own word for them. Weights and biases keep gate and up one after
the other (gate_up_interleaved=False).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from moe_ref.adapters.experts_layer import EncodedCall, ExpertsCall, ExpertsLayer
from moe_ref.adapters.fused_moe_encoded import INT4, LEAST_GROUP, fused_moe_arguments, show_operands
from moe_ref.adapters.sglang_files import fused_moe
from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.errors import raise_faults
from moe_ref.contract.features import Feature
from moe_ref.contract.spec import MLP
from moe_ref.contract.vocabulary import Dtype, Format, Ranks, Scheme, Stage

_ON_GPU = torch.cuda.is_available()
_quantized: list[tuple[torch.Tensor, torch.Tensor]] = []
"""Codes and scales of the rows of both products of the last call."""
_FUSED_MOE = fused_moe(lambda codes, scales: _quantized.append((codes, scales)))
_COMPILED = ("swiglu_no_interleaved_with_alpha_and_limit", "_swiglu_silu_clamp_mul")
_products: list[tuple[torch.Tensor, torch.Tensor]] = []
"""Rows taken and rows stored, of the products of the last call."""


def _watched(launch: Callable, A: torch.Tensor, B: torch.Tensor, bias: torch.Tensor | None, C: torch.Tensor,
             *others: object, **named: object) -> None:
    launch(A, B, bias, C, *others, **named)
    _products.append((A, C))


def _rounded_once(function: Callable, rows: torch.Tensor, *numbers: float) -> torch.Tensor:
    return function(rows.float(), *numbers).to(rows.dtype)


if not _ON_GPU:
    _names = vars(_FUSED_MOE)
    _names["invoke_fused_moe_kernel"] = partial(_watched, _names["invoke_fused_moe_kernel"])
    _names.update({name: partial(_rounded_once, _names[name]) for name in _COMPILED})


def _numerics(dtype: Dtype) -> Numerics:
    """As fused_moe_kernel and _fused_moe_kernel_sequence store.

    The kernel's fp32 sum takes bias and routing weight and is stored once. Activation and sum over slots are in fp32,
    rounded to the dtype of the tokens. fp32 is left out: it is let in, and its rows are rounded to fp16 (compute_type
    in _fused_moe_kernel_sequence is bf16 or fp16), so that nothing of it could be told.
    """
    model = Format(dtype.value)
    stored = dict.fromkeys((Stage.GATE_UP, Stage.ACT, Stage.DOWN, Stage.MERGED, Stage.REDUCED), model)
    return Numerics(storage={Stage.LOGITS: Format.FP32, Stage.WEIGHTS: Format.FP32, **stored}, reduce=model,
                    weight_at="down")


def _options(mlp: MLP) -> dict[str, object]:
    """The arguments that say which activation; raises UsageValueError for what none of them says."""
    shown = (mlp.limit, mlp.limit_at, mlp.sigmoid_scale, mlp.up_offset)
    if shown == (None, "before", 1.0, 0.0):
        return {"activation": mlp.activation}
    if shown == (mlp.limit, "after", 1.0, 0.0):
        return {"gemm1_limit": mlp.limit}
    offered = mlp.limit is not None and mlp.limit_at == "before" and mlp.up_offset == 1.0
    raise_faults("sglang.fused_moe", [] if offered else [
        f"limit, limit_at, sigmoid_scale, up_offset {shown}, but should be a limit before the activation, any scale, "
        "1.0, or a limit after it, 1.0 and 0.0"])
    return {"gemm1_alpha": mlp.sigmoid_scale, "gemm1_limit": mlp.limit, "gate_up_interleaved": False}


def experts(call: ExpertsCall) -> torch.Tensor:
    """fused_experts_impl on the rank's experts."""
    weights = call.weights
    return _called(call, w1=weights.w13_EGIH.flatten(1, 2).contiguous(), w2=weights.w2_EHI.contiguous())


def encoded_experts(int8_rows: bool) -> Callable[[EncodedCall], torch.Tensor]:
    """fused_experts_impl on the rank's encoded experts; int8_rows: of int8, whether rows are rounded too."""
    def encoded(call: EncodedCall) -> torch.Tensor:
        return _called(call, **fused_moe_arguments(call.weights, int8_rows))

    return encoded


def _called(call: ExpertsCall | EncodedCall, **arguments: object) -> torch.Tensor:
    served_TK, bias_EGI = call.served_TK, call.weights.w13_bias_EGI
    _products.clear()
    _quantized.clear()
    with torch.compiler.set_stance("default" if _ON_GPU else "force_eager"):
        y_TH = _FUSED_MOE.fused_experts_impl(
            call.x_TH.contiguous(), topk_weights=call.weights_TK.contiguous(),
            topk_ids=call.ids_TK.where(served_TK, -1).int(),
            b1=None if bias_EGI is None else bias_EGI.flatten(1, 2), b2=call.weights.w2_bias_EH,
            apply_router_weight_on_input=call.spec.weight_on == "input", **_options(call.spec.experts), **arguments)
    if not _ON_GPU:
        (_, _), (act_RI, down) = _products
        call.record(Stage.ACT, act_RI[served_TK.flatten()])
        call.record(Stage.DOWN, down.flatten(0, 1)[served_TK.flatten()])
    if isinstance(call, EncodedCall) and _quantized:
        show_operands(call, _quantized)
    return y_TH


def _schemes(*schemes: Scheme, **rounds: Any) -> dict[Scheme, dict[Dtype, Numerics]]:
    return {scheme: {dtype: replace(_numerics(dtype), **rounds) for dtype in _DTYPES} for scheme in schemes}


_DTYPES = (Dtype.FP16, Dtype.BF16)
_SHOWN = (Stage.PERMUTE_SCALES, Stage.PERMUTE_CODES, Stage.ACT, Stage.ACT_SCALES, Stage.ACT_CODES, Stage.DOWN)
_ROWS = Capabilities(
    name="sglang.fused_moe", version=version("sglang"), numerics={dtype: _numerics(dtype) for dtype in _DTYPES},
    schemes=_schemes(Scheme.FP8_ROW, products="fp8_row") | _schemes(Scheme.INT8),
    stages=(Stage.LOGITS, Stage.IDS, Stage.WEIGHTS, *(() if _ON_GPU else _SHOWN), Stage.MERGED),
    activations=("silu", "gelu", "gelu_tanh"), scores=("softmax", "sigmoid"),
    features=(Feature.RESIDUAL, Feature.LOGIT_BIAS, Feature.MLP_BIAS, Feature.LIMIT, Feature.SCALED_SWIGLU,
              Feature.WEIGHT_ON_INPUT),
    max_tp=64, ranks=(Ranks.LOCAL, Ranks.GLOO), injected_routing=True, collectives_through_groups=True)
# The sum of a block is one tl.dot, scaled and added in fp32; of rows tl.dot adds to the accumulator that it is handed.
_BLOCKS = replace(_ROWS, numerics={},
                  schemes=_schemes(Scheme.FP8_BLOCK, products="fp8_block", promoted_after=128),
                  hidden_multiple=128, intermediate_multiple=128, whole_blocks=True)
_GROUPS = replace(
    _ROWS, numerics={}, hidden_multiple=LEAST_GROUP, intermediate_multiple=LEAST_GROUP,
    schemes={scheme: {dtype: replace(_numerics(dtype), decoded=Format(dtype.value)) for dtype in _DTYPES}
             for scheme in INT4},
    features=tuple(feature for feature in _ROWS.features if feature is not Feature.MLP_BIAS))

LAYER = ExpertsLayer(replace(_ROWS, others=(_BLOCKS, _GROUPS)), experts, encoded_experts(int8_rows=False))
INT8_ROWS = ExpertsLayer(
    replace(_ROWS, name="sglang.fused_moe.int8_w8a8", numerics={}, schemes=_schemes(Scheme.INT8, products="int8_row")),
    experts, encoded_experts(int8_rows=True))
