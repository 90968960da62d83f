"""torchao's grouped product of fp8 rowwise training as a building block (0.18.0), forward and backward, bf16: DECLARED,
NEVER RUN on a GPU.

`_to_fp8_rowwise_then_scaled_grouped_mm` rounds both operands of every product to e4m3 along its sum, under scales that
are rounded to powers of two (fp8_grouped_mm.py: round_scales_to_power_of_2=True in all of its calls), the weight anew
for the gradient of the rows, and both operands of a weight's gradient over the rows of each expert. Its kernels are
Triton's and torch._scaled_grouped_mm, which a CPU does not have; the test runs its autograd function with stand-ins of
both. It asks for groups of a multiple of 16 rows and does not pad them itself: here they are filled with zeros, which
no scale sees. use_fast_accum=True: the whole sum is in the matrix unit, of which sm_90 keeps 14 bits, so that
promoted_after is None.
"""

from dataclasses import replace

import torch
import torchao  # type: ignore[missing-import]
from torchao.prototype.moe_training import _to_fp8_rowwise_then_scaled_grouped_mm  # type: ignore[missing-import]

from moe_ref.adapters.experts_layer import ExpertsCall, ExpertsLayer
from moe_ref.adapters.grouped_rows import DECLARED, FORKED, grouped_experts, rounded
from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.features import Feature
from moe_ref.contract.vocabulary import Direction, Dtype

GROUP_ROWS = 16


def product(rows_RK: torch.Tensor, w_EKN: torch.Tensor, rows_E: torch.Tensor) -> torch.Tensor:
    """Rows by the matrices of their groups, which are sorted, (R, N); differentiable."""
    padded_E = (rows_E + GROUP_ROWS - 1) // GROUP_ROWS * GROUP_ROWS
    shift_E = (padded_E - rows_E).cumsum(0) - (padded_E - rows_E)
    place_R = torch.arange(len(rows_RK), device=rows_RK.device) + shift_E.repeat_interleave(rows_E)
    padded = rows_RK.new_zeros(int(padded_E.sum()), rows_RK.shape[1]).index_copy(0, place_R, rows_RK)
    return _to_fp8_rowwise_then_scaled_grouped_mm(
        padded, w_EKN, padded_E.cumsum(0).to(torch.int32), pad_token_groups_for_grouped_mm=False)[place_R]


def experts(call: ExpertsCall) -> torch.Tensor:
    """Two products of rounded operands with torch's silu between."""
    return grouped_experts(call, product)


FP8_ROWWISE = ExpertsLayer(
    Capabilities(name="torchao.fp8_rowwise", version=torchao.__version__,
                 numerics={Dtype.BF16: replace(rounded(Dtype.BF16), products="fp8_row_e8m0")},
                 features=(Feature.RESIDUAL,), directions=tuple(Direction), devices=("cuda",),
                 hidden_multiple=16, intermediate_multiple=16, ranks=FORKED, **DECLARED),
    experts)
