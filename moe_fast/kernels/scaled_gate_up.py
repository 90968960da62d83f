"""Gate and up products of codes, of rows that were rounded; scales, bias, weight and activation are fused."""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from moe_fast.form import Form
from moe_fast.kernels.activation import act_of, from_products
from moe_fast.kernels.align import Alignment
from moe_fast.kernels.described import weights_at
from moe_fast.kernels.grouped import block_rows, grouped_tile, launch_grouped
from moe_fast.kernels.round_rows import RoundedRows
from moe_fast.kernels.scaled import block_sum, codes_at, product_arguments, scales_of_columns, scales_of_rows
from moe_fast.tiles import Tile
from moe_ref.contract.encoded import Encoded


@triton.jit
def scaled_gate_up_products(codes, scales, w13, w13_scales, source, in_rows, expert, column, hidden_size,
                            intermediate_size, row_start, column_start, stride_scales_B, stride_w_E, stride_w_G,
                            stride_w_I, stride_w_H, stride_s_E, stride_s_G, stride_s_I, stride_s_H,
                            GATED: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
                            BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr):
    """Gate and up products of one tile, with all scales, in fp32; up is 0 without w3; source: where codes lie."""
    i = column * BLOCK_I + tl.arange(0, BLOCK_I)
    in_columns = i < intermediate_size
    h = tl.arange(0, BLOCK_H) - column_start
    x_at = codes_at(codes, source, h, hidden_size)
    w_at = weights_at(w13, expert, i, h, stride_w_E, stride_w_I, stride_w_H, "addresses")
    gate = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    for start in range(0, column_start + hidden_size, BLOCK_H):
        in_hidden = (h + start >= 0) & (h + start < hidden_size)
        w_mask = in_hidden[:, None] & in_columns[None, :]
        x_tile = tl.load(x_at, mask=in_rows[:, None] & in_hidden[None, :], other=0.0)
        gate_part = block_sum(x_tile, tl.load(w_at, mask=w_mask, other=0.0))
        if SCALE_COLUMNS != 0:
            row_scale = scales_of_rows(scales, source, in_rows, start // SCALE_COLUMNS, stride_scales_B)[:, None]
            w_scale = scales_of_columns(w13_scales, expert, column, start // SCALE_COLUMNS, intermediate_size,
                                        row_start, stride_s_E, stride_s_I, stride_s_H, SCALE_ROWS, BLOCK_I)
            gate_part = gate_part * row_scale * w_scale[None, :]
        gate += gate_part
        if GATED:
            up_part = block_sum(x_tile, tl.load(w_at + stride_w_G, mask=w_mask, other=0.0))
            if SCALE_COLUMNS != 0:
                w_scale = scales_of_columns(w13_scales + stride_s_G, expert, column, start // SCALE_COLUMNS,
                                            intermediate_size, row_start, stride_s_E, stride_s_I, stride_s_H,
                                            SCALE_ROWS, BLOCK_I)
                up_part = up_part * row_scale * w_scale[None, :]
            up += up_part
        x_at += BLOCK_H
        w_at += BLOCK_H * stride_w_H
    if SCALE_COLUMNS == 0:
        row_scale = scales_of_rows(scales, source, in_rows, 0, stride_scales_B)[:, None]
        w_scale = scales_of_columns(w13_scales, expert, column, 0, intermediate_size, row_start, stride_s_E,
                                    stride_s_I, stride_s_H, SCALE_ROWS, BLOCK_I)
        gate = gate * row_scale * w_scale[None, :]
        if GATED:
            w_scale = scales_of_columns(w13_scales + stride_s_G, expert, column, 0, intermediate_size, row_start,
                                        stride_s_E, stride_s_I, stride_s_H, SCALE_ROWS, BLOCK_I)
            up = up * row_scale * w_scale[None, :]
    return gate, up


@triton.jit
def scaled_gate_up_kernel(codes, scales, w13, w13_scales, w13_bias, act, sorted_rows, block_expert,
                          block_row, block_row_end, block_count, hidden_size, intermediate_size, top_k, row_start,
                          column_start, stride_scales_B, stride_w_E, stride_w_G, stride_w_I, stride_w_H, stride_s_E,
                          stride_s_G, stride_s_I, stride_s_H, stride_bias_E, stride_bias_G, stride_bias_I,
                          FORM: tl.constexpr, HAS_BIAS: tl.constexpr, GATHERED: tl.constexpr, SCALE_ROWS: tl.constexpr,
                          SCALE_COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
                          BLOCK_H: tl.constexpr, GROUP: tl.constexpr, PERSISTENT: tl.constexpr):
    """act[position] as gate_up_kernel's, of codes times scales; GATHERED: codes of rows lie by token, not position."""
    num_blocks, num_columns = tl.load(block_count), tl.cdiv(intermediate_size, BLOCK_I)
    for tile in tl.range(tl.program_id(0), num_blocks * num_columns, tl.num_programs(0), flatten=PERSISTENT):
        block, column = grouped_tile(tile, num_blocks, num_columns, GROUP)
        expert, position, in_rows, row = block_rows(sorted_rows, block_expert, block_row, block_row_end, block, BLOCK_M)
        source = row // top_k if GATHERED else position
        gate, up = scaled_gate_up_products(
            codes, scales, w13, w13_scales, source, in_rows, expert, column, hidden_size, intermediate_size, row_start,
            column_start, stride_scales_B, stride_w_E, stride_w_G, stride_w_I, stride_w_H, stride_s_E, stride_s_G,
            stride_s_I, stride_s_H, FORM.gated, SCALE_ROWS, SCALE_COLUMNS, BLOCK_M, BLOCK_I, BLOCK_H)
        i = column * BLOCK_I + tl.arange(0, BLOCK_I)
        in_columns = i < intermediate_size
        bias_at = w13_bias + expert.to(tl.int64) * stride_bias_E + i.to(tl.int64) * stride_bias_I
        gate, up = from_products(gate, up, 1.0, bias_at, stride_bias_G, in_columns, HAS_BIAS, FORM)
        act_at = act + position.to(tl.int64)[:, None] * intermediate_size + i[None, :]
        tl.store(act_at, act_of(gate, up, FORM).to(act.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


def without_weight(form: Form) -> Form:
    """The form behind a product whose rows were weighted before they were rounded."""
    return replace(form, weight_on_input=False)


def scaled_gate_up(rounded: RoundedRows, dtype: torch.dtype, w13: Encoded, w13_bias_EGI: torch.Tensor | None,
                   alignment: Alignment, top_k: int, form: Form,
                   tile: Tile) -> torch.Tensor:
    """act_RI in expert order and `dtype`; rows of ids without an expert at hand do not exist and stay unwritten.

    rounded: rows of H codes, weighted where the form has the weight on the input.
    """
    num_rows, (_, _, intermediate, hidden), device = alignment.sorted_rows_R.numel(), w13.shape, w13.codes.device
    act_RI = torch.empty(num_rows, intermediate, dtype=dtype, device=device)
    stride_E, stride_G, stride_I = (0, 0, 0) if w13_bias_EGI is None else w13_bias_EGI.stride()
    launch_grouped(scaled_gate_up_kernel, alignment, triton.cdiv(intermediate, tile.block_n), tile, device,
                   **product_arguments(rounded, w13, "w13"), w13_bias=act_RI if w13_bias_EGI is None else w13_bias_EGI,
                   HAS_BIAS=w13_bias_EGI is not None, act=act_RI,
                   hidden_size=hidden, intermediate_size=intermediate, top_k=top_k, GATHERED=rounded.by_token,
                   FORM=without_weight(form), stride_bias_E=stride_E, stride_bias_G=stride_G, stride_bias_I=stride_I,
                   BLOCK_I=tile.block_n, BLOCK_H=tile.block_k)
    return act_RI
