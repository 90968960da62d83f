"""Liger-Kernel's grouped experts: `LigerFusedMoEFunction`, forward and backward (seen: liger-kernel 0.8.5).

Nothing is translated but ids, which its kernels take as int32. It takes no biases, no clamp and no other activation
than silu, and has no id for "no expert".
"""

import os
from importlib.metadata import version

import torch

if not torch.cuda.is_available():
    # Its switch for one configuration without a measurement, read at the import: the tiles are larger than the first of
    # all, and a quarter of the programs is to be interpreted.
    os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")

from liger_kernel.ops import LigerFusedMoEFunction, fused_moe_kernels  # type: ignore[missing-import]

from moe_ref.adapters.experts_layer import ExpertsCall, ExpertsLayer
from moe_ref.adapters.interpreted import interpret_on_cpu
from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.features import Feature
from moe_ref.contract.vocabulary import Direction, Dtype, Format, Ranks, Stage

interpret_on_cpu(fused_moe_kernels)


def _numerics(dtype: Dtype) -> Numerics:
    """As ops/fused_moe_kernels.py stores.

    _fused_up_proj_swiglu_kernel computes the activation from its fp32 sums and stores that alone for the forward pass;
    _fused_down_proj_kernel stores rows without the routing weight; _token_gather_weighted_sum_kernel weights and adds
    them in fp32. No tl.dot asks for a precision, so those of fp32 take Triton's default, tf32.
    """
    model = Format(dtype.value)
    stored = dict.fromkeys((Stage.ACT, Stage.DOWN, Stage.MERGED, Stage.REDUCED), model)
    return Numerics(storage={Stage.LOGITS: Format.FP32, Stage.WEIGHTS: Format.FP32, **stored}, products="tf32",
                    reduce=model, weight_at="merge")


def experts(call: ExpertsCall) -> torch.Tensor:
    """The whole of the experts is one call; its intermediate rows stay inside."""
    return LigerFusedMoEFunction.apply(call.x_TH, call.weights.w13_EGIH.flatten(1, 2), call.weights.w2_EHI,
                                       call.ids_TK.int(), call.weights_TK)


LAYER = ExpertsLayer(
    Capabilities(
        name="liger", version=version("liger-kernel"), numerics={dtype: _numerics(dtype) for dtype in Dtype},
        stages=(Stage.LOGITS, Stage.IDS, Stage.WEIGHTS, Stage.MERGED), scores=("softmax", "sigmoid"),
        features=(Feature.RESIDUAL,), directions=tuple(Direction), max_tp=64, ranks=(Ranks.LOCAL, Ranks.GLOO),
        injected_routing=True, absent_ids=False, collectives_through_groups=True),
    experts)
