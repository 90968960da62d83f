"""torch.nn.functional.scaled_grouped_mm as a building block: DECLARED, NEVER RUN. Written from its documentation.

Rows of tokens and of weights are rounded to e4m3 here, each under its largest magnitude over 448 in fp32
(ScalingType.RowWise: one scale per row of mat_a, one per expert and column of mat_b, both to decode with); torch
multiplies them on a GPU, and has no kernel for a CPU (aten::_scaled_grouped_mm_v2). The contract is that of the rounded
operands, products="fp8_row"; use_fast_accum is False by default, which CUTLASS's kernels take as promoted_after=128:
four instructions of 32 products (mma_promotion_interval). Forward, in bf16.
"""

from dataclasses import replace

import torch
from torch.nn.functional import ScalingType, scaled_grouped_mm  # type: ignore[missing-module-attribute]

from moe_ref.adapters.experts_layer import ExpertsCall, ExpertsLayer
from moe_ref.adapters.grouped_rows import DECLARED, FORKED, grouped_experts, rounded
from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.vocabulary import Dtype


def _rowwise(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes in e4m3 and the scales of the last axis."""
    limit = torch.finfo(torch.float8_e4m3fn).max
    scales = (values.abs().amax(-1).float() / limit).clamp(min=torch.finfo(torch.float32).tiny)
    codes = (values.float() / scales[..., None]).clamp(-limit, limit).to(torch.float8_e4m3fn)
    return codes, scales


def _product(rows_RK: torch.Tensor, w_EKN: torch.Tensor, rows_E: torch.Tensor) -> torch.Tensor:
    codes_RK, scales_R = _rowwise(rows_RK)
    codes_ENK, scales_EN = _rowwise(w_EKN.transpose(1, 2).contiguous())
    return scaled_grouped_mm(codes_RK, codes_ENK.transpose(1, 2), scales_R, ScalingType.RowWise, scales_EN,
                             ScalingType.RowWise, offs=rows_E.cumsum(0).to(torch.int32), output_dtype=rows_RK.dtype)


def experts(call: ExpertsCall) -> torch.Tensor:
    """Two scaled products with torch's silu between."""
    return grouped_experts(call, _product)


SCALED_GROUPED_MM = ExpertsLayer(
    Capabilities(name="torch.scaled_grouped_mm", version=str(torch.__version__),
                 numerics={Dtype.BF16: replace(rounded(Dtype.BF16), products="fp8_row", promoted_after=128)},
                 devices=("cuda",), hidden_multiple=16, intermediate_multiple=16, ranks=FORKED, **DECLARED),
    experts)
