"""Grouped MLPs of 8-bit operands: encoded weights as they are, and rows rounded to codes before each product."""

import torch

from moe_fast.kernels.align import Alignment, align
from moe_fast.kernels.order import order
from moe_fast.kernels.round_rows import SIZES, RoundedRows, round_rows
from moe_fast.kernels.scaled import scaled_tile
from moe_fast.kernels.scaled_down import scaled_down
from moe_fast.kernels.scaled_gate_up import scaled_gate_up
from moe_fast.kernels.take import take
from moe_fast.operators.encoded_arguments import EncodedDown, EncodedGateUp, EncodedMLP
from moe_fast.operators.encoded_rows import EncodedActRows, EncodedDownRows, EncodedRows
from moe_fast.operators.rows import load_of
from moe_fast.tiles import Tile
from moe_ref.contract.encoded import Encoded

SCHEMES = tuple(SIZES)
"""Schemes whose weights are multiplied as codes."""


def scaled_mlp_rows(mlp: EncodedMLP, traced: bool = False) -> EncodedRows:
    """Both products: codes accumulate in fp32, block by block; rows are rounded to x's dtype, then to codes.

    traced: codes and scales of rows are returned too, which copies them.
    """
    first = scaled_act_rows(EncodedGateUp(mlp.x_TH, mlp.ids_TK, mlp.hosted_E, mlp.w13, mlp.form, mlp.weights_TK,
                                          mlp.w13_bias_EGI, mlp.w13_input_scale_E), traced)
    alignment, act_RI = first.alignment, first.act_RI
    tile = _down_tile(mlp.ids_TK, mlp.w2, _gate_up_tile(mlp.ids_TK, mlp.w13).block_m)
    rounded = round_rows(act_RI, mlp.w2.scheme, mlp.w2.column_start, mlp.w2_input_scale_E, alignment)
    down_RH = scaled_down(rounded, act_RI.dtype, mlp.w2, mlp.w2_bias_EH, mlp.output_weights_R, alignment, tile)
    return EncodedRows(alignment, act_RI, down_RH, first.permute_codes_RH, first.permute_scales_RQ,
                       *(_in_row_order(rounded, alignment) if traced else ()))


def scaled_act_rows(given: EncodedGateUp, traced: bool = False) -> EncodedActRows:
    """The first product; traced: as above."""
    tile, top_k, dtype = _gate_up_tile(given.ids_TK, given.w13), given.ids_TK.shape[1], given.x_TH.dtype
    alignment = align(given.ids_TK, given.hosted_E, tile.block_m)
    row_weights_R = None
    if given.form.weight_on_input and given.weights_TK is not None:
        row_weights_R = given.weights_TK.reshape(-1)
    rounded = round_rows(given.x_TH, given.w13.scheme, given.w13.column_start, given.w13_input_scale_E, alignment,
                         top_k, row_weights_R)
    act_RI = scaled_gate_up(rounded, dtype, given.w13, given.w13_bias_EGI, alignment, top_k, given.form, tile)
    if not traced:
        return EncodedActRows(alignment, act_RI)
    shown = _of_tokens(rounded, top_k) if rounded.by_token else _in_row_order(rounded, alignment)
    return EncodedActRows(alignment, act_RI, *shown)


def scaled_down_rows(given: EncodedDown, traced: bool = False) -> EncodedDownRows:
    """The second product; traced: as above."""
    tile, dtype = _down_tile(given.ids_TK, given.w2), given.act_RI.dtype
    alignment = align(given.ids_TK, given.hosted_E, tile.block_m)
    sorted_act_RI = take(given.act_RI, order(alignment)[0])
    rounded = round_rows(sorted_act_RI, given.w2.scheme, given.w2.column_start, given.w2_input_scale_E, alignment)
    down_RH = scaled_down(rounded, dtype, given.w2, given.w2_bias_EH, given.weights_TK.reshape(-1), alignment, tile)
    return EncodedDownRows(alignment, down_RH, *(_in_row_order(rounded, alignment) if traced else ()))


def _gate_up_tile(ids_TK: torch.Tensor, w13: Encoded) -> Tile:
    num_experts, num_parts = w13.shape[:2]
    return scaled_tile(w13.codes.device, load_of(ids_TK, num_experts), w13, num_parts, "scaled_gate_up")


def _down_tile(ids_TK: torch.Tensor, w2: Encoded, block_m: int | None = None) -> Tile:
    return scaled_tile(w2.codes.device, load_of(ids_TK, w2.shape[0]), w2, 1, "scaled_down", block_m)


def _of_tokens(rounded: RoundedRows, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of rows in (token, slot) order, from those of tokens."""
    codes_RK = rounded.codes_RK.view(torch.uint8).repeat_interleave(top_k, 0)
    return codes_RK.view(torch.float8_e4m3fn), rounded.scales_RB.repeat_interleave(top_k, 0)


def _in_row_order(rounded: RoundedRows, alignment: Alignment) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from rows in expert order; zeros for slots without an expert at hand."""
    place_R = order(alignment)[1]
    return take(rounded.codes_RK.view(torch.uint8), place_R).view(torch.float8_e4m3fn), take(rounded.scales_RB, place_R)
