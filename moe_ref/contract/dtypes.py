"""Names of formats and the torch dtypes they are."""

import torch

from moe_ref.contract.vocabulary import Dtype, Format

TORCH_DTYPES: dict[str, torch.dtype] = {
    Dtype.FP32: torch.float32, Dtype.FP16: torch.float16, Dtype.BF16: torch.bfloat16, Format.FP64: torch.float64,
}
"""Dtype and Format names to torch dtypes."""

PLAIN_DTYPES = tuple(TORCH_DTYPES.values())
"""Dtypes whose values are the numbers themselves; those of a quantised weight mean something only with its scales."""
