"""Gradients of gate and up from that of the activation; gate and up are made again."""

import torch
import triton
import triton.language as tl

from moe_fast.form import Form
from moe_fast.kernels.activation import from_products, through_act
from moe_fast.kernels.align import Alignment
from moe_fast.kernels.gate_up import bias_arguments, grouped_tile
from moe_fast.launch import launch
from moe_fast.tiles import Tile


@triton.jit
def projection_gradient_kernel(x, grad_act, w13, w13_bias, row_weights, grad_gate_up, weight_parts, sorted_rows,
                               block_expert, block_row, block_row_end, num_blocks, hidden_size, intermediate_size,
                               top_k, stride_x_T, stride_x_H, stride_grad_R, stride_grad_I, stride_w_E, stride_w_G,
                               stride_w_I, stride_w_H, stride_bias_E, stride_bias_G, stride_bias_I,
                               FORM: tl.constexpr, NUM_PARTS: tl.constexpr, HAS_BIAS: tl.constexpr,
                               BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr,
                               GROUP: tl.constexpr):
    """grad_act[row] through the activation, at the row's position.

    A weight on the input multiplies it, and weight_parts[row, tile] = sums of the gradients of gate and up times the
    products that the weight multiplied.
    """
    num_columns = tl.cdiv(intermediate_size, BLOCK_I)
    block, column = grouped_tile(num_blocks, num_columns, GROUP)
    expert = tl.load(block_expert + block)
    if expert < 0:
        return
    position = tl.load(block_row + block) + tl.arange(0, BLOCK_M)
    in_rows = position < tl.load(block_row_end + block)
    row = tl.load(sorted_rows + position, mask=in_rows, other=0)
    token = (row // top_k).to(tl.int64)[:, None]
    i = column * BLOCK_I + tl.arange(0, BLOCK_I)
    in_columns = i < intermediate_size
    wide_i = i.to(tl.int64)[None, :]
    h = tl.arange(0, BLOCK_H)
    wide_h = h.to(tl.int64)
    x_at = x + token * stride_x_T + wide_h[None, :] * stride_x_H
    w_at = w13 + expert.to(tl.int64) * stride_w_E + wide_i * stride_w_I + wide_h[:, None] * stride_w_H
    gate_product = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    up_product = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        in_hidden = start + h < hidden_size
        w_mask = in_hidden[:, None] & in_columns[None, :]
        x_tile = tl.load(x_at, mask=in_rows[:, None] & in_hidden[None, :], other=0.0)
        w1_tile = tl.load(w_at, mask=w_mask, other=0.0)
        gate_product = tl.dot(x_tile, w1_tile, gate_product, input_precision="ieee")
        if FORM.gated:
            w3_tile = tl.load(w_at + stride_w_G, mask=w_mask, other=0.0)
            up_product = tl.dot(x_tile, w3_tile, up_product, input_precision="ieee")
        x_at += BLOCK_H * stride_x_H
        w_at += BLOCK_H * stride_w_H
    inside = in_rows[:, None] & in_columns[None, :]
    wide_row = row.to(tl.int64)
    grad_at = grad_act + wide_row[:, None] * stride_grad_R + wide_i * stride_grad_I
    grad = tl.load(grad_at, mask=inside, other=0.0).to(tl.float32)
    weight = 1.0
    if FORM.weight_on_input:
        weight = tl.load(row_weights + row, mask=in_rows, other=0.0)[:, None]
    bias_at = w13_bias + expert.to(tl.int64) * stride_bias_E + i.to(tl.int64) * stride_bias_I
    gate, up = from_products(gate_product, up_product, weight, bias_at, stride_bias_G, in_columns, HAS_BIAS, FORM)
    grad_gate, grad_up = through_act(grad, gate, up, FORM)
    if FORM.weight_on_input:
        part = grad_gate * gate_product
        if FORM.gated:
            part += grad_up * up_product
        tl.store(weight_parts + wide_row * num_columns + column, tl.sum(part, axis=1), mask=in_rows)
        grad_gate *= weight
        grad_up *= weight
    kind = grad_gate_up.dtype.element_ty
    gate_at = grad_gate_up + position.to(tl.int64)[:, None] * NUM_PARTS * intermediate_size + i[None, :]
    tl.store(gate_at, grad_gate.to(kind), mask=inside)
    if FORM.gated:
        tl.store(gate_at + intermediate_size, grad_up.to(kind), mask=inside)


def projection_gradient(grad_act_RI: torch.Tensor, x_TH: torch.Tensor, w13_EGIH: torch.Tensor,
                        w13_bias_EGI: torch.Tensor | None, row_weights_R: torch.Tensor | None, alignment: Alignment,
                        top_k: int, form: Form, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """grad_gate_up_RGI in expert order and x's dtype, and grad_weights_R (fp32) of weights on the input, else zeros.

    grad_act_RI, row_weights_R and grad_weights_R are in (token, slot) order. Rows of no expert at hand stay unwritten
    in the first and are 0 in the second.
    """
    (num_rows, intermediate), num_parts, device = grad_act_RI.shape, w13_EGIH.shape[1], x_TH.device
    grad_gate_up_RGI = torch.empty(num_rows, num_parts, intermediate, dtype=x_TH.dtype, device=device)
    num_columns = triton.cdiv(intermediate, tile.block_n)
    parts = torch.zeros(num_rows, num_columns, dtype=torch.float32, device=device)
    stride_E, stride_G, stride_I, stride_H = w13_EGIH.stride()
    launch(projection_gradient_kernel, (alignment.num_blocks * num_columns,), device, x=x_TH, grad_act=grad_act_RI,
           w13=w13_EGIH, row_weights=x_TH if row_weights_R is None else row_weights_R.contiguous(),
           grad_gate_up=grad_gate_up_RGI, weight_parts=parts, sorted_rows=alignment.sorted_rows_R,
           block_expert=alignment.block_expert, block_row=alignment.block_row, block_row_end=alignment.block_row_end,
           num_blocks=alignment.num_blocks, hidden_size=x_TH.shape[1], intermediate_size=intermediate, top_k=top_k,
           stride_x_T=x_TH.stride(0), stride_x_H=x_TH.stride(1), stride_grad_R=grad_act_RI.stride(0),
           stride_grad_I=grad_act_RI.stride(1), stride_w_E=stride_E, stride_w_G=stride_G, stride_w_I=stride_I,
           stride_w_H=stride_H, **bias_arguments(w13_bias_EGI, w13_EGIH), FORM=form, NUM_PARTS=num_parts,
           BLOCK_M=tile.block_m, BLOCK_I=tile.block_n, BLOCK_H=tile.block_k, GROUP=tile.group,
           num_warps=tile.num_warps, num_stages=tile.num_stages)
    return grad_gate_up_RGI, parts.sum(1)
