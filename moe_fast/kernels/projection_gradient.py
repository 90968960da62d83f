"""Gradients of gate and up from that of the activation; gate and up are made again."""

import torch
import triton
import triton.language as tl

from moe_fast.form import Form
from moe_fast.kernels.activation import from_products, through_act
from moe_fast.kernels.align import Alignment
from moe_fast.kernels.gate_up import gate_up_arguments, gate_up_products
from moe_fast.kernels.grouped import block_rows, grouped_tile, launch_grouped
from moe_fast.tiles import Tile


@triton.jit
def projection_gradient_kernel(x, grad_act, w13, w13_bias, row_weights, grad_gate_up, weight_parts, sorted_rows,
                               block_expert, block_row, block_row_end, block_count, hidden_size, intermediate_size,
                               top_k, stride_x_T, stride_x_H, stride_grad_R, stride_grad_I, stride_w_E, stride_w_G,
                               stride_w_I, stride_w_H, stride_bias_E, stride_bias_G, stride_bias_I,
                               FORM: tl.constexpr, HAS_BIAS: tl.constexpr, W13_LOADS: tl.constexpr,
                               BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr,
                               GROUP: tl.constexpr, PERSISTENT: tl.constexpr):
    """grad_act[row] through the activation, at the row's position.

    A weight on the input multiplies it, and weight_parts[row, tile] = sums of the gradients of gate and up times the
    products that the weight multiplied.
    """
    num_blocks, num_columns = tl.load(block_count), tl.cdiv(intermediate_size, BLOCK_I)
    for tile in tl.range(tl.program_id(0), num_blocks * num_columns, tl.num_programs(0), flatten=PERSISTENT):
        block, column = grouped_tile(tile, num_blocks, num_columns, GROUP)
        expert, position, in_rows, row = block_rows(sorted_rows, block_expert, block_row, block_row_end, block, BLOCK_M)
        gate_product, up_product = gate_up_products(
            x, w13, row // top_k, expert, column, in_rows, hidden_size, intermediate_size, stride_x_T, stride_x_H,
            stride_w_E, stride_w_G, stride_w_I, stride_w_H, FORM.gated, W13_LOADS, BLOCK_M, BLOCK_I, BLOCK_H)
        i = column * BLOCK_I + tl.arange(0, BLOCK_I)
        in_columns = i < intermediate_size
        inside = in_rows[:, None] & in_columns[None, :]
        wide_row = row.to(tl.int64)
        grad_at = grad_act + wide_row[:, None] * stride_grad_R + i.to(tl.int64)[None, :] * stride_grad_I
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
        gate_at = grad_gate_up + position.to(tl.int64)[:, None] * (intermediate_size * FORM.num_projections)
        gate_at += i[None, :]
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
    launch_grouped(projection_gradient_kernel, alignment, num_columns, tile, device, x=x_TH, grad_act=grad_act_RI,
                   row_weights=x_TH if row_weights_R is None else row_weights_R.contiguous(),
                   grad_gate_up=grad_gate_up_RGI, weight_parts=parts, top_k=top_k,
                   stride_grad_R=grad_act_RI.stride(0), stride_grad_I=grad_act_RI.stride(1), FORM=form,
                   **gate_up_arguments(x_TH, w13_EGIH, w13_bias_EGI, tile))
    return grad_gate_up_RGI, parts.sum(1)
