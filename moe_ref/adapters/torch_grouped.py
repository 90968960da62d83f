"""torch.nn.functional.grouped_mm as a building block: rows sorted by expert, two grouped products, one sum."""

import torch
from torch.nn.functional import grouped_mm

from moe_ref.adapters.experts_layer import ExpertsCall, ExpertsLayer
from moe_ref.adapters.grouped_rows import DECLARED, FORKED, grouped_experts, rounded
from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.features import Feature
from moe_ref.contract.vocabulary import Direction, Dtype


def _product(rows_RK: torch.Tensor, w_EKN: torch.Tensor, rows_E: torch.Tensor) -> torch.Tensor:
    return grouped_mm(rows_RK, w_EKN, offs=rows_E.cumsum(0).to(torch.int32))


def experts(call: ExpertsCall) -> torch.Tensor:
    """Two grouped products with torch's silu between."""
    return grouped_experts(call, _product)


GROUPED_MM = ExpertsLayer(
    Capabilities(name="torch.grouped_mm", version=str(torch.__version__),
                 numerics={dtype: rounded(dtype) for dtype in Dtype}, features=(Feature.RESIDUAL,),
                 directions=tuple(Direction), hidden_multiple=16, intermediate_multiple=16, ranks=FORKED, **DECLARED),
    experts)
