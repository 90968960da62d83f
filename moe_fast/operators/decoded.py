"""Grouped MLPs whose weights are decoded to the tokens' dtype before a product: schemes that round weights alone."""

import torch

from moe_fast.kernels.align import align
from moe_fast.kernels.decoded_down import decoded_down
from moe_fast.kernels.decoded_gate_up import decoded_gate_up
from moe_fast.kernels.decoded_tile import decoded_gemm_tile
from moe_fast.kernels.order import order
from moe_fast.kernels.take import take
from moe_fast.operators.encoded_arguments import EncodedDown, EncodedGateUp, EncodedMLP
from moe_fast.operators.encoded_rows import EncodedActRows, EncodedDownRows, EncodedRows
from moe_fast.operators.rows import load_of
from moe_fast.tiles import Tile
from moe_ref.contract.encoded import Encoded


def decoded_mlp_rows(mlp: EncodedMLP) -> EncodedRows:
    """Both products, accumulated in fp32; decoded weights and rows are rounded to x's dtype."""
    tile = _gate_up_tile(mlp.x_TH, mlp.ids_TK, mlp.w13)
    alignment = align(mlp.ids_TK, mlp.hosted_E, tile.block_m)
    act_RI = decoded_gate_up(mlp.x_TH, mlp.w13, mlp.w13_bias_EGI, mlp.weights_TK.reshape(-1), alignment,
                             mlp.ids_TK.shape[1], mlp.form, tile)
    down_RH = decoded_down(act_RI, mlp.w2, mlp.w2_bias_EH, mlp.output_weights_R, alignment,
                           _down_tile(act_RI, mlp.ids_TK, mlp.w2, tile.block_m))
    return EncodedRows(alignment, act_RI, down_RH)


def decoded_act_rows(given: EncodedGateUp) -> EncodedActRows:
    """The first product."""
    tile = _gate_up_tile(given.x_TH, given.ids_TK, given.w13)
    alignment = align(given.ids_TK, given.hosted_E, tile.block_m)
    row_weights_R = None if given.weights_TK is None else given.weights_TK.reshape(-1)
    return EncodedActRows(alignment, decoded_gate_up(given.x_TH, given.w13, given.w13_bias_EGI, row_weights_R,
                                                     alignment, given.ids_TK.shape[1], given.form, tile))


def decoded_down_rows(given: EncodedDown) -> EncodedDownRows:
    """The second product."""
    tile = _down_tile(given.act_RI, given.ids_TK, given.w2)
    alignment = align(given.ids_TK, given.hosted_E, tile.block_m)
    sorted_act_RI = take(given.act_RI, order(alignment)[0])
    return EncodedDownRows(alignment, decoded_down(sorted_act_RI, given.w2, given.w2_bias_EH,
                                                   given.weights_TK.reshape(-1), alignment, tile))


def _gate_up_tile(x_TH: torch.Tensor, ids_TK: torch.Tensor, w13: Encoded) -> Tile:
    num_experts, num_parts, *_ = w13.shape
    return decoded_gemm_tile(x_TH.device, x_TH.dtype, load_of(ids_TK, num_experts), w13, accumulators=num_parts,
                             kernel="decoded_gate_up")


def _down_tile(act_RI: torch.Tensor, ids_TK: torch.Tensor, w2: Encoded, block_m: int | None = None) -> Tile:
    return decoded_gemm_tile(act_RI.device, act_RI.dtype, load_of(ids_TK, len(w2.codes)), w2, kernel="decoded_down",
                             block_m=block_m)
