"""Gradients whose products take codes: both operands of each are rounded to e4m3 anew, along its sum.

    gradient of rows       rows along what came out, weights by columns
    gradient of a weight   both by columns of an expert's rows; the routing weight is in them
    routing weight         what it multiplied, made again, times the gradient of the result

Formulas: docs/backward.md, "Training in 8 bits".
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from moe_fast.form import Form
from moe_fast.kernels.align import Alignment, align
from moe_fast.kernels.bias_gradient import bias_gradient, weighted_bias_gradient
from moe_fast.kernels.round_columns import Places, places_of, round_columns
from moe_fast.kernels.round_matrix import rounded_columns, rounded_rows
from moe_fast.kernels.round_rows import RoundedRows, round_rows
from moe_fast.kernels.scaled import scaled_tile
from moe_fast.kernels.scaled_dot import scaled_dot
from moe_fast.kernels.scaled_down import scaled_down
from moe_fast.kernels.scaled_projection_gradient import scaled_projection_gradient
from moe_fast.kernels.scaled_weight_gradient import scaled_weight_gradient
from moe_fast.operators.arguments import GroupedMLP
from moe_fast.operators.fp8 import of_down
from moe_fast.operators.mlp_gradients import MLPGradients
from moe_fast.operators.rows import load_of
from moe_fast.tiles import Load, Tile
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.vocabulary import Scheme

Tensor = torch.Tensor


@dataclass(frozen=True)
class RoutedRows:
    """Rows by expert, and their weights in fp32 and (token, slot) order; None where nothing multiplies them."""

    ids_TK: Tensor
    alignment: Alignment
    places: Places
    num_experts: int
    block_m: int
    weights_R: Tensor | None = None

    @property
    def top_k(self) -> int:
        """Rows of a token."""
        return self.ids_TK.shape[1]

    @property
    def load(self) -> Load:
        """What tile sizes follow."""
        return load_of(self.ids_TK, self.num_experts)

    def tile(self, encoded: Encoded, accumulators: int = 1) -> Tile:
        """Of a product with these weights."""
        return scaled_tile(encoded.codes.device, self.load, encoded, accumulators, GRADIENT, self.block_m)

    def of_tokens(self, tokens_TN: Tensor, weights_R: Tensor | None = None) -> RoundedRows:
        """Codes of tokens; of weighted ones in expert order."""
        return round_rows(tokens_TN, Scheme.FP8_ROW, 0, None, self.alignment, self.top_k, weights_R)

    def of_sorted(self, rows_RN: Tensor) -> RoundedRows:
        """Codes of rows in expert order."""
        return round_rows(rows_RN, Scheme.FP8_ROW, 0, None, self.alignment)

    def product(self, rows: RoundedRows, encoded: Encoded, dtype: torch.dtype, weights_R: Tensor | None) -> Tensor:
        """rows @ encoded^T in (token, slot) order, times the weights."""
        return scaled_down(rows, dtype, encoded, None, weights_R, self.alignment, self.tile(encoded), self.top_k)

    def dot(self, rows: RoundedRows, encoded: Encoded, bias_EH: Tensor | None, tokens_TH: Tensor) -> Tensor:
        """(T, K) in fp32: tokens times rows @ encoded^T + bias; rows are in expert order."""
        found_R = scaled_dot(rows, encoded, bias_EH, tokens_TH, self.alignment, self.top_k, self.tile(encoded))
        return found_R.view(self.ids_TK.shape)

    def weight_gradient(self, rows_RN: Tensor, tokens_TH: Tensor, result_EGIH: Tensor) -> None:
        """Sums over rows, which are in expert order, times the tokens, which are weighted if anything is."""
        rows = round_columns(rows_RN, None, self.places, self.num_experts, self.alignment)
        tokens = round_columns(tokens_TH, self.weights_R, self.places, self.num_experts, self.alignment, self.top_k)
        scaled_weight_gradient(rows, tokens, result_EGIH, self.places)


GRADIENT = "scaled_gradient"
"""The kernel by whose name tables of tiles are asked for products of a backward pass."""


def rows_for(encoded: Encoded, accumulators: int, ids_TK: Tensor, hosted_E: Tensor,
             weights_R: Tensor | None) -> RoutedRows:
    """Rows in tiles as the product of `encoded` wants them; every other product takes the same alignment."""
    num_experts = len(hosted_E)
    tile = scaled_tile(encoded.codes.device, load_of(ids_TK, num_experts), encoded, accumulators, GRADIENT)
    alignment = align(ids_TK, hosted_E, tile.block_m)
    return RoutedRows(ids_TK, alignment, places_of(alignment, num_experts), num_experts, tile.block_m, weights_R)


class Projected(NamedTuple):
    """rows_RH of x in (token, slot) order; grad_gate_up_RGI and act_RI in expert order; weights_TK of the input's."""

    rows_RH: Tensor
    grad_gate_up_RGI: Tensor
    act_RI: Tensor
    w13_EGIH: Tensor
    weights_TK: Tensor | None


