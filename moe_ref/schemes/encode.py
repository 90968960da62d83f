"""The encoder of every scheme."""

from collections.abc import Callable

import torch

from moe_ref.contract.encoded import Encoded
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Scheme
from moe_ref.schemes import awq, fp8, gptq, int8, mx, nvfp4

ENCODERS: dict[Scheme, Callable[[Scheme, torch.Tensor], Encoded]] = {
    Scheme.FP8_TENSOR: fp8.encode, Scheme.FP8_ROW: fp8.encode, Scheme.FP8_BLOCK: fp8.encode, Scheme.INT8: int8.encode,
    Scheme.GPTQ: gptq.encode, Scheme.GPTQ_32: gptq.encode, Scheme.GPTQ_ORDER: gptq.encode,
    Scheme.GPTQ_ORDER_32: gptq.encode, Scheme.AWQ: awq.encode, Scheme.AWQ_32: awq.encode, Scheme.MXFP4: mx.encode,
    Scheme.MXFP8: mx.encode, Scheme.NVFP4: nvfp4.encode}
"""What a family may choose, such as an order of columns, is an argument of its own encoder."""


def encode(scheme: Scheme, w_NK: torch.Tensor) -> Encoded:
    """Matrices (L, N, K) in fp64, fp32, fp16 or bf16, any leading axes, as codes with scales, rounded to nearest.

    UsageValueError for a scheme that encodes nothing; else raises as the scheme's encoder does.
    """
    if scheme not in ENCODERS:
        raise UsageValueError(f"scheme={scheme!r}, but should be one of {', '.join(ENCODERS)}")
    return ENCODERS[scheme](Scheme(scheme), w_NK)
