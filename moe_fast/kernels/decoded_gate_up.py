"""Gate and up products of the routed rows with encoded weights, decoded in the kernel; the rest as in gate_up.py."""

import torch
import triton
import triton.language as tl

from moe_fast.form import Form
from moe_fast.kernels.activation import act_of, from_products
from moe_fast.kernels.align import Alignment
from moe_fast.kernels.decoded_tile import decoded_tile, encoded_operand, with_joined_scale
from moe_fast.kernels.grouped import block_rows, grouped_tile, launch_grouped
from moe_fast.tiles import Tile
from moe_ref.contract.encoded import Encoded


@triton.jit
def decoded_gate_up_kernel(x, codes, scales, zeros, groups, second, w13_bias, row_weights, act, sorted_rows,
                           block_expert, block_row, block_row_end, block_count, hidden_size, intermediate_size, top_k,
                           num_blocks_K, column_start, stride_x_T, stride_x_H, stride_w_E, stride_w_G, stride_w_I,
                           stride_w_H, stride_bias_E, stride_bias_G, stride_bias_I, FORM: tl.constexpr,
                           HAS_BIAS: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr, COLUMNS: tl.constexpr,
                           RUN: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_ORDER: tl.constexpr,
                           HAS_SECOND: tl.constexpr, HAS_TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
                           BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
                           PERSISTENT: tl.constexpr):
    """act[position] of gate = x[token] @ w1^T + b1 and up = x[token] @ w3^T + b3, made in fp32, rounded once."""
    dtype: tl.constexpr = x.dtype.element_ty
    num_blocks, num_columns = tl.load(block_count), tl.cdiv(intermediate_size, BLOCK_I)
    for tile in tl.range(tl.program_id(0), num_blocks * num_columns, tl.num_programs(0), flatten=PERSISTENT):
        block, column = grouped_tile(tile, num_blocks, num_columns, GROUP)
        expert, position, in_rows, row = block_rows(sorted_rows, block_expert, block_row, block_row_end, block, BLOCK_M)
        i, h = column * BLOCK_I + tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_H)
        in_columns = i < intermediate_size
        wide_i = i.to(tl.int64)
        x_at = x + (row // top_k).to(tl.int64)[:, None] * stride_x_T + h.to(tl.int64)[None, :] * stride_x_H
        codes_at = codes + expert.to(tl.int64) * stride_w_E + wide_i * stride_w_I
        matrix = expert.to(tl.int64) * FORM.num_projections
        blocks_at = (matrix * intermediate_size + wide_i) * num_blocks_K
        up_blocks_at = blocks_at + intermediate_size * num_blocks_K
        gate = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
        for start in range(0, hidden_size, BLOCK_H):
            in_hidden = start + h < hidden_size
            x_tile = tl.load(x_at, mask=in_rows[:, None] & in_hidden[None, :], other=0.0)
            w1_tile = decoded_tile(codes_at, scales, zeros, groups, matrix, blocks_at, in_columns, start, hidden_size,
                                   column_start, stride_w_H, dtype, CODES, SCALES, COLUMNS, RUN, HAS_ZEROS, HAS_ORDER,
                                   HAS_TAIL, BLOCK_I, BLOCK_H)
            gate = tl.dot(x_tile, w1_tile, gate, input_precision="ieee")
            if FORM.gated:
                w3_tile = decoded_tile(codes_at + stride_w_G, scales, zeros, groups, matrix + 1, up_blocks_at,
                                       in_columns, start, hidden_size, column_start, stride_w_H, dtype, CODES, SCALES,
                                       COLUMNS, RUN, HAS_ZEROS, HAS_ORDER, HAS_TAIL, BLOCK_I, BLOCK_H)
                up = tl.dot(x_tile, w3_tile, up, input_precision="ieee")
            x_at += BLOCK_H * stride_x_H
        gate = with_joined_scale(gate, scales, second, matrix, blocks_at, in_columns, COLUMNS, HAS_SECOND)
        if FORM.gated:
            up = with_joined_scale(up, scales, second, matrix + 1, up_blocks_at, in_columns, COLUMNS, HAS_SECOND)
        weight = 1.0
        if FORM.weight_on_input:
            weight = tl.load(row_weights + row, mask=in_rows, other=0.0)[:, None]
        bias_at = w13_bias + expert.to(tl.int64) * stride_bias_E + wide_i * stride_bias_I
        gate, up = from_products(gate, up, weight, bias_at, stride_bias_G, in_columns, HAS_BIAS, FORM)
        act_at = act + position.to(tl.int64)[:, None] * intermediate_size + i[None, :]
        tl.store(act_at, act_of(gate, up, FORM).to(dtype), mask=in_rows[:, None] & in_columns[None, :])


def decoded_gate_up(x_TH: torch.Tensor, w13: Encoded, w13_bias_EGI: torch.Tensor | None,
                    row_weights_R: torch.Tensor | None, alignment: Alignment, top_k: int, form: Form,
                    tile: Tile) -> torch.Tensor:
    """act_RI in expert order and x's dtype, of w13 with L = (E, G); the arguments are otherwise those of gate_up."""
    *_, intermediate, hidden = w13.shape
    act_RI = torch.empty(alignment.sorted_rows_R.numel(), intermediate, dtype=x_TH.dtype, device=x_TH.device)
    bias_strides = (0, 0, 0) if w13_bias_EGI is None else w13_bias_EGI.stride()
    launch_grouped(decoded_gate_up_kernel, alignment, triton.cdiv(intermediate, tile.block_n), tile, x_TH.device,
                   x=x_TH, **encoded_operand(w13, tile), act=act_RI,
                   row_weights=x_TH if row_weights_R is None else row_weights_R.contiguous(),
                   w13_bias=x_TH if w13_bias_EGI is None else w13_bias_EGI, HAS_BIAS=w13_bias_EGI is not None,
                   hidden_size=hidden, intermediate_size=intermediate, top_k=top_k, FORM=form,
                   stride_x_T=x_TH.stride(0), stride_x_H=x_TH.stride(1),
                   **{f"stride_w_{axis}": stride for axis, stride in zip("EGIH", w13.codes.stride(), strict=True)},
                   **{f"stride_bias_{axis}": stride for axis, stride in zip("EGI", bias_strides, strict=True)},
                   BLOCK_I=tile.block_n, BLOCK_H=tile.block_k)
    return act_RI
