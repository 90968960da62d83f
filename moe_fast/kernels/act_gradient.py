"""Gradients at the activation: gate and up are made again, beside the gradient that comes back through w2."""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from moe_fast.form import Form
from moe_fast.kernels.activation import act_of, from_products, through_act
from moe_fast.kernels.align import Alignment
from moe_fast.kernels.gate_up import bias_arguments, grouped_tile
from moe_fast.launch import launch
from moe_fast.tiles import Tile, gemm_tile


@triton.jit
def act_gradient_kernel(x, grad, w13, w13_bias, w2, row_weights, grad_gate_up, weighted_act, weight_parts, sorted_rows,
                        block_expert, block_row, block_row_end, num_blocks, hidden_size, intermediate_size, top_k,
                        stride_x_T, stride_x_H, stride_grad_T, stride_grad_H, stride_w13_E, stride_w13_G,
                        stride_w13_I, stride_w13_H, stride_bias_E, stride_bias_G, stride_bias_I, stride_w2_E,
                        stride_w2_H, stride_w2_I, FORM: tl.constexpr, NUM_PARTS: tl.constexpr, HAS_BIAS: tl.constexpr,
                        BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr):
    """Gate and up of one tile of rows and columns I, and d = grad[token] @ w2, over H in fp32; then:

    grad_gate_up = weight d through the activation, weighted_act = weight act, weight_parts[row, tile] = sum of act d.
    A weight on the input: grad_gate_up = weight d through it, act unweighted, and of its own gradient the parts are the
    sums of the gradients of gate and up times the products that it multiplied.
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
    grad_at = grad + token * stride_grad_T + wide_h[None, :] * stride_grad_H
    w13_at = w13 + expert.to(tl.int64) * stride_w13_E + wide_i * stride_w13_I + wide_h[:, None] * stride_w13_H
    w2_at = w2 + expert.to(tl.int64) * stride_w2_E + wide_i * stride_w2_I + wide_h[:, None] * stride_w2_H
    gate_product = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    up_product = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    grad_act = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        in_hidden = start + h < hidden_size
        row_mask = in_rows[:, None] & in_hidden[None, :]
        w_mask = in_hidden[:, None] & in_columns[None, :]
        x_tile = tl.load(x_at, mask=row_mask, other=0.0)
        w1_tile = tl.load(w13_at, mask=w_mask, other=0.0)
        gate_product = tl.dot(x_tile, w1_tile, gate_product, input_precision="ieee")
        if FORM.gated:
            w3_tile = tl.load(w13_at + stride_w13_G, mask=w_mask, other=0.0)
            up_product = tl.dot(x_tile, w3_tile, up_product, input_precision="ieee")
        grad_tile = tl.load(grad_at, mask=row_mask, other=0.0)
        grad_act = tl.dot(grad_tile, tl.load(w2_at, mask=w_mask, other=0.0), grad_act, input_precision="ieee")
        x_at += BLOCK_H * stride_x_H
        grad_at += BLOCK_H * stride_grad_H
        w13_at += BLOCK_H * stride_w13_H
        w2_at += BLOCK_H * stride_w2_H
    weight = tl.load(row_weights + row, mask=in_rows, other=0.0)[:, None]
    bias_at = w13_bias + expert.to(tl.int64) * stride_bias_E + i.to(tl.int64) * stride_bias_I
    gate, up = from_products(gate_product, up_product, weight, bias_at, stride_bias_G, in_columns, HAS_BIAS, FORM)
    act = act_of(gate, up, FORM)
    if FORM.weight_on_input:
        grad_gate, grad_up = through_act(grad_act, gate, up, FORM)
        part = grad_gate * gate_product
        if FORM.gated:
            part += grad_up * up_product
        grad_gate *= weight
        grad_up *= weight
    else:
        part = act * grad_act
        act *= weight
        grad_gate, grad_up = through_act(grad_act * weight, gate, up, FORM)
    tl.store(weight_parts + row.to(tl.int64) * num_columns + column, tl.sum(part, axis=1), mask=in_rows)
    inside = in_rows[:, None] & in_columns[None, :]
    kind = weighted_act.dtype.element_ty
    wide_position = position.to(tl.int64)[:, None]
    tl.store(weighted_act + wide_position * intermediate_size + i[None, :], act.to(kind), mask=inside)
    gate_at = grad_gate_up + wide_position * NUM_PARTS * intermediate_size + i[None, :]
    tl.store(gate_at, grad_gate.to(kind), mask=inside)
    if FORM.gated:
        tl.store(gate_at + intermediate_size, grad_up.to(kind), mask=inside)


def three_product_tile(device: torch.device, dtype: torch.dtype, rows_per_expert: int, out_features: int,
                       in_features: int, form: Form) -> Tile:
    """The tile for three accumulators and five operand tiles: more columns or stages would not fit on a GPU.

    The slopes of softcaps take registers besides.
    """
    tile = gemm_tile(device, dtype, rows_per_expert, out_features, in_features, accumulators=4)
    columns = 32 if form.gate_softcap or form.up_softcap else 64
    return tile if device.type == "cpu" else replace(tile, block_n=min(tile.block_n, columns), num_stages=2)


def act_gradient(x_TH: torch.Tensor, grad_TH: torch.Tensor, w13_EGIH: torch.Tensor, w13_bias_EGI: torch.Tensor | None,
                 w2_EHI: torch.Tensor, row_weights_R: torch.Tensor, alignment: Alignment, top_k: int, form: Form,
                 rows_per_expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad_gate_up_RGI and weighted act_RI in expert order and x's dtype, and grad_weights_R (fp32).

    grad_weights_R, in (token, slot) order, is 0 where no expert at hand was chosen; the other rows stay unwritten. What
    the weight multiplies of w2's bias is no part of it.
    """
    row_weights_R = row_weights_R.contiguous()  # the kernel knows no stride of them
    num_rows, (_, num_parts, intermediate, hidden), device = row_weights_R.numel(), w13_EGIH.shape, x_TH.device
    tile = three_product_tile(device, x_TH.dtype, rows_per_expert, intermediate, hidden, form)
    grad_gate_up_RGI = torch.empty(num_rows, num_parts, intermediate, dtype=x_TH.dtype, device=device)
    weighted_act_RI = torch.empty(num_rows, intermediate, dtype=x_TH.dtype, device=device)
    num_columns = triton.cdiv(intermediate, tile.block_n)
    parts = torch.zeros(num_rows, num_columns, dtype=torch.float32, device=device)
    stride_E, stride_G, stride_I, stride_H = w13_EGIH.stride()
    launch(act_gradient_kernel, (alignment.num_blocks * num_columns,), device, x=x_TH, grad=grad_TH, w13=w13_EGIH,
           w2=w2_EHI, row_weights=row_weights_R, grad_gate_up=grad_gate_up_RGI, weighted_act=weighted_act_RI,
           weight_parts=parts, sorted_rows=alignment.sorted_rows_R, block_expert=alignment.block_expert,
           block_row=alignment.block_row, block_row_end=alignment.block_row_end, num_blocks=alignment.num_blocks,
           hidden_size=hidden, intermediate_size=intermediate, top_k=top_k, stride_x_T=x_TH.stride(0),
           stride_x_H=x_TH.stride(1), stride_grad_T=grad_TH.stride(0), stride_grad_H=grad_TH.stride(1),
           stride_w13_E=stride_E, stride_w13_G=stride_G, stride_w13_I=stride_I, stride_w13_H=stride_H,
           **bias_arguments(w13_bias_EGI, w13_EGIH), stride_w2_E=w2_EHI.stride(0), stride_w2_H=w2_EHI.stride(1),
           stride_w2_I=w2_EHI.stride(2), FORM=form, NUM_PARTS=num_parts, BLOCK_M=tile.block_m, BLOCK_I=tile.block_n,
           BLOCK_H=tile.block_k, GROUP=tile.group, num_warps=tile.num_warps, num_stages=tile.num_stages)
    return grad_gate_up_RGI, weighted_act_RI, parts.sum(1)
