"""Gate and up products of the routed rows, gathered inside the kernel; bias, weight and activation are fused."""

import torch
import triton
import triton.language as tl

from moe_fast.form import Form
from moe_fast.kernels.activation import act_of, from_products
from moe_fast.kernels.align import Alignment
from moe_fast.launch import launch
from moe_fast.tiles import Tile


@triton.jit
def grouped_tile(num_blocks, num_columns, GROUP: tl.constexpr):
    """(row block, column tile) of this program; GROUP row blocks walk the columns together and share weights in L2."""
    program = tl.program_id(0)
    group = program // (GROUP * num_columns)
    first = group * GROUP
    size = tl.minimum(num_blocks - first, GROUP)
    inner = program - group * GROUP * num_columns
    return first + inner % size, inner // size


@triton.jit
def gate_up_kernel(x, w13, w13_bias, row_weights, act, sorted_rows, block_expert, block_row, block_row_end, num_blocks,
                   hidden_size, intermediate_size, top_k, stride_x_T, stride_x_H, stride_w_E, stride_w_G, stride_w_I,
                   stride_w_H, stride_bias_E, stride_bias_G, stride_bias_I, stride_act_R, FORM: tl.constexpr,
                   HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr,
                   GROUP: tl.constexpr):
    """act[position] of gate = x[token] @ w1^T + b1 and up = x[token] @ w3^T + b3, made in fp32, rounded once.

    A weight on the input multiplies the products instead: the same sum, without rounding the rows of x again.
    """
    block, column = grouped_tile(num_blocks, tl.cdiv(intermediate_size, BLOCK_I), GROUP)
    expert = tl.load(block_expert + block)
    if expert < 0:
        return
    position = tl.load(block_row + block) + tl.arange(0, BLOCK_M)
    in_rows = position < tl.load(block_row_end + block)
    row = tl.load(sorted_rows + position, mask=in_rows, other=0)
    token = row // top_k
    i = column * BLOCK_I + tl.arange(0, BLOCK_I)
    in_columns = i < intermediate_size
    h = tl.arange(0, BLOCK_H)
    # Rows, experts and features times their strides can pass 2^31, in whatever order a view has them.
    wide_h = h.to(tl.int64)
    x_at = x + token.to(tl.int64)[:, None] * stride_x_T + wide_h[None, :] * stride_x_H
    w_at = w13 + expert.to(tl.int64) * stride_w_E + i.to(tl.int64)[None, :] * stride_w_I + wide_h[:, None] * stride_w_H
    gate = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        in_hidden = start + h < hidden_size
        w_mask = in_hidden[:, None] & in_columns[None, :]
        x_tile = tl.load(x_at, mask=in_rows[:, None] & in_hidden[None, :], other=0.0)
        w1_tile = tl.load(w_at, mask=w_mask, other=0.0)
        if FORM.gated:
            w3_tile = tl.load(w_at + stride_w_G, mask=w_mask, other=0.0)
        gate = tl.dot(x_tile, w1_tile, gate, input_precision="ieee")
        if FORM.gated:
            up = tl.dot(x_tile, w3_tile, up, input_precision="ieee")
        x_at += BLOCK_H * stride_x_H
        w_at += BLOCK_H * stride_w_H
    weight = 1.0
    if FORM.weight_on_input:
        weight = tl.load(row_weights + row, mask=in_rows, other=0.0)[:, None]
    bias_at = w13_bias + expert.to(tl.int64) * stride_bias_E + i.to(tl.int64) * stride_bias_I
    gate, up = from_products(gate, up, weight, bias_at, stride_bias_G, in_columns, HAS_BIAS, FORM)
    result = act_of(gate, up, FORM)
    act_at = act + position.to(tl.int64)[:, None] * stride_act_R + i[None, :]
    tl.store(act_at, result.to(act.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


def gate_up(x_TH: torch.Tensor, w13_EGIH: torch.Tensor, w13_bias_EGI: torch.Tensor | None,
            row_weights_R: torch.Tensor | None, alignment: Alignment, top_k: int, form: Form,
            tile: Tile) -> torch.Tensor:
    """act_RI in expert order and x's dtype; rows of ids outside [0, E) do not exist and stay unwritten.

    row_weights_R: fp32, in (token, slot) order, read where the form has the weight on the input.
    """
    intermediate = w13_EGIH.shape[2]
    act_RI = torch.empty(alignment.sorted_rows_R.numel(), intermediate, dtype=x_TH.dtype, device=x_TH.device)
    stride_E, stride_G, stride_I, stride_H = w13_EGIH.stride()
    launch(gate_up_kernel, (alignment.num_blocks * triton.cdiv(intermediate, tile.block_n),), x_TH.device,
           x=x_TH, w13=w13_EGIH, row_weights=x_TH if row_weights_R is None else row_weights_R.contiguous(), act=act_RI,
           sorted_rows=alignment.sorted_rows_R, block_expert=alignment.block_expert, block_row=alignment.block_row,
           block_row_end=alignment.block_row_end, num_blocks=alignment.num_blocks, hidden_size=x_TH.shape[1],
           intermediate_size=intermediate, top_k=top_k, stride_x_T=x_TH.stride(0), stride_x_H=x_TH.stride(1),
           stride_w_E=stride_E, stride_w_G=stride_G, stride_w_I=stride_I, stride_w_H=stride_H,
           **bias_arguments(w13_bias_EGI, w13_EGIH), stride_act_R=act_RI.stride(0), FORM=form, BLOCK_M=tile.block_m,
           BLOCK_I=tile.block_n, BLOCK_H=tile.block_k, GROUP=tile.group, num_warps=tile.num_warps,
           num_stages=tile.num_stages)
    return act_RI


def bias_arguments(w13_bias_EGI: torch.Tensor | None, w13_EGIH: torch.Tensor) -> dict[str, object]:
    """What kernels take of the bias, which may not be there: another pointer then stands in, and is not read."""
    strides = (0, 0, 0) if w13_bias_EGI is None else w13_bias_EGI.stride()
    return {"w13_bias": w13_EGIH if w13_bias_EGI is None else w13_bias_EGI, "HAS_BIAS": w13_bias_EGI is not None,
            "stride_bias_E": strides[0], "stride_bias_G": strides[1], "stride_bias_I": strides[2]}
