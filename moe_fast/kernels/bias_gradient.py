"""Gradients of the experts' biases: the sum of each expert's rows, in their order, without atomics."""

import torch
import triton
import triton.language as tl

from moe_fast.kernels.align import Alignment
from moe_fast.launch import launch


@triton.jit
def bias_gradient_kernel(rows, row_weights, result, sorted_rows, offsets, width, top_k, stride_rows_R, stride_rows_N,
                         BY_TOKEN: tl.constexpr, HAS_WEIGHTS: tl.constexpr, BLOCK_R: tl.constexpr,
                         BLOCK_N: tl.constexpr):
    """result[e, n] = sum over rows of e of rows[position, n], or of weight[row] * rows[token, n]; rounded once."""
    expert = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(offsets + expert + 1)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(tl.load(offsets + expert), end, BLOCK_R):
        position = first + tl.arange(0, BLOCK_R)
        inside = position < end
        source = position
        if BY_TOKEN:
            row = tl.load(sorted_rows + position, mask=inside, other=0)
            source = row // top_k
        at = rows + source.to(tl.int64)[:, None] * stride_rows_R + n.to(tl.int64)[None, :] * stride_rows_N
        tile = tl.load(at, mask=inside[:, None] & (n < width)[None, :], other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            tile *= tl.load(row_weights + row, mask=inside, other=0.0)[:, None]
        total += tl.sum(tile, axis=0)
    tl.store(result + expert * width + n, total.to(result.dtype.element_ty), mask=n < width)


def bias_gradient(rows_RGI: torch.Tensor, num_experts: int, alignment: Alignment) -> torch.Tensor:
    """(E, G, I) in the dtype of rows_RGI, which are in expert order; exact zeros for experts without rows."""
    sums_EN = _sums(rows_RGI.flatten(1), None, num_experts, alignment, top_k=1, by_token=False)
    return sums_EN.view(num_experts, *rows_RGI.shape[1:])


def weighted_bias_gradient(grad_TH: torch.Tensor, row_weights_R: torch.Tensor | None, num_experts: int,
                           alignment: Alignment, top_k: int) -> torch.Tensor:
    """(E, H) in the dtype of grad_TH: of each row of an expert its token's gradient, times its weight if given.

    row_weights_R: fp32, in (token, slot) order.
    """
    return _sums(grad_TH, row_weights_R, num_experts, alignment, top_k, by_token=True)


def _sums(rows: torch.Tensor, row_weights_R: torch.Tensor | None, num_experts: int, alignment: Alignment, top_k: int,
          by_token: bool) -> torch.Tensor:
    width, device = rows.shape[1], rows.device
    result = torch.empty(num_experts, width, dtype=rows.dtype, device=device)
    block_n = min(triton.next_power_of_2(max(width, 1)), 1024 if device.type == "cpu" else 64)
    launch(bias_gradient_kernel, (num_experts, triton.cdiv(width, block_n)), device, rows=rows,
           row_weights=rows if row_weights_R is None else row_weights_R.contiguous(), result=result,
           sorted_rows=alignment.sorted_rows_R, offsets=alignment.offsets, width=width, top_k=top_k,
           stride_rows_R=rows.stride(0), stride_rows_N=rows.stride(1), BY_TOKEN=by_token,
           HAS_WEIGHTS=row_weights_R is not None, BLOCK_R=32, BLOCK_N=block_n)
    return result
