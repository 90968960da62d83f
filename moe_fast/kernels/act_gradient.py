"""Gradients at the activation: gate and up are made again, beside the gradient that comes back through w2."""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from moe_fast.kernels.align import Alignment
from moe_fast.kernels.gate_up import activate, grouped_tile
from moe_fast.launch import launch
from moe_fast.tiles import Tile, gemm_tile


@triton.jit
def activation_slope(gate, ACTIVATION: tl.constexpr):
    """d activation(gate) / d gate in fp32; 1 - sigmoid(z) is written sigmoid(-z), which does not cancel."""
    if ACTIVATION == "silu":
        share = tl.sigmoid(gate)
        result = share + gate * share * tl.sigmoid(-gate)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        result = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476)) + gate * density
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        inner_slope = 0.7978845608028654 * (1.0 + 0.134145 * gate * gate)
        share = tl.sigmoid(2.0 * inner)
        result = share + 2.0 * gate * share * tl.sigmoid(-2.0 * inner) * inner_slope
    return result


@triton.jit
def act_gradient_kernel(x, grad, w13, w2, row_weights, grad_gate_up, weighted_act, weight_parts, sorted_rows,
                        block_expert, block_row, block_row_end, num_blocks, hidden_size, intermediate_size, top_k,
                        stride_x_T, stride_x_H, stride_grad_T, stride_grad_H, stride_w13_E, stride_w13_G,
                        stride_w13_I, stride_w13_H, stride_w2_E, stride_w2_H, stride_w2_I, ACTIVATION: tl.constexpr,
                        BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr):
    """Three products over H for one tile of rows and columns I, in fp32; then, with d = grad[token] @ w2:

    weight_parts[row, tile] = sum of act d, grad_up = weight activation(gate) d, grad_gate = weight up slope(gate) d.
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
    gate = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    grad_act = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        in_hidden = start + h < hidden_size
        row_mask = in_rows[:, None] & in_hidden[None, :]
        w_mask = in_hidden[:, None] & in_columns[None, :]
        x_tile = tl.load(x_at, mask=row_mask, other=0.0)
        gate = tl.dot(x_tile, tl.load(w13_at, mask=w_mask, other=0.0), gate, input_precision="ieee")
        up = tl.dot(x_tile, tl.load(w13_at + stride_w13_G, mask=w_mask, other=0.0), up, input_precision="ieee")
        grad_tile = tl.load(grad_at, mask=row_mask, other=0.0)
        grad_act = tl.dot(grad_tile, tl.load(w2_at, mask=w_mask, other=0.0), grad_act, input_precision="ieee")
        x_at += BLOCK_H * stride_x_H
        grad_at += BLOCK_H * stride_grad_H
        w13_at += BLOCK_H * stride_w13_H
        w2_at += BLOCK_H * stride_w2_H
    weight = tl.load(row_weights + row, mask=in_rows, other=0.0)[:, None]
    activated = activate(gate, ACTIVATION)
    act = activated * up
    tl.store(weight_parts + row.to(tl.int64) * num_columns + column, tl.sum(act * grad_act, axis=1), mask=in_rows)
    inside = in_rows[:, None] & in_columns[None, :]
    kind = weighted_act.dtype.element_ty
    wide_position = position.to(tl.int64)[:, None]
    tl.store(weighted_act + wide_position * intermediate_size + i[None, :], (weight * act).to(kind), mask=inside)
    gate_at = grad_gate_up + wide_position * 2 * intermediate_size + i[None, :]
    grad_act *= weight
    tl.store(gate_at, (grad_act * up * activation_slope(gate, ACTIVATION)).to(kind), mask=inside)
    tl.store(gate_at + intermediate_size, (grad_act * activated).to(kind), mask=inside)


def three_product_tile(device: torch.device, dtype: torch.dtype, rows_per_expert: int, out_features: int,
                       in_features: int) -> Tile:
    """The tile for three accumulators and five operand tiles: more columns or stages would not fit on a GPU."""
    tile = gemm_tile(device, dtype, rows_per_expert, out_features, in_features, accumulators=4)
    return tile if device.type == "cpu" else replace(tile, block_n=min(tile.block_n, 64), num_stages=2)


def act_gradient(x_TH: torch.Tensor, grad_TH: torch.Tensor, w13_EGIH: torch.Tensor, w2_EHI: torch.Tensor,
                 row_weights_R: torch.Tensor, alignment: Alignment, top_k: int, activation: str,
                 rows_per_expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad_gate_up_RGI and weighted act_RI in expert order and x's dtype, and grad_weights_R (fp32).

    grad_weights_R, in (token, slot) order, is 0 where no expert at hand was chosen; the other rows stay unwritten.
    """
    row_weights_R = row_weights_R.contiguous()  # the kernel knows no stride of them
    num_rows, (_, _, intermediate, hidden), device = row_weights_R.numel(), w13_EGIH.shape, x_TH.device
    tile = three_product_tile(device, x_TH.dtype, rows_per_expert, intermediate, hidden)
    grad_gate_up_RGI = torch.empty(num_rows, 2, intermediate, dtype=x_TH.dtype, device=device)
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
           stride_w2_E=w2_EHI.stride(0), stride_w2_H=w2_EHI.stride(1), stride_w2_I=w2_EHI.stride(2),
           ACTIVATION=activation, BLOCK_M=tile.block_m, BLOCK_I=tile.block_n, BLOCK_H=tile.block_k,
           GROUP=tile.group, num_warps=tile.num_warps, num_stages=tile.num_stages)
    return grad_gate_up_RGI, weighted_act_RI, parts.sum(1)
