"""torchao's grouped product of MXFP8 training as a building block (0.18.0): forward, emulated kernels, bf16.

`_to_mxfp8_then_scaled_grouped_mm` with KernelPreference.EMULATED rounds tokens and weights to e4m3 in blocks of 32
along the sum under power-of-two scales (ScaleCalculationMode.RCEIL, its default; to_mx of mx_formats/mx_tensor.py),
takes the scales back, which is exact in bf16, and calls torch._grouped_mm, so that promoted_after is 1. Groups of rows
are padded to 32 by its own functions. Its CUDA kernels ask for sm_100.
"""

from dataclasses import replace

import torch
import torchao  # type: ignore[missing-import]
from torchao.prototype.moe_training.mxfp8_grouped_mm import _to_mxfp8_then_scaled_grouped_mm  # type: ignore[missing-import]
from torchao.quantization.quantize_.common import KernelPreference  # type: ignore[missing-import]

from moe_ref.adapters.experts_layer import ExpertsCall, ExpertsLayer
from moe_ref.adapters.grouped_rows import DECLARED, FORKED, grouped_experts, rounded
from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.features import Feature
from moe_ref.contract.vocabulary import Dtype


def _product(rows_RK: torch.Tensor, w_EKN: torch.Tensor, rows_E: torch.Tensor) -> torch.Tensor:
    return _to_mxfp8_then_scaled_grouped_mm(
        rows_RK, w_EKN, rows_E.cumsum(0).to(torch.int32), kernel_preference=KernelPreference.EMULATED,
        pad_token_groups_for_grouped_mm=True)


def experts(call: ExpertsCall) -> torch.Tensor:
    """Two products of rounded operands with torch's silu between."""
    return grouped_experts(call, _product)


MXFP8 = ExpertsLayer(
    Capabilities(name="torchao.mxfp8", version=torchao.__version__,
                 numerics={Dtype.BF16: replace(rounded(Dtype.BF16), products="mxfp8", promoted_after=1)},
                 features=(Feature.RESIDUAL,),
                 hidden_multiple=32, intermediate_multiple=32, ranks=FORKED, **DECLARED),
    experts)