def through_gate_up(grad_act_RI: Tensor, x_TH: Tensor, w13_EGIH: Tensor, w13: Encoded, bias_EGI: Tensor | None,
                    form: Form, routed: RoutedRows) -> Projected:
    """Gradients behind the first product; grad_act_RI: in (token, slot) order. routed: weighted if the input is."""
    grad_gate_up_RGI, act_RI = scaled_projection_gradient(
        grad_act_RI, routed.of_tokens(x_TH, routed.weights_R), w13, bias_EGI, routed.alignment, routed.top_k, form,
        routed.tile(w13, projection_accumulators(w13_EGIH)))
    del grad_act_RI  # the largest of what is made on the way is freed as soon as it can be
    back, grads = rounded_columns(w13_EGIH), routed.of_sorted(grad_gate_up_RGI.flatten(1))
    rows_RH = routed.product(grads, back, x_TH.dtype, routed.weights_R)
    weights_TK = routed.dot(grads, back, None, x_TH) if form.weight_on_input else None
    del grads, back
    grad_w13_EGIH = torch.empty_like(w13_EGIH)
    routed.weight_gradient(grad_gate_up_RGI.flatten(1), x_TH, grad_w13_EGIH)
    return Projected(rows_RH, grad_gate_up_RGI, act_RI, grad_w13_EGIH, weights_TK)


def projection_accumulators(w13_EGIH: Tensor) -> int:
    """Gradients of gate and up are made beside their products."""
    return 2 * w13_EGIH.shape[1]


def through_down(grad_TH: Tensor, w2: Encoded, routed: RoutedRows) -> Tensor:
    """grad_act_RI in (token, slot) order, times the weights of the rows; w2: by columns."""
    return routed.product(routed.of_tokens(grad_TH), w2, grad_TH.dtype, routed.weights_R)


def of_down_weights(act_RI: Tensor, grad_TH: Tensor, w2_EHI: Tensor, routed: RoutedRows) -> Tensor:
    """Gradient of w2, from act_RI in expert order."""
    grad_w2_EHI = torch.empty_like(w2_EHI)
    # The features of the token are H, so that it is written through a transposed view.
    routed.weight_gradient(act_RI, grad_TH, grad_w2_EHI.transpose(1, 2)[:, None])
    return grad_w2_EHI


def of_output_weights(act_RI: Tensor, grad_TH: Tensor, w2_EHI: Tensor, bias_EH: Tensor | None,
                      routed: RoutedRows) -> Tensor:
    """Gradient (T, K) of weights that multiply rows of w2, from act_RI in expert order."""
    return routed.dot(routed.of_sorted(act_RI), of_down(w2_EHI), bias_EH, grad_TH)


def mlp_gradients_in_fp8(grad_TH: Tensor, mlp: GroupedMLP, is_weighted: bool = True) -> MLPGradients:
    """Of both products, as mlp_gradients; without weights, all of which are 1, there is no gradient of them."""
    form, num_experts, w13 = mlp.form, len(mlp.hosted_E), rounded_rows(mlp.w13_EGIH)
    weights_R = mlp.weights_TK.reshape(-1) if is_weighted else None
    after = rows_for(w13, projection_accumulators(mlp.w13_EGIH), mlp.ids_TK, mlp.hosted_E,
                     None if form.weight_on_input else weights_R)
    before = replace(after, weights_R=weights_R if form.weight_on_input else None)
    found = through_gate_up(through_down(grad_TH, rounded_columns(mlp.w2_EHI[:, None]), after), mlp.x_TH, mlp.w13_EGIH,
                            w13, mlp.w13_bias_EGI, form, before)
    weights_TK, bias_EGI, bias_EH = found.weights_TK, None, None
    if is_weighted and weights_TK is None:
        weights_TK = of_output_weights(found.act_RI, grad_TH, mlp.w2_EHI, mlp.w2_bias_EH, after)
    if mlp.w13_bias_EGI is not None:
        bias_EGI = bias_gradient(found.grad_gate_up_RGI, num_experts, after.alignment)
    if mlp.w2_bias_EH is not None:
        bias_EH = weighted_bias_gradient(grad_TH, after.weights_R, num_experts, after.alignment, after.top_k)
    return MLPGradients(after.alignment, found.rows_RH, weights_TK, found.w13_EGIH,
                        of_down_weights(found.act_RI, grad_TH, mlp.w2_EHI, after), bias_EGI, bias_EH)
