"""Gradients at the activation: gate and up are made again or were saved, the gradient comes back through w2."""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from moe_fast.form import Form
from moe_fast.kernels.activation import act_of, from_products, through_act
from moe_fast.kernels.align import Alignment
from moe_fast.kernels.described import weight_operand, weight_tile, weights_at
from moe_fast.kernels.gate_up import gate_up_arguments
from moe_fast.kernels.grouped import block_rows, grouped_tile, launch_grouped
from moe_fast.tiles import Load, Tile, gemm_tile

TALL = 128
"""Rows of a tile whose accumulators leave few registers."""


@triton.jit
def three_products(x, grad, w13, w2, token, expert, column, in_rows, hidden_size, intermediate_size, stride_x_T,
                   stride_x_H, stride_grad_T, stride_grad_H, stride_w_E, stride_w_G, stride_w_I, stride_w_H,
                   stride_w2_E, stride_w2_H, stride_w2_I, GATED: tl.constexpr, SAVED: tl.constexpr,
                   W13_LOADS: tl.constexpr, W2_LOADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
                   BLOCK_H: tl.constexpr):
    """grad[token] @ w2, and unless they were SAVED gate and up of one tile, in one loop over H and in fp32."""
    i = column * BLOCK_I + tl.arange(0, BLOCK_I)
    h = tl.arange(0, BLOCK_H)
    wide_h, wide_token = h.to(tl.int64)[None, :], token.to(tl.int64)[:, None]
    x_at = x + wide_token * stride_x_T + wide_h * stride_x_H
    grad_at = grad + wide_token * stride_grad_T + wide_h * stride_grad_H
    w13_at = weights_at(w13, expert, i, h, stride_w_E, stride_w_I, stride_w_H, W13_LOADS)
    w2_at = weights_at(w2, expert, i, h, stride_w2_E, stride_w2_I, stride_w2_H, W2_LOADS)
    gate = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    grad_act = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        in_hidden = start + h < hidden_size
        row_mask = in_rows[:, None] & in_hidden[None, :]
        w_mask = in_hidden[:, None] & (i < intermediate_size)[None, :]
        if not SAVED:
            x_tile = tl.load(x_at, mask=row_mask, other=0.0)
            w1_tile = weight_tile(w13, w13_at, w_mask, expert, 0, column * BLOCK_I, start, W13_LOADS, BLOCK_I, BLOCK_H)
            gate = tl.dot(x_tile, w1_tile, gate, input_precision="ieee")
            if GATED:
                w3_tile = weight_tile(w13, w13_at + stride_w_G, w_mask, expert, 1, column * BLOCK_I, start, W13_LOADS,
                                      BLOCK_I, BLOCK_H)
                up = tl.dot(x_tile, w3_tile, up, input_precision="ieee")
        grad_tile = tl.load(grad_at, mask=row_mask, other=0.0)
        w2_tile = weight_tile(w2, w2_at, w_mask, expert, 0, column * BLOCK_I, start, W2_LOADS, BLOCK_I, BLOCK_H)
        grad_act = tl.dot(grad_tile, w2_tile, grad_act, input_precision="ieee")
        x_at += BLOCK_H * stride_x_H
        grad_at += BLOCK_H * stride_grad_H
        w13_at += BLOCK_H * stride_w_H
        w2_at += BLOCK_H * stride_w2_H
    return gate, up, grad_act


@triton.jit
def act_gradient_kernel(x, grad, w13, w13_bias, w2, row_weights, products, grad_gate_up, weighted_act, weight_parts,
                        sorted_rows, block_expert, block_row, block_row_end, block_count, hidden_size,
                        intermediate_size, top_k, stride_x_T, stride_x_H, stride_grad_T, stride_grad_H, stride_w_E,
                        stride_w_G, stride_w_I, stride_w_H, stride_bias_E, stride_bias_G, stride_bias_I, stride_w2_E,
                        stride_w2_H, stride_w2_I, FORM: tl.constexpr, HAS_BIAS: tl.constexpr, SAVED: tl.constexpr,
                        W13_LOADS: tl.constexpr, W2_LOADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
                        BLOCK_H: tl.constexpr, GROUP: tl.constexpr, PERSISTENT: tl.constexpr):
    """Gate and up of one tile of rows and columns I, made or read, and d = grad[token] @ w2, over H in fp32; then:

    grad_gate_up = weight d through the activation, weighted_act = weight act, weight_parts[row, tile] = sum of act d.
    A weight on the input: grad_gate_up = weight d through it, act unweighted, and of its own gradient the parts are the
    sums of the gradients of gate and up times the products that it multiplied.
    """
    num_blocks, num_columns = tl.load(block_count), tl.cdiv(intermediate_size, BLOCK_I)
    for tile in tl.range(tl.program_id(0), num_blocks * num_columns, tl.num_programs(0), flatten=PERSISTENT):
        block, column = grouped_tile(tile, num_blocks, num_columns, GROUP)
        expert, position, in_rows, row = block_rows(sorted_rows, block_expert, block_row, block_row_end, block, BLOCK_M)
        gate_product, up_product, grad_act = three_products(
            x, grad, w13, w2, row // top_k, expert, column, in_rows, hidden_size, intermediate_size, stride_x_T,
            stride_x_H, stride_grad_T, stride_grad_H, stride_w_E, stride_w_G, stride_w_I, stride_w_H, stride_w2_E,
            stride_w2_H, stride_w2_I, FORM.gated, SAVED, W13_LOADS, W2_LOADS, BLOCK_M, BLOCK_I, BLOCK_H)
        i = column * BLOCK_I + tl.arange(0, BLOCK_I)
        in_columns = i < intermediate_size
        inside = in_rows[:, None] & in_columns[None, :]
        wide_row = row.to(tl.int64)
        if SAVED:
            products_at = products + wide_row[:, None] * (intermediate_size * FORM.num_projections) + i[None, :]
            gate_product = tl.load(products_at, mask=inside, other=0.0)
            if FORM.gated:
                up_product = tl.load(products_at + intermediate_size, mask=inside, other=0.0)
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
        tl.store(weight_parts + wide_row * num_columns + column, tl.sum(part, axis=1), mask=in_rows)
        kind = weighted_act.dtype.element_ty
        wide_position = position.to(tl.int64)[:, None]
        tl.store(weighted_act + wide_position * intermediate_size + i[None, :], act.to(kind), mask=inside)
        gate_at = grad_gate_up + wide_position * (intermediate_size * FORM.num_projections) + i[None, :]
        tl.store(gate_at, grad_gate.to(kind), mask=inside)
        if FORM.gated:
            tl.store(gate_at + intermediate_size, grad_up.to(kind), mask=inside)


