"""moe_fast::act_rows, the first half of the experts: gate, up and activation; and moe_fast::act_rows_backward."""

import torch

from moe_fast.form import parse_form
from moe_fast.kernels.align import align
from moe_fast.kernels.bias_gradient import bias_gradient
from moe_fast.kernels.combine import combine
from moe_fast.kernels.gate_up import gate_up, gate_up_tile
from moe_fast.kernels.order import order
from moe_fast.kernels.projection_gradient import projection_gradient
from moe_fast.kernels.round_matrix import rounded_rows
from moe_fast.kernels.row_gradient import row_gradient, row_gradient_tile
from moe_fast.kernels.take import take
from moe_fast.kernels.weight_gradient import weight_gradient
from moe_fast.operators.arguments import OPERANDS
from moe_fast.operators.checks import check_dtypes, check_shapes, check_words
from moe_fast.operators.encoded_act_rows import encoded_act_forward
from moe_fast.operators.fp8 import gate_up_in_fp8
from moe_fast.operators.fp8_gradients import projection_accumulators, rows_for, through_gate_up
from moe_fast.operators.once import refuse_second_gradients
from moe_fast.operators.rows import load_of
from moe_fast.tiles import gemm_tile
from moe_ref.contract.errors import raise_faults


@torch.library.custom_op("moe_fast::act_rows", mutates_args=())
def act_rows(x_TH: torch.Tensor, ids_TK: torch.Tensor, hosted_E: torch.Tensor, w13_EGIH: torch.Tensor, form: str,
             weights_TK: torch.Tensor | None = None, w13_bias_EGI: torch.Tensor | None = None,
             operands: str = "exact") -> torch.Tensor:
    """act_RI in x's dtype and (token, slot) order, R = T * K; zero for rows of no expert at hand.

    The arguments are those of moe_fast::experts; weights_TK are given where the form has them on the input. Products
    accumulate in fp32, rows are rounded once. Raises UsageValueError / UsageTypeError on wrong shapes, dtypes or words.
    """
    _check("moe_fast::act_rows", x_TH, ids_TK, hosted_E, w13_EGIH, form, weights_TK, w13_bias_EGI, operands)
    if operands == "fp8_row":
        return encoded_act_forward(gate_up_in_fp8(x_TH, ids_TK, hosted_E, w13_EGIH, form, weights_TK, w13_bias_EGI))
    top_k = ids_TK.shape[1]
    tile = gate_up_tile(x_TH.device, x_TH.dtype, load_of(ids_TK, len(w13_EGIH)), w13_EGIH, parse_form(form),
                        w13_bias_EGI is not None)
    alignment = align(ids_TK, hosted_E, tile.block_m)
    row_weights_R = None if weights_TK is None else weights_TK.reshape(-1)
    sorted_act_RI = gate_up(x_TH, w13_EGIH, w13_bias_EGI, row_weights_R, alignment, top_k, parse_form(form), tile)
    return take(sorted_act_RI, order(alignment)[1])


@act_rows.register_fake
def _(x_TH: torch.Tensor, ids_TK: torch.Tensor, hosted_E: torch.Tensor, w13_EGIH: torch.Tensor, form: str,
      weights_TK: torch.Tensor | None = None, w13_bias_EGI: torch.Tensor | None = None,
      operands: str = "exact") -> torch.Tensor:
    _check("moe_fast::act_rows", x_TH, ids_TK, hosted_E, w13_EGIH, form, weights_TK, w13_bias_EGI, operands)
    return x_TH.new_empty(ids_TK.shape[0] * ids_TK.shape[1], w13_EGIH.shape[2])


