"""Down product of the activated rows, with bias and routing weight in its epilogue."""

import torch
import triton
import triton.language as tl

from moe_fast.kernels.align import Alignment
from moe_fast.kernels.gate_up import grouped_tile
from moe_fast.launch import launch
from moe_fast.tiles import Tile


@triton.jit
def down_kernel(act, w2, w2_bias, down, row_weights, sorted_rows, block_expert, block_row, block_row_end, num_blocks,
                hidden_size, intermediate_size, stride_act_R, stride_w_E, stride_w_H, stride_w_I, stride_bias_E,
                stride_bias_H, stride_down_R, HAS_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr, GROUP: tl.constexpr):
    """down[row] = weight[row] * (act[position] @ w2^T + b2), in fp32, rounded once."""
    block, column = grouped_tile(num_blocks, tl.cdiv(hidden_size, BLOCK_H), GROUP)
    expert = tl.load(block_expert + block)
    if expert < 0:
        return
    position = tl.load(block_row + block) + tl.arange(0, BLOCK_M)
    in_rows = position < tl.load(block_row_end + block)
    row = tl.load(sorted_rows + position, mask=in_rows, other=0)
    h = column * BLOCK_H + tl.arange(0, BLOCK_H)
    in_columns = h < hidden_size
    i = tl.arange(0, BLOCK_I)
    act_at = act + position.to(tl.int64)[:, None] * stride_act_R + i[None, :]
    w_at = w2 + expert.to(tl.int64) * stride_w_E + h.to(tl.int64)[None, :] * stride_w_H
    w_at += i.to(tl.int64)[:, None] * stride_w_I
    total = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for start in range(0, intermediate_size, BLOCK_I):
        in_inner = start + i < intermediate_size
        act_tile = tl.load(act_at, mask=in_rows[:, None] & in_inner[None, :], other=0.0)
        w_tile = tl.load(w_at, mask=in_inner[:, None] & in_columns[None, :], other=0.0)
        total = tl.dot(act_tile, w_tile, total, input_precision="ieee")
        act_at += BLOCK_I
        w_at += BLOCK_I * stride_w_I
    if HAS_BIAS:
        bias_at = w2_bias + expert.to(tl.int64) * stride_bias_E + h.to(tl.int64) * stride_bias_H
        total += tl.load(bias_at, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if HAS_WEIGHTS:
        total *= tl.load(row_weights + row, mask=in_rows, other=0.0)[:, None]
    down_at = down + row.to(tl.int64)[:, None] * stride_down_R + h[None, :]
    tl.store(down_at, total.to(down.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


def down(act_RI: torch.Tensor, w2_EHI: torch.Tensor, w2_bias_EH: torch.Tensor | None,
         row_weights_R: torch.Tensor | None, alignment: Alignment, tile: Tile) -> torch.Tensor:
    """down_RH in (token, slot) order and act's dtype, weighted by row_weights_R (fp32, (token, slot) order) if given.

    Rows of ids outside [0, E) stay unwritten; the combine kernel does not read them.
    """
    num_rows, (_, hidden, intermediate) = alignment.local_ids_R.numel(), w2_EHI.shape
    down_RH = torch.empty(num_rows, hidden, dtype=act_RI.dtype, device=act_RI.device)
    stride_E, stride_H, stride_I = w2_EHI.stride()
    stride_bias_E, stride_bias_H = (0, 0) if w2_bias_EH is None else w2_bias_EH.stride()
    launch(down_kernel, (alignment.num_blocks * triton.cdiv(hidden, tile.block_n),), act_RI.device,
           act=act_RI, w2=w2_EHI, w2_bias=w2_EHI if w2_bias_EH is None else w2_bias_EH, down=down_RH,
           row_weights=act_RI if row_weights_R is None else row_weights_R.contiguous(),  # the kernel knows no stride
           sorted_rows=alignment.sorted_rows_R, block_expert=alignment.block_expert, block_row=alignment.block_row,
           block_row_end=alignment.block_row_end, num_blocks=alignment.num_blocks, hidden_size=hidden,
           intermediate_size=intermediate, stride_act_R=act_RI.stride(0), stride_w_E=stride_E, stride_w_H=stride_H,
           stride_w_I=stride_I, stride_bias_E=stride_bias_E, stride_bias_H=stride_bias_H,
           stride_down_R=down_RH.stride(0), HAS_BIAS=w2_bias_EH is not None, HAS_WEIGHTS=row_weights_R is not None,
           BLOCK_M=tile.block_m, BLOCK_H=tile.block_n, BLOCK_I=tile.block_k, GROUP=tile.group,
           num_warps=tile.num_warps, num_stages=tile.num_stages)
    return down_RH
