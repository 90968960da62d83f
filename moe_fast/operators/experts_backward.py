"""moe_fast::experts_backward, the gradients of moe_fast::experts."""

from typing import NamedTuple

import torch

from moe_fast.kernels.act_gradient import act_gradient
from moe_fast.kernels.align import Alignment, align
from moe_fast.kernels.combine import combine
from moe_fast.kernels.row_gradient import row_gradient
from moe_fast.kernels.weight_gradient import weight_gradient
from moe_fast.operators.checks import check_experts
from moe_fast.operators.once import refuse_second_gradients
from moe_fast.operators.rows import every_token, mean_rows
from moe_fast.tiles import gemm_tile
from moe_ref.contract.errors import raise_faults

Seven = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@torch.library.custom_op("moe_fast::experts_backward", mutates_args=())
def experts_backward(grad_TH: torch.Tensor, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor,
                     hosted_E: torch.Tensor, w13_EGIH: torch.Tensor, w2_EHI: torch.Tensor,
                     shared_w13_GIH: torch.Tensor | None, shared_w2_HI: torch.Tensor | None,
                     shared_gate_T1: torch.Tensor | None, activation: str, shared_activation: str) -> Seven:
    """Gradients of x_TH, weights_TK, w13_EGIH, w2_EHI, shared_w13_GIH, shared_w2_HI and shared_gate_T1, in this order.

    grad_TH is that of the operator's result, in x's dtype; the other arguments are the operator's. Each gradient has
    the shape and dtype of its tensor; of those that are not given, shape (0,). Sums are in fp32 and in fixed order;
    rows between the products are rounded to x's dtype. Formulas: moe_ref.oracle.backward.layer. Raises UsageValueError
    / UsageTypeError on wrong shapes or dtypes.
    """
    check_experts("moe_fast::experts_backward", x_TH, ids_TK, weights_TK, hosted_E, w13_EGIH, w2_EHI, shared_w13_GIH,
                  shared_w2_HI, shared_gate_T1, activation, shared_activation)
    _check_gradient(grad_TH, x_TH)
    routed = _mlp_gradients(grad_TH, x_TH, ids_TK, weights_TK, hosted_E, w13_EGIH, w2_EHI, activation)
    shared = None
    if shared_w13_GIH is not None and shared_w2_HI is not None:
        shared = _mlp_gradients(grad_TH, x_TH, *every_token(x_TH, shared_gate_T1), shared_w13_GIH[None],
                                shared_w2_HI[None], shared_activation)
    grad_x_TH = combine(routed.rows_RH, None if shared is None else shared.rows_RH, routed.alignment.local_ids_R,
                        *ids_TK.shape)
    return (grad_x_TH, routed.weights_TK, routed.w13_EGIH, routed.w2_EHI,
            x_TH.new_empty(0) if shared is None else shared.w13_EGIH[0],
            x_TH.new_empty(0) if shared is None else shared.w2_EHI[0],
            x_TH.new_empty(0) if shared is None or shared_gate_T1 is None else shared.weights_TK)


class _Gradients(NamedTuple):
    """Of one grouped MLP; rows_RH of x in (token, slot) order, not yet summed over slots."""

    alignment: Alignment
    rows_RH: torch.Tensor
    weights_TK: torch.Tensor
    w13_EGIH: torch.Tensor
    w2_EHI: torch.Tensor


def _mlp_gradients(grad_TH: torch.Tensor, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor,
                   hosted_E: torch.Tensor, w13_EGIH: torch.Tensor, w2_EHI: torch.Tensor,
                   activation: str) -> _Gradients:
    (num_experts, _, intermediate, hidden), top_k = w13_EGIH.shape, ids_TK.shape[1]
    rows_per_expert = mean_rows(ids_TK, num_experts)
    tile = gemm_tile(x_TH.device, x_TH.dtype, rows_per_expert, hidden, intermediate)
    alignment = align(ids_TK, hosted_E, tile.block_m)
    grad_gate_up_RGI, weighted_act_RI, grad_weights_R = act_gradient(
        x_TH, grad_TH, w13_EGIH, w2_EHI, weights_TK.reshape(-1), alignment, top_k, activation, rows_per_expert)
    rows_RH = row_gradient(grad_gate_up_RGI, w13_EGIH, alignment, tile)
    grad_w13_EGIH, grad_w2_EHI = torch.empty_like(w13_EGIH), torch.empty_like(w2_EHI)
    weight_gradient(grad_gate_up_RGI, x_TH, grad_w13_EGIH, alignment, top_k)
    # The same sum gives w2's with H as the features of the token, so that it is written through a transposed view.
    weight_gradient(weighted_act_RI[:, None], grad_TH, grad_w2_EHI.transpose(1, 2)[:, None], alignment, top_k)
    return _Gradients(alignment, rows_RH, grad_weights_R.reshape(ids_TK.shape), grad_w13_EGIH, grad_w2_EHI)


@experts_backward.register_fake
def _(grad_TH: torch.Tensor, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor,
      hosted_E: torch.Tensor, w13_EGIH: torch.Tensor, w2_EHI: torch.Tensor, shared_w13_GIH: torch.Tensor | None,
      shared_w2_HI: torch.Tensor | None, shared_gate_T1: torch.Tensor | None, activation: str,
      shared_activation: str) -> Seven:
    check_experts("moe_fast::experts_backward", x_TH, ids_TK, weights_TK, hosted_E, w13_EGIH, w2_EHI, shared_w13_GIH,
                  shared_w2_HI, shared_gate_T1, activation, shared_activation)
    _check_gradient(grad_TH, x_TH)
    return (x_TH.new_empty(x_TH.shape), weights_TK.new_empty(weights_TK.shape), torch.empty_like(w13_EGIH),
            torch.empty_like(w2_EHI), x_TH.new_empty(0) if shared_w13_GIH is None else torch.empty_like(shared_w13_GIH),
            x_TH.new_empty(0) if shared_w2_HI is None else torch.empty_like(shared_w2_HI),
            x_TH.new_empty(0) if shared_gate_T1 is None else shared_gate_T1.new_empty(shared_gate_T1.shape))


experts_backward.register_autograd(refuse_second_gradients)


def _check_gradient(grad_TH: torch.Tensor, x_TH: torch.Tensor) -> None:
    if grad_TH.shape != x_TH.shape or grad_TH.dtype != x_TH.dtype:
        raise_faults("moe_fast::experts_backward", [f"grad_TH: {tuple(grad_TH.shape)} {grad_TH.dtype}, but should be "
                                                    f"{tuple(x_TH.shape)} {x_TH.dtype} as x_TH"])
