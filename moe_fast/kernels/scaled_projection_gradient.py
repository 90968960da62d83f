"""Gradients of gate and up from that of the activation; gate and up are made again, from codes."""

import torch
import triton
import triton.language as tl

from moe_fast.form import Form
from moe_fast.kernels.activation import act_of, from_products, through_act
from moe_fast.kernels.align import Alignment
from moe_fast.kernels.grouped import block_rows, grouped_tile, launch_grouped
from moe_fast.kernels.round_rows import RoundedRows
from moe_fast.kernels.scaled import product_arguments
from moe_fast.kernels.scaled_gate_up import scaled_gate_up_products, without_weight
from moe_fast.tiles import Tile
from moe_ref.contract.encoded import Encoded


@triton.jit
def scaled_projection_gradient_kernel(
        codes, scales, w13, w13_scales, w13_bias, grad_act, act, grad_gate_up, sorted_rows, block_expert,
        block_row, block_row_end, block_count, hidden_size, intermediate_size, top_k, row_start, column_start,
        stride_scales_B, stride_w_E, stride_w_G, stride_w_I, stride_w_H, stride_s_E, stride_s_G, stride_s_I, stride_s_H,
        stride_bias_E, stride_bias_G, stride_bias_I, stride_grad_R, stride_grad_I, FORM: tl.constexpr,
        HAS_BIAS: tl.constexpr, GATHERED: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
        PERSISTENT: tl.constexpr):
    """grad_gate_up[position] = grad_act[row] through the activation, and act[position], as scaled_gate_up_kernel's.

    GATHERED: codes of rows lie by token, not position.
    """
    num_blocks, num_columns = tl.load(block_count), tl.cdiv(intermediate_size, BLOCK_I)
    for tile in tl.range(tl.program_id(0), num_blocks * num_columns, tl.num_programs(0), flatten=PERSISTENT):
        block, column = grouped_tile(tile, num_blocks, num_columns, GROUP)
        expert, position, in_rows, row = block_rows(sorted_rows, block_expert, block_row, block_row_end, block, BLOCK_M)
        source = row // top_k if GATHERED else position
        gate, up = scaled_gate_up_products(
            codes, scales, w13, w13_scales, source, in_rows, expert, column, hidden_size, intermediate_size,
            row_start, column_start, stride_scales_B, stride_w_E, stride_w_G, stride_w_I, stride_w_H, stride_s_E,
            stride_s_G, stride_s_I, stride_s_H, FORM.gated, SCALE_ROWS, SCALE_COLUMNS, BLOCK_M, BLOCK_I, BLOCK_H)
        i = column * BLOCK_I + tl.arange(0, BLOCK_I)
        in_columns = i < intermediate_size
        inside = in_rows[:, None] & in_columns[None, :]
        bias_at = w13_bias + expert.to(tl.int64) * stride_bias_E + i.to(tl.int64) * stride_bias_I
        gate, up = from_products(gate, up, 1.0, bias_at, stride_bias_G, in_columns, HAS_BIAS, FORM)
        kind = act.dtype.element_ty
        wide_position = position.to(tl.int64)[:, None]
        tl.store(act + wide_position * intermediate_size + i[None, :], act_of(gate, up, FORM).to(kind), mask=inside)
        grad_at = grad_act + row.to(tl.int64)[:, None] * stride_grad_R + i.to(tl.int64)[None, :] * stride_grad_I
        grad_gate, grad_up = through_act(tl.load(grad_at, mask=inside, other=0.0).to(tl.float32), gate, up, FORM)
        gate_at = grad_gate_up + wide_position * (intermediate_size * FORM.num_projections) + i[None, :]
        tl.store(gate_at, grad_gate.to(kind), mask=inside)
        if FORM.gated:
            tl.store(gate_at + intermediate_size, grad_up.to(kind), mask=inside)


def scaled_projection_gradient(grad_act_RI: torch.Tensor, rounded: RoundedRows, w13: Encoded,
                               w13_bias_EGI: torch.Tensor | None,
                               alignment: Alignment, top_k: int, form: Form,
                               tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """grad_gate_up_RGI and act_RI in expert order and the dtype of grad_act_RI, which is in (token, slot) order.

    rounded: rows of H codes, weighted where the form has the weight on the input. Rows of no expert at hand stay
    unwritten.
    """
    (num_rows, intermediate), num_parts, device = grad_act_RI.shape, w13.shape[1], grad_act_RI.device
    grad_gate_up_RGI = torch.empty(num_rows, num_parts, intermediate, dtype=grad_act_RI.dtype, device=device)
    act_RI = torch.empty(num_rows, intermediate, dtype=grad_act_RI.dtype, device=device)
    stride_E, stride_G, stride_I = (0, 0, 0) if w13_bias_EGI is None else w13_bias_EGI.stride()
    launch_grouped(scaled_projection_gradient_kernel, alignment, triton.cdiv(intermediate, tile.block_n), tile, device,
                   **product_arguments(rounded, w13, "w13"), w13_bias=act_RI if w13_bias_EGI is None else w13_bias_EGI,
                   HAS_BIAS=w13_bias_EGI is not None, grad_act=grad_act_RI, act=act_RI, grad_gate_up=grad_gate_up_RGI,
                   hidden_size=w13.shape[3], intermediate_size=intermediate, top_k=top_k,
                   GATHERED=rounded.by_token, FORM=without_weight(form),
                   stride_bias_E=stride_E, stride_bias_G=stride_G, stride_bias_I=stride_I,
                   stride_grad_R=grad_act_RI.stride(0), stride_grad_I=grad_act_RI.stride(1), BLOCK_I=tile.block_n,
                   BLOCK_H=tile.block_k)
    return grad_gate_up_RGI, act_RI
