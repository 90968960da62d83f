"""Gate and up products of the routed rows, gathered inside the kernel; bias, weight and activation are fused."""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from moe_fast.form import Form
from moe_fast.kernels.activation import act_of, from_products
from moe_fast.kernels.align import Alignment
from moe_fast.kernels.described import weight_operand, weight_tile, weights_at
from moe_fast.kernels.grouped import block_rows, grouped_tile, launch_grouped
from moe_fast.tiles import Load, Tile, gemm_tile


@triton.jit
def gate_up_products(x, w13, token, expert, column, in_rows, hidden_size, intermediate_size, stride_x_T, stride_x_H,
                     stride_w_E, stride_w_G, stride_w_I, stride_w_H, GATED: tl.constexpr, LOADS: tl.constexpr,
                     BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr):
    """gate = x[token] @ w1^T and up = x[token] @ w3^T of one tile, in fp32; up is 0 without w3."""
    i = column * BLOCK_I + tl.arange(0, BLOCK_I)
    h = tl.arange(0, BLOCK_H)
    x_at = x + token.to(tl.int64)[:, None] * stride_x_T + h.to(tl.int64)[None, :] * stride_x_H
    w_at = weights_at(w13, expert, i, h, stride_w_E, stride_w_I, stride_w_H, LOADS)
    gate = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        in_hidden = start + h < hidden_size
        w_mask = in_hidden[:, None] & (i < intermediate_size)[None, :]
        x_tile = tl.load(x_at, mask=in_rows[:, None] & in_hidden[None, :], other=0.0)
        w1_tile = weight_tile(w13, w_at, w_mask, expert, 0, column * BLOCK_I, start, LOADS, BLOCK_I, BLOCK_H)
        if GATED:
            w3_tile = weight_tile(w13, w_at + stride_w_G, w_mask, expert, 1, column * BLOCK_I, start, LOADS, BLOCK_I,
                                  BLOCK_H)
        gate = tl.dot(x_tile, w1_tile, gate, input_precision="ieee")
        if GATED:
            up = tl.dot(x_tile, w3_tile, up, input_precision="ieee")
        x_at += BLOCK_H * stride_x_H
        w_at += BLOCK_H * stride_w_H
    return gate, up


@triton.jit
def gate_up_kernel(x, w13, w13_bias, row_weights, act, products, sorted_rows, block_expert, block_row, block_row_end,
                   block_count, hidden_size, intermediate_size, top_k, stride_x_T, stride_x_H, stride_w_E, stride_w_G,
                   stride_w_I, stride_w_H, stride_bias_E, stride_bias_G, stride_bias_I, FORM: tl.constexpr,
                   HAS_BIAS: tl.constexpr, SAVES: tl.constexpr, W13_LOADS: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr, PERSISTENT: tl.constexpr):
    """act[position] of gate = x[token] @ w1^T + b1 and up = x[token] @ w3^T + b3, made in fp32, rounded once.

    A weight on the input multiplies the products instead: the same sum, without rounding the rows of x again. SAVES:
    products[row] are those products as they are.
    """
    num_blocks, num_columns = tl.load(block_count), tl.cdiv(intermediate_size, BLOCK_I)
    for tile in tl.range(tl.program_id(0), num_blocks * num_columns, tl.num_programs(0), flatten=PERSISTENT):
        block, column = grouped_tile(tile, num_blocks, num_columns, GROUP)
        expert, position, in_rows, row = block_rows(sorted_rows, block_expert, block_row, block_row_end, block, BLOCK_M)
        gate, up = gate_up_products(x, w13, row // top_k, expert, column, in_rows, hidden_size, intermediate_size,
                                    stride_x_T, stride_x_H, stride_w_E, stride_w_G, stride_w_I, stride_w_H, FORM.gated,
                                    W13_LOADS, BLOCK_M, BLOCK_I, BLOCK_H)
        i = column * BLOCK_I + tl.arange(0, BLOCK_I)
        in_columns = i < intermediate_size
        inside = in_rows[:, None] & in_columns[None, :]
        if SAVES:
            products_at = products + row.to(tl.int64)[:, None] * (intermediate_size * FORM.num_projections) + i[None, :]
            tl.store(products_at, gate, mask=inside)
            if FORM.gated:
                tl.store(products_at + intermediate_size, up, mask=inside)
        weight = 1.0
        if FORM.weight_on_input:
            weight = tl.load(row_weights + row, mask=in_rows, other=0.0)[:, None]
        bias_at = w13_bias + expert.to(tl.int64) * stride_bias_E + i.to(tl.int64) * stride_bias_I
        gate, up = from_products(gate, up, weight, bias_at, stride_bias_G, in_columns, HAS_BIAS, FORM)
        act_at = act + position.to(tl.int64)[:, None] * intermediate_size + i[None, :]
        tl.store(act_at, act_of(gate, up, FORM).to(act.dtype.element_ty), mask=inside)