def three_product_tile(device: torch.device, dtype: torch.dtype, load: Load, out_features: int, in_features: int,
                       form: Form) -> Tile:
    """The tile for three accumulators and five operand tiles: more columns or stages would not fit on a GPU.

    Slopes of softcaps and clamps and a weight on the input take registers besides, and eight warps are more than 16
    rows keep busy. Persistent programs, which hold a tile's end beside the next one's start, would spill. Of a clamp
    `moe-ref compile --models` says that 64 columns spill where there are descriptors, and that 32 do on gfx942.
    """
    tile = gemm_tile(device, dtype, load, out_features, in_features, accumulators=4, kernel="act_gradient")
    if device.type == "cpu":
        return tile
    columns, is_tall = 64, tile.block_m >= TALL
    if form.gate_softcap or form.up_softcap:
        columns = 16 if is_tall else 32
    elif form.weight_on_input or (form.limit is not None and is_tall and tile.descriptors):
        columns = 32
    num_warps = min(tile.num_warps, 4) if tile.block_m == 16 else tile.num_warps
    return replace(tile, block_n=min(tile.block_n, columns), num_warps=num_warps, num_stages=2, persistent=False)


def act_gradient(x_TH: torch.Tensor, grad_TH: torch.Tensor, w13_EGIH: torch.Tensor, w13_bias_EGI: torch.Tensor | None,
                 w2_EHI: torch.Tensor, row_weights_R: torch.Tensor, alignment: Alignment, top_k: int, form: Form,
                 load: Load, products_RGI: torch.Tensor | None = None,
                 ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad_gate_up_RGI and weighted act_RI in expert order and x's dtype, and grad_weights_R (fp32).

    grad_weights_R, in (token, slot) order, is 0 where no expert at hand was chosen; the other rows stay unwritten. What
    the weight multiplies of w2's bias is no part of it. products_RGI: what gate_up saved; without it gate and up are
    made again, with the same bits.
    """
    row_weights_R = row_weights_R.contiguous()  # the kernel knows no stride of them
    num_rows, (_, num_parts, intermediate, hidden), device = row_weights_R.numel(), w13_EGIH.shape, x_TH.device
    tile = three_product_tile(device, x_TH.dtype, load, intermediate, hidden, form)
    grad_gate_up_RGI = torch.empty(num_rows, num_parts, intermediate, dtype=x_TH.dtype, device=device)
    weighted_act_RI = torch.empty(num_rows, intermediate, dtype=x_TH.dtype, device=device)
    num_columns = triton.cdiv(intermediate, tile.block_n)
    parts = torch.zeros(num_rows, num_columns, dtype=torch.float32, device=device)
    w2, w2_loads = weight_operand(w2_EHI.transpose(1, 2)[:, None], tile)
    launch_grouped(act_gradient_kernel, alignment, num_columns, tile, device, x=x_TH, grad=grad_TH, w2=w2,
                   W2_LOADS=w2_loads, row_weights=row_weights_R, products=parts if products_RGI is None else
                   products_RGI, SAVED=products_RGI is not None, grad_gate_up=grad_gate_up_RGI,
                   weighted_act=weighted_act_RI, weight_parts=parts, top_k=top_k, FORM=form,
                   **{f"stride_grad_{axis}": stride for axis, stride in zip("TH", grad_TH.stride(), strict=True)},
                   **{f"stride_w2_{axis}": stride for axis, stride in zip("EHI", w2_EHI.stride(), strict=True)},
                   **gate_up_arguments(x_TH, w13_EGIH, w13_bias_EGI, tile))
    return grad_gate_up_RGI, weighted_act_RI, parts.sum(1)
