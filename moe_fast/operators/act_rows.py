"""moe_fast::act_rows, the first half of the experts: gate, up and activation; and moe_fast::act_rows_backward."""

import torch

from moe_fast.kernels.align import align
from moe_fast.kernels.combine import combine
from moe_fast.kernels.gate_up import gate_up
from moe_fast.kernels.order import order
from moe_fast.kernels.projection_gradient import projection_gradient
from moe_fast.kernels.row_gradient import row_gradient
from moe_fast.kernels.take import take
from moe_fast.kernels.weight_gradient import weight_gradient
from moe_fast.operators.checks import check_dtypes, check_shapes
from moe_fast.operators.once import refuse_second_gradients
from moe_fast.operators.rows import mean_rows
from moe_fast.tiles import gemm_tile


@torch.library.custom_op("moe_fast::act_rows", mutates_args=())
def act_rows(x_TH: torch.Tensor, ids_TK: torch.Tensor, hosted_E: torch.Tensor, w13_EGIH: torch.Tensor,
             activation: str) -> torch.Tensor:
    """act_RI in x's dtype and (token, slot) order, R = T * K; zero for rows of no expert at hand.

    The arguments are those of moe_fast::experts. Products accumulate in fp32, rows are rounded once. Raises
    UsageValueError / UsageTypeError on wrong shapes or dtypes.
    """
    _check("moe_fast::act_rows", x_TH, ids_TK, hosted_E, w13_EGIH)
    (num_experts, _, intermediate, hidden), top_k = w13_EGIH.shape, ids_TK.shape[1]
    tile = gemm_tile(x_TH.device, x_TH.dtype, mean_rows(ids_TK, num_experts), intermediate, hidden, accumulators=2)
    alignment = align(ids_TK, hosted_E, tile.block_m)
    sorted_act_RI = gate_up(x_TH, w13_EGIH, alignment, top_k, activation, tile)
    return take(sorted_act_RI, order(alignment)[1])


@act_rows.register_fake
def _(x_TH: torch.Tensor, ids_TK: torch.Tensor, hosted_E: torch.Tensor, w13_EGIH: torch.Tensor,
      activation: str) -> torch.Tensor:
    _check("moe_fast::act_rows", x_TH, ids_TK, hosted_E, w13_EGIH)
    return x_TH.new_empty(ids_TK.shape[0] * ids_TK.shape[1], w13_EGIH.shape[2])


@torch.library.custom_op("moe_fast::act_rows_backward", mutates_args=())
def act_rows_backward(grad_RI: torch.Tensor, x_TH: torch.Tensor, ids_TK: torch.Tensor, hosted_E: torch.Tensor,
                      w13_EGIH: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x_TH and w13_EGIH from that of act_RI, all in x's dtype; sums in fp32 and in fixed order.

    Rows between the products are rounded to x's dtype. Formulas: moe_ref.oracle.backward.mlp. Raises UsageValueError /
    UsageTypeError on wrong shapes or dtypes.
    """
    _check("moe_fast::act_rows_backward", x_TH, ids_TK, hosted_E, w13_EGIH, grad_RI)
    (num_experts, _, intermediate, hidden), top_k = w13_EGIH.shape, ids_TK.shape[1]
    rows_per_expert = mean_rows(ids_TK, num_experts)
    first = gemm_tile(x_TH.device, x_TH.dtype, rows_per_expert, intermediate, hidden, accumulators=4)
    second = gemm_tile(x_TH.device, x_TH.dtype, rows_per_expert, hidden, intermediate)
    assert first.block_m == second.block_m
    alignment = align(ids_TK, hosted_E, first.block_m)
    grad_gate_up_RGI = projection_gradient(grad_RI, x_TH, w13_EGIH, alignment, top_k, activation, first)
    rows_RH = row_gradient(grad_gate_up_RGI, w13_EGIH, alignment, second)
    grad_w13_EGIH = torch.empty_like(w13_EGIH)
    weight_gradient(grad_gate_up_RGI, x_TH, grad_w13_EGIH, alignment, top_k)
    return combine(rows_RH, None, alignment.local_ids_R, *ids_TK.shape), grad_w13_EGIH


@act_rows_backward.register_fake
def _(grad_RI: torch.Tensor, x_TH: torch.Tensor, ids_TK: torch.Tensor, hosted_E: torch.Tensor,
      w13_EGIH: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    _check("moe_fast::act_rows_backward", x_TH, ids_TK, hosted_E, w13_EGIH, grad_RI)
    return x_TH.new_empty(x_TH.shape), torch.empty_like(w13_EGIH)


def _setup_context(ctx, inputs: tuple, output: torch.Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_RI: torch.Tensor):
    grad_x_TH, grad_w13_EGIH = act_rows_backward(grad_RI, *ctx.saved_tensors, ctx.activation)
    return grad_x_TH, None, None, grad_w13_EGIH, None


act_rows.register_autograd(_backward, setup_context=_setup_context)
act_rows_backward.register_autograd(refuse_second_gradients)


def _check(operator: str, x_TH: torch.Tensor, ids_TK: torch.Tensor, hosted_E: torch.Tensor, w13_EGIH: torch.Tensor,
           grad_RI: torch.Tensor | None = None) -> None:
    tensors = {"x_TH": x_TH, "ids_TK": ids_TK, "hosted_E": hosted_E, "w13_EGIH": w13_EGIH, "grad_RI": grad_RI}
    check_shapes(operator, tensors, {"G": 2} | ({"R": ids_TK.numel()} if ids_TK.dim() == 2 else {}))
    check_dtypes(operator, {"w13_EGIH": w13_EGIH, "grad_RI": grad_RI}, (x_TH.dtype,))
    check_dtypes(operator, {"ids_TK": ids_TK}, (torch.int32, torch.int64))
    check_dtypes(operator, {"hosted_E": hosted_E}, (torch.int64,))
