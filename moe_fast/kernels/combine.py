"""The merge: every token's K weighted rows, its shared row and the output's bias, in slot order without atomics."""

import torch
import triton
import triton.language as tl

from moe_fast.launch import launch


@triton.jit
def combine_kernel(down, shared, bias, local_ids, merged, num_tokens, hidden_size, stride_down_R, stride_shared_T,
                   stride_bias_H, stride_merged_T, TOP_K: tl.constexpr, HAS_SHARED: tl.constexpr, MEAN: tl.constexpr,
                   HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):
    """merged[t] = down[t, 0] + ... + down[t, K-1] (+ shared[t]) (/ 2) (+ bias), in fp32, rounded once.

    Dropped slots are not read.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_tokens = t < num_tokens
    inside = in_tokens[:, None] & (h < hidden_size)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for k in tl.static_range(TOP_K):
        row = t.to(tl.int64) * TOP_K + k
        kept = tl.load(local_ids + row, mask=in_tokens, other=-1) >= 0
        total += tl.load(down + row[:, None] * stride_down_R + h[None, :], mask=inside & kept[:, None],
                         other=0.0).to(tl.float32)
    if HAS_SHARED:
        total += tl.load(shared + t.to(tl.int64)[:, None] * stride_shared_T + h[None, :], mask=inside,
                         other=0.0).to(tl.float32)
    if MEAN:
        total *= 0.5
    if HAS_BIAS:
        total += tl.load(bias + h.to(tl.int64) * stride_bias_H, mask=h < hidden_size, other=0.0).to(tl.float32)[None, :]
    tl.store(merged + t.to(tl.int64)[:, None] * stride_merged_T + h[None, :],
             total.to(merged.dtype.element_ty), mask=inside)


def combine(down_RH: torch.Tensor, shared_TH: torch.Tensor | None, local_ids_R: torch.Tensor, num_tokens: int,
            top_k: int, *, bias_H: torch.Tensor | None = None, mean: bool = False,
            merged_TH: torch.Tensor | None = None) -> torch.Tensor:
    """merged_TH, given or new, in down's dtype; one program sums a whole token tile in a fixed order.

    down_RH: rows in (token, slot) order; those whose local_ids_R is -1 are not read. mean: half of the sum; the bias is
    added after that.
    """
    hidden = down_RH.shape[1]
    if merged_TH is None:
        merged_TH = torch.empty(num_tokens, hidden, dtype=down_RH.dtype, device=down_RH.device)
    block_t, block_h = (32, 1024) if down_RH.device.type == "cpu" else (4, 512)
    block_h = min(block_h, triton.next_power_of_2(max(hidden, 1)))
    launch(combine_kernel, (triton.cdiv(num_tokens, block_t), triton.cdiv(hidden, block_h)), down_RH.device,
           down=down_RH, shared=down_RH if shared_TH is None else shared_TH, bias=down_RH if bias_H is None else bias_H,
           local_ids=local_ids_R, merged=merged_TH, num_tokens=num_tokens, hidden_size=hidden,
           stride_down_R=down_RH.stride(0), stride_shared_T=0 if shared_TH is None else shared_TH.stride(0),
           stride_bias_H=0 if bias_H is None else bias_H.stride(0), stride_merged_T=merged_TH.stride(0), TOP_K=top_k,
           HAS_SHARED=shared_TH is not None, MEAN=mean, HAS_BIAS=bias_H is not None, BLOCK_T=block_t, BLOCK_H=block_h)
    return merged_TH