def gate_up_tile(device: torch.device, dtype: torch.dtype, load: Load, w13_EGIH: torch.Tensor, form: Form,
                 has_bias: bool) -> Tile:
    """The tile for as many accumulators as there are projections.

    Clamps and a weight on the input take registers at a tile's end, of which sm_100 has none to spare at the widest
    tile. Where that spills is no matter of reasoning: `moe-ref compile --models` says that a persistent program spills
    with a clamp alone, and one for each tile with a clamp and biases.
    """
    (_, num_parts, intermediate, hidden) = w13_EGIH.shape
    tile = gemm_tile(device, dtype, load, intermediate, hidden, accumulators=num_parts, kernel="gate_up")
    if device.type == "cpu":
        return tile
    columns = min(tile.block_n, 64) if form.weight_on_input else tile.block_n
    is_long = form.weight_on_input or (form.limit is not None and not has_bias)
    return replace(tile, block_n=columns, persistent=tile.persistent and not is_long)


def gate_up(x_TH: torch.Tensor, w13_EGIH: torch.Tensor, w13_bias_EGI: torch.Tensor | None,
            row_weights_R: torch.Tensor | None, alignment: Alignment, top_k: int, form: Form, tile: Tile,
            products_RGI: torch.Tensor | None = None) -> torch.Tensor:
    """act_RI in expert order and x's dtype; rows of ids outside [0, E) do not exist and stay unwritten.

    row_weights_R: fp32, in (token, slot) order, read where the form has the weight on the input. products_RGI: fp32,
    contiguous, in (token, slot) order; if given, gate and up before anything is added to them are written there.
    """
    intermediate = w13_EGIH.shape[2]
    act_RI = torch.empty(alignment.sorted_rows_R.numel(), intermediate, dtype=x_TH.dtype, device=x_TH.device)
    launch_grouped(gate_up_kernel, alignment, triton.cdiv(intermediate, tile.block_n), tile, x_TH.device, x=x_TH,
                   row_weights=x_TH if row_weights_R is None else row_weights_R.contiguous(), act=act_RI,
                   products=act_RI if products_RGI is None else products_RGI, SAVES=products_RGI is not None,
                   top_k=top_k, FORM=form, **gate_up_arguments(x_TH, w13_EGIH, w13_bias_EGI, tile))
    return act_RI


def gate_up_arguments(x_TH: torch.Tensor, w13_EGIH: torch.Tensor, w13_bias_EGI: torch.Tensor | None,
                      tile: Tile) -> dict[str, object]:
    """What of a launch the products of gate and up need, forward and backward.

    Without a bias another pointer stands in, and is not read.
    """
    w13, loads = weight_operand(w13_EGIH, tile)
    bias_strides = (0, 0, 0) if w13_bias_EGI is None else w13_bias_EGI.stride()
    return {"w13": w13, "W13_LOADS": loads, "hidden_size": w13_EGIH.shape[3], "intermediate_size": w13_EGIH.shape[2],
            "stride_x_T": x_TH.stride(0), "stride_x_H": x_TH.stride(1),
            **{f"stride_w_{axis}": stride for axis, stride in zip("EGIH", w13_EGIH.stride(), strict=True)},
            "w13_bias": x_TH if w13_bias_EGI is None else w13_bias_EGI, "HAS_BIAS": w13_bias_EGI is not None,
            **{f"stride_bias_{axis}": stride for axis, stride in zip("EGI", bias_strides, strict=True)},
            "BLOCK_I": tile.block_n, "BLOCK_H": tile.block_k}
