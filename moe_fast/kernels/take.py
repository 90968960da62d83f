"""Rows copied to other places: one source row for each row of the result."""

import torch
import triton
import triton.language as tl

from moe_fast.launch import launch


@triton.jit
def take_kernel(rows, source, taken, num_taken, width, stride_rows_R, stride_rows_H, BLOCK_R: tl.constexpr,
                BLOCK_H: tl.constexpr):
    """taken[r] = rows[source[r]], zero where source[r] is negative."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (r < num_taken)[:, None] & (h < width)[None, :]
    row = tl.load(source + r, mask=r < num_taken, other=-1)
    rows_at = rows + row[:, None] * stride_rows_R + h.to(tl.int64)[None, :] * stride_rows_H
    value = tl.load(rows_at, mask=inside & (row >= 0)[:, None], other=0.0)
    tl.store(taken + r.to(tl.int64)[:, None] * width + h[None, :], value, mask=inside)


def take(rows_RH: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """A row of rows_RH, which may have any strides, for each element of `source` (int64); zeros for a negative one."""
    num_taken, width, device = source.numel(), rows_RH.shape[1], rows_RH.device
    taken = torch.empty(num_taken, width, dtype=rows_RH.dtype, device=device)
    block_r, block_h = (32, 1024) if device.type == "cpu" else (4, 512)
    block_h = min(block_h, triton.next_power_of_2(max(width, 1)))
    launch(take_kernel, (triton.cdiv(num_taken, block_r), triton.cdiv(width, block_h)), device, rows=rows_RH,
           source=source.contiguous(), taken=taken, num_taken=num_taken, width=width,
           stride_rows_R=rows_RH.stride(0), stride_rows_H=rows_RH.stride(1), BLOCK_R=block_r, BLOCK_H=block_h)
    return taken
