"""What a bias of w2 contributes to the gradient of a routing weight: a dot product for every row."""

import torch
import triton
import triton.language as tl

from moe_fast.launch import launch


@triton.jit
def bias_product_kernel(grad, bias, local_ids, products, num_rows, width, top_k, stride_grad_T, stride_grad_H,
                        stride_bias_E, stride_bias_H, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr):
    """products[row] = sum of grad[token] * bias[expert] in fp32, 0 for rows of no expert at hand."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    expert = tl.load(local_ids + row, mask=row < num_rows, other=-1)
    has_expert = (expert >= 0)[:, None]
    grad_at = grad + (row // top_k).to(tl.int64)[:, None] * stride_grad_T
    bias_at = bias + expert.to(tl.int64)[:, None] * stride_bias_E
    total = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(0, width, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        inside = has_expert & (h < width)[None, :]
        wide_h = h.to(tl.int64)[None, :]
        grad_tile = tl.load(grad_at + wide_h * stride_grad_H, mask=inside, other=0.0).to(tl.float32)
        bias_tile = tl.load(bias_at + wide_h * stride_bias_H, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(grad_tile * bias_tile, axis=1)
    tl.store(products + row, total, mask=row < num_rows)


def bias_product(grad_TH: torch.Tensor, bias_EH: torch.Tensor, local_ids_R: torch.Tensor, top_k: int) -> torch.Tensor:
    """(R,) in fp32 and (token, slot) order; local_ids_R as Alignment has them."""
    (num_rows,), width, device = local_ids_R.shape, grad_TH.shape[1], grad_TH.device
    products_R = torch.empty(num_rows, dtype=torch.float32, device=device)
    block_r, block_h = (32, 1024) if device.type == "cpu" else (8, 256)
    block_h = min(block_h, triton.next_power_of_2(max(width, 1)))
    launch(bias_product_kernel, (triton.cdiv(num_rows, block_r),), device, grad=grad_TH, bias=bias_EH,
           local_ids=local_ids_R, products=products_R, num_rows=num_rows, width=width, top_k=top_k,
           stride_grad_T=grad_TH.stride(0), stride_grad_H=grad_TH.stride(1), stride_bias_E=bias_EH.stride(0),
           stride_bias_H=bias_EH.stride(1), BLOCK_R=block_r, BLOCK_H=block_h)
    return products_R