@torch.library.custom_op("moe_fast::act_rows_backward", mutates_args=())
def act_rows_backward(grad_RI: torch.Tensor, x_TH: torch.Tensor, ids_TK: torch.Tensor, hosted_E: torch.Tensor,
                      w13_EGIH: torch.Tensor, form: str, weights_TK: torch.Tensor | None = None,
                      w13_bias_EGI: torch.Tensor | None = None, operands: str = "exact",
                      ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x_TH, w13_EGIH, weights_TK and w13_bias_EGI from that of act_RI; sums in fp32 and in fixed order.

    Each has the shape and dtype of its tensor; of those that are not given, shape (0,). Rows between the products are
    rounded to x's dtype. Formulas: moe_ref.oracle.backward.mlp. Raises UsageValueError / UsageTypeError on wrong
    shapes, dtypes or words.
    """
    _check("moe_fast::act_rows_backward", x_TH, ids_TK, hosted_E, w13_EGIH, form, weights_TK, w13_bias_EGI, operands,
           grad_RI)
    row_weights_R = None if weights_TK is None else weights_TK.reshape(-1)
    if operands == "fp8_row":
        return _gradients_in_fp8(grad_RI, x_TH, ids_TK, hosted_E, w13_EGIH, form, row_weights_R, w13_bias_EGI)
    (num_experts, _, intermediate, hidden), top_k = w13_EGIH.shape, ids_TK.shape[1]
    load, device, dtype = load_of(ids_TK, num_experts), x_TH.device, x_TH.dtype
    first = gemm_tile(device, dtype, load, intermediate, hidden, accumulators=4, kernel="projection_gradient")
    second = row_gradient_tile(device, dtype, load, w13_EGIH, first.block_m)
    alignment = align(ids_TK, hosted_E, first.block_m)
    grad_gate_up_RGI, grad_weights_R = projection_gradient(grad_RI, x_TH, w13_EGIH, w13_bias_EGI, row_weights_R,
                                                           alignment, top_k, parse_form(form), first)
    rows_RH = row_gradient(grad_gate_up_RGI, w13_EGIH, alignment, second)
    grad_w13_EGIH, grad_bias_EGI = torch.empty_like(w13_EGIH), x_TH.new_empty(0)
    weight_gradient(grad_gate_up_RGI, x_TH, grad_w13_EGIH, alignment, top_k)
    if w13_bias_EGI is not None:
        grad_bias_EGI = bias_gradient(grad_gate_up_RGI, num_experts, alignment)
    grad_weights_TK = x_TH.new_empty(0) if weights_TK is None else grad_weights_R.view(ids_TK.shape)
    return combine(rows_RH, None, alignment.local_ids_R, *ids_TK.shape), grad_w13_EGIH, grad_weights_TK, grad_bias_EGI


def _gradients_in_fp8(grad_RI: torch.Tensor, x_TH: torch.Tensor, ids_TK: torch.Tensor, hosted_E: torch.Tensor,
                      w13_EGIH: torch.Tensor, form: str, row_weights_R: torch.Tensor | None,
                      w13_bias_EGI: torch.Tensor | None,
                      ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    w13 = rounded_rows(w13_EGIH)
    routed = rows_for(w13, projection_accumulators(w13_EGIH), ids_TK, hosted_E, row_weights_R)
    found = through_gate_up(grad_RI, x_TH, w13_EGIH, w13, w13_bias_EGI, parse_form(form), routed)
    grad_bias_EGI, alignment = x_TH.new_empty(0), routed.alignment
    if w13_bias_EGI is not None:
        grad_bias_EGI = bias_gradient(found.grad_gate_up_RGI, len(hosted_E), alignment)
    return (combine(found.rows_RH, None, alignment.local_ids_R, *ids_TK.shape), found.w13_EGIH,
            x_TH.new_empty(0) if found.weights_TK is None else found.weights_TK, grad_bias_EGI)


@act_rows_backward.register_fake
def _(grad_RI: torch.Tensor, x_TH: torch.Tensor, ids_TK: torch.Tensor, hosted_E: torch.Tensor,
      w13_EGIH: torch.Tensor, form: str, weights_TK: torch.Tensor | None = None,
      w13_bias_EGI: torch.Tensor | None = None, operands: str = "exact",
      ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check("moe_fast::act_rows_backward", x_TH, ids_TK, hosted_E, w13_EGIH, form, weights_TK, w13_bias_EGI, operands,
           grad_RI)
    return (x_TH.new_empty(x_TH.shape), torch.empty_like(w13_EGIH),
            x_TH.new_empty(0) if weights_TK is None else weights_TK.new_empty(weights_TK.shape),
            x_TH.new_empty(0) if w13_bias_EGI is None else w13_bias_EGI.new_empty(w13_bias_EGI.shape))


def _setup_context(ctx, inputs: tuple, output: torch.Tensor) -> None:
    *tensors, ctx.form, weights_TK, w13_bias_EGI, ctx.operands = inputs
    ctx.save_for_backward(*tensors, weights_TK, w13_bias_EGI)


def _backward(ctx, grad_RI: torch.Tensor):
    *tensors, weights_TK, w13_bias_EGI = ctx.saved_tensors
    found = act_rows_backward(grad_RI, *tensors, ctx.form, weights_TK, w13_bias_EGI, ctx.operands)
    return (found[0], None, None, found[1], None, None if weights_TK is None else found[2],
            None if w13_bias_EGI is None else found[3], None)


act_rows.register_autograd(_backward, setup_context=_setup_context)
act_rows_backward.register_autograd(refuse_second_gradients)


def _check(operator: str, x_TH: torch.Tensor, ids_TK: torch.Tensor, hosted_E: torch.Tensor, w13_EGIH: torch.Tensor,
           form: str, weights_TK: torch.Tensor | None, w13_bias_EGI: torch.Tensor | None,
           operands: str, grad_RI: torch.Tensor | None = None) -> None:
    parsed = parse_form(form)
    check_words(operator, {"operands": operands}, OPERANDS)
    if parsed.weight_on_input != (weights_TK is not None):
        raise_faults(operator, [f"weights_TK are {'not ' * (weights_TK is None)}given, but the form is {form!r}"])
    tensors = {"x_TH": x_TH, "ids_TK": ids_TK, "weights_TK": weights_TK, "hosted_E": hosted_E, "w13_EGIH": w13_EGIH,
               "w13_bias_EGI": w13_bias_EGI, "grad_RI": grad_RI}
    check_shapes(operator, tensors, {"G": parsed.num_projections}
                 | ({"R": ids_TK.numel()} if ids_TK.dim() == 2 else {}))
    check_dtypes(operator, {"w13_EGIH": w13_EGIH, "w13_bias_EGI": w13_bias_EGI, "grad_RI": grad_RI}, (x_TH.dtype,))
    check_dtypes(operator, {"weights_TK": weights_TK}, (torch.float32,))
    check_dtypes(operator, {"ids_TK": ids_TK}, (torch.int32, torch.int64))
    check_dtypes(operator, {"hosted_E": hosted_E}, (torch.int64,))
