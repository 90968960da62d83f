"""Gradients of grouped MLPs, routed or shared."""

from typing import NamedTuple

import torch

from moe_fast.kernels.act_gradient import act_gradient
from moe_fast.kernels.align import Alignment, align
from moe_fast.kernels.bias_gradient import bias_gradient, weighted_bias_gradient
from moe_fast.kernels.bias_product import bias_product
from moe_fast.kernels.row_gradient import row_gradient, row_gradient_tile
from moe_fast.kernels.weight_gradient import weight_gradient
from moe_fast.operators.arguments import GroupedMLP
from moe_fast.operators.rows import load_of


class MLPGradients(NamedTuple):
    """Of one grouped MLP; rows_RH of x in (token, slot) order, not yet summed over slots; no weights_TK: not wanted."""

    alignment: Alignment
    rows_RH: torch.Tensor
    weights_TK: torch.Tensor | None
    w13_EGIH: torch.Tensor
    w2_EHI: torch.Tensor
    w13_bias_EGI: torch.Tensor | None
    w2_bias_EH: torch.Tensor | None


def mlp_gradients(grad_TH: torch.Tensor, mlp: GroupedMLP, products_RGI: torch.Tensor | None) -> MLPGradients:
    """From that of the merged tokens; products_RGI: gate and up, where they were saved."""
    num_experts, top_k, x_TH = len(mlp.w13_EGIH), mlp.ids_TK.shape[1], mlp.x_TH
    load = load_of(mlp.ids_TK, num_experts)
    tile = row_gradient_tile(x_TH.device, x_TH.dtype, load, mlp.w13_EGIH)
    alignment = align(mlp.ids_TK, mlp.hosted_E, tile.block_m)
    grad_gate_up_RGI, weighted_act_RI, grad_weights_R = act_gradient(
        x_TH, grad_TH, mlp.w13_EGIH, mlp.w13_bias_EGI, mlp.w2_EHI, mlp.weights_TK.reshape(-1), alignment, top_k,
        mlp.form, load, products_RGI)
    rows_RH = row_gradient(grad_gate_up_RGI, mlp.w13_EGIH, alignment, tile)
    grad_w13_EGIH, grad_w2_EHI = torch.empty_like(mlp.w13_EGIH), torch.empty_like(mlp.w2_EHI)
    weight_gradient(grad_gate_up_RGI, x_TH, grad_w13_EGIH, alignment, top_k)
    # The same sum gives w2's with H as the features of the token, so that it is written through a transposed view.
    weight_gradient(weighted_act_RI[:, None], grad_TH, grad_w2_EHI.transpose(1, 2)[:, None], alignment, top_k)
    grad_w13_bias_EGI = grad_w2_bias_EH = None
    if mlp.w13_bias_EGI is not None:
        grad_w13_bias_EGI = bias_gradient(grad_gate_up_RGI, num_experts, alignment)
    if mlp.w2_bias_EH is not None:
        grad_w2_bias_EH = weighted_bias_gradient(grad_TH, mlp.output_weights_R, num_experts, alignment, top_k)
        if not mlp.form.weight_on_input:
            grad_weights_R = grad_weights_R + bias_product(grad_TH, mlp.w2_bias_EH, alignment.local_ids_R, top_k)
    return MLPGradients(alignment, rows_RH, grad_weights_R.view(mlp.ids_TK.shape), grad_w13_EGIH, grad_w2_EHI,
                      grad_w13_bias_EGI, grad_w2_bias_EH)
