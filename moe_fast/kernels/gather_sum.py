"""Rows added up by token from wherever they stand, in slot order, without atomics."""

import torch
import triton
import triton.language as tl

from moe_fast.launch import launch


@triton.jit
def gather_sum_kernel(rows, place, bias, sums, num_tokens, width, stride_rows_R, stride_rows_H, stride_bias_H,
                      TOP_K: tl.constexpr, MEAN: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr,
                      BLOCK_H: tl.constexpr):
    """sums[t] = rows[place[t, 0]] + ... + rows[place[t, K-1]] (/ 2) (+ bias) in fp32, rounded once.

    Negative places are not read.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_tokens = t < num_tokens
    inside = in_tokens[:, None] & (h < width)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(place + t.to(tl.int64) * TOP_K + k, mask=in_tokens, other=-1)
        rows_at = rows + row[:, None] * stride_rows_R + h.to(tl.int64)[None, :] * stride_rows_H
        total += tl.load(rows_at, mask=inside & (row >= 0)[:, None], other=0.0).to(tl.float32)
    if MEAN:
        total *= 0.5
    if HAS_BIAS:
        total += tl.load(bias + h.to(tl.int64) * stride_bias_H, mask=h < width, other=0.0).to(tl.float32)[None, :]
    tl.store(sums + t.to(tl.int64)[:, None] * width + h[None, :], total.to(sums.dtype.element_ty), mask=inside)


def gather_sum(rows_RH: torch.Tensor, place_TK: torch.Tensor, bias_H: torch.Tensor | None = None,
               mean: bool = False) -> torch.Tensor:
    """(T, H) in the dtype of rows_RH, which may have any strides; place_TK: int64. mean: half of the sum, then bias."""
    (num_tokens, top_k), width, device = place_TK.shape, rows_RH.shape[1], rows_RH.device
    sums_TH = torch.empty(num_tokens, width, dtype=rows_RH.dtype, device=device)
    block_t, block_h = (32, 1024) if device.type == "cpu" else (4, 512)
    block_h = min(block_h, triton.next_power_of_2(max(width, 1)))
    launch(gather_sum_kernel, (triton.cdiv(num_tokens, block_t), triton.cdiv(width, block_h)), device, rows=rows_RH,
           place=place_TK.contiguous(), bias=rows_RH if bias_H is None else bias_H, sums=sums_TH, num_tokens=num_tokens,
           width=width, stride_rows_R=rows_RH.stride(0), stride_rows_H=rows_RH.stride(1),
           stride_bias_H=0 if bias_H is None else bias_H.stride(0), TOP_K=top_k, MEAN=mean, HAS_BIAS=bias_H is not None,
           BLOCK_T=block_t, BLOCK_H=block_h)
    return sums_TH
