"""Symmetric int4 codes with bias 8 and a 16-bit scale of every group of columns, as GPTQ checkpoints hold them.

scale = 2 max |w| / 15, so that the largest values are half a step beyond the last codes, -8 and 7. The codes are those
of plain rounding to nearest: GPTQ's own (arXiv 2210.17323) makes up for the error of earlier columns by the Hessian of
data, and decodes in the same way. An element is off by at most half a scale, and by what rounding the scale to 16 bits
(2^-11 of it in fp16, 2^-8 in bf16; more below the smallest normal number) leaves beyond the last code.
"""

import torch

from moe_ref.contract.encoded import Encoded, packed
from moe_ref.contract.errors import UsageTypeError, UsageValueError, raise_faults
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.vocabulary import Scheme
from moe_ref.schemes.blocks import checked, largest, quotient
from moe_ref.schemes.half_scales import half_scales


def encode(scheme: Scheme, w_NK: torch.Tensor, *, order_K: torch.Tensor | None = None,
           scale_dtype: torch.dtype = torch.float16) -> Encoded:
    """Codes uint8, two to a byte, and scales fp16 or bf16 of (L, N, K); groups int32 for schemes with act-order.

    order_K: (K,) or (L, K), integers, columns in the order in which they fill the groups, as desc_act takes them by the
    diagonal of the Hessian; where it is left out of a scheme with act-order, columns with the largest sum of squares
    first. UsageValueError for what is no permutation, or for an order of a scheme without; else raises as `checked`
    and `half_scales` do.
    """
    values_NK, encoding = checked(w_NK), ENCODINGS[scheme]
    inverse_K = None
    if encoding.order:
        if order_K is None:
            order_K = values_NK.square().sum(-2).argsort(dim=-1, descending=True, stable=True)
        order_K = _checked_order(order_K, values_NK)
        inverse_K = order_K.argsort(-1)
        values_NK = _columns(values_NK, order_K)
    elif order_K is not None:
        raise UsageValueError(f"order_K is given, but {scheme} has groups of neighbouring columns")
    scales = half_scales(2 * largest(values_NK, encoding) / 15, scale_dtype)
    codes = torch.round(quotient(values_NK, scales, encoding)).add(8).clamp(0, 15)
    groups = None
    if inverse_K is not None and encoding.columns is not None:
        codes, groups = _columns(codes, inverse_K), (inverse_K // encoding.columns).int()
    return Encoded(scheme=scheme, codes=packed(codes), scales=scales, groups=groups, num_columns=values_NK.shape[-1])


def _columns(values_NK: torch.Tensor, order_K: torch.Tensor) -> torch.Tensor:
    """The columns in that order, each leading place's own."""
    return values_NK.gather(-1, order_K[..., None, :].expand_as(values_NK))


def _checked_order(order_K: torch.Tensor, values_NK: torch.Tensor) -> torch.Tensor:
    """(L, K), int64."""
    if not isinstance(order_K, torch.Tensor) or order_K.dtype not in (torch.int32, torch.int64):
        found = getattr(order_K, "dtype", type(order_K).__name__)
        raise UsageTypeError(f"order_K: {found}, but should be torch.int32 or torch.int64")
    *leading, _, count = values_NK.shape
    if tuple(order_K.shape) not in ((count,), (*leading, count)):
        raise_faults("order_K", [f"shape {tuple(order_K.shape)}, but should be {(count,)} or {(*leading, count)}"])
    order_K = order_K.to(values_NK.device).long().expand(*leading, count)
    wrong = int((order_K.sort(-1).values != torch.arange(count, device=order_K.device)).any(-1).sum())
    if wrong:
        raise_faults("order_K", [f"{wrong} orders are no permutation of 0 to {count - 1}, but should be 0"])
    return order_K
