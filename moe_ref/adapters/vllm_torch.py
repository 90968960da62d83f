"""vLLM's reference experts in plain torch: `BatchedPrepareAndFinalize`, `NaiveBatchedExperts` (seen: vllm 0.33.0).

Tokens go into one batch per expert, two products and the activation are computed expert by expert, and
`TopKWeightAndReduceNaiveBatched` weights and adds up. The classes are theirs, made without their base class; on a CPU
the activation is `SiluAndMul.forward_native` and the like in the place of the CUDA operators. Ids that name no expert
meet none.
"""

from importlib.metadata import version
from types import SimpleNamespace

import torch

from moe_ref.adapters.experts_layer import ExpertsCall, ExpertsLayer
from moe_ref.adapters.vllm_files import activations, naive
from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.features import Feature
from moe_ref.contract.vocabulary import Dtype, Format, Ranks, Stage

_ACTIVATIONS, _NAIVE = activations(), naive()
_PLAIN = SimpleNamespace(quant_dtype=None, is_quantized=False, a1_scale=None)


def _numerics(dtype: Dtype) -> Numerics:
    """Every result of torch is rounded to the model's dtype.

    The routing weight too, before it multiplies, and the sum over slots, by index_add_, after every slot
    (TopKWeightAndReduceNaiveBatched.apply).
    """
    model = Format(dtype.value)
    stored = dict.fromkeys((Stage.WEIGHTS, Stage.GATE_UP, Stage.ACT, Stage.DOWN, Stage.MERGED, Stage.REDUCED), model)
    return Numerics(storage={Stage.LOGITS: Format.FP32, **stored}, activation=model, merge=model, reduce=model,
                    weight_at="merge")


def _activate(kind: str, output: torch.Tensor, rows: torch.Tensor) -> None:
    if kind == "silu":
        output.copy_(_ACTIVATIONS.SiluAndMul.forward_native(rows))
    else:
        options = SimpleNamespace(approximate={"gelu": "none", "gelu_tanh": "tanh"}[kind])
        output.copy_(_ACTIVATIONS.GeluAndMul.forward_native(options, rows))


def experts(call: ExpertsCall) -> torch.Tensor:
    """Dispatch, experts, weights and sum, as FusedMoEKernel calls them."""
    num_tokens, hidden = call.x_TH.shape
    num_experts, w13_ENH = call.spec.num_experts, call.weights.w13_EGIH.flatten(1, 2)
    move = SimpleNamespace(max_num_tokens=num_tokens, num_local_experts=num_experts, rank=0)
    arguments = (call.weights_TK, call.ids_TK)
    batch_ECH, _, sizes, _, _ = _NAIVE.prepare(move, call.x_TH, *arguments, num_experts, None, False, _PLAIN)
    rows_ECH, scratch = torch.empty_like(batch_ECH), call.x_TH.new_empty(max(num_tokens, 1), w13_ENH.shape[1])
    compute = SimpleNamespace(quant_config=_PLAIN, activation=_activate)
    _NAIVE.experts(compute, rows_ECH, batch_ECH, w13_ENH, call.weights.w2_EHI, *arguments, call.spec.experts.activation,
                   num_experts, None, None, None, None, scratch, sizes, False)
    return _NAIVE.reduce(move, call.x_TH.new_empty(num_tokens, hidden), rows_ECH, *arguments, False)


LAYER = ExpertsLayer(
    Capabilities(
        name="vllm.torch", version=version("vllm"), numerics={dtype: _numerics(dtype) for dtype in Dtype},
        stages=(Stage.IDS, Stage.WEIGHTS, Stage.MERGED), activations=("silu", "gelu", "gelu_tanh"),
        scores=("softmax", "sigmoid"), features=(Feature.RESIDUAL,), max_tp=64, ranks=(Ranks.LOCAL, Ranks.GLOO),
        injected_routing=True, collectives_through_groups=True),
    experts)
