"""Scales of int4 groups in 16 bits."""

import torch

from moe_ref.contract.errors import UsageTypeError, UsageValueError


def half_scales(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp64 scales rounded to fp16 or bf16; 1 for 0, and the smallest number of the format for what would become 0.

    UsageTypeError for another dtype, UsageValueError for a scale beyond the format.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise UsageTypeError(f"scales: dtype {dtype}, but should be torch.float16 or torch.bfloat16")
    info = torch.finfo(dtype)
    rounded = scales.float().to(dtype)
    if bool(rounded.isinf().any()):
        raise UsageValueError(f"scales: {float(scales.max()):g}, but should be at most {info.max:g} of {dtype}")
    rounded = rounded.clamp(min=info.smallest_normal * info.eps)
    return rounded.where(scales > 0, 1.0)
