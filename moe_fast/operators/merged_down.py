"""moe_fast::merged_down, the second half of the experts: down product and merge; and moe_fast::merged_down_backward."""

from typing import NamedTuple

import torch

from moe_fast.kernels.align import align
from moe_fast.kernels.bias_gradient import weighted_bias_gradient
from moe_fast.kernels.bias_product import bias_product
from moe_fast.kernels.combine import combine
from moe_fast.kernels.down import down
from moe_fast.kernels.down_gradient import down_gradient
from moe_fast.kernels.order import order
from moe_fast.kernels.round_matrix import rounded_columns
from moe_fast.kernels.take import take
from moe_fast.kernels.weight_gradient import weight_gradient
from moe_fast.observe import record_codes
from moe_fast.operators.down_arguments import GroupedDown, MergedDownArguments
from moe_fast.operators.encoded_arguments import EncodedDown
from moe_fast.operators.encoded_down_arguments import EncodedDownArguments
from moe_fast.operators.encoded_family import encoded_down_rows
from moe_fast.operators.encoded_rows import EncodedDownRows
from moe_fast.operators.fp8 import down_in_fp8
from moe_fast.operators.fp8_gradients import of_down_weights, of_output_weights, rows_for, through_down
from moe_fast.operators.once import refuse_second_gradients
from moe_fast.operators.rows import load_of, sum_of_tokens
from moe_fast.tiles import gemm_tile
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Stage

Tensor = torch.Tensor
Nine = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("moe_fast::merged_down", mutates_args=())
def merged_down(act_RI: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, hosted_E: torch.Tensor,
                w2_EHI: torch.Tensor, shared_act_TI: torch.Tensor | None, shared_w2_HI: torch.Tensor | None,
                shared_gate_T1: torch.Tensor | None, w2_bias_EH: torch.Tensor | None = None,
                shared_w2_bias_H: torch.Tensor | None = None, output_bias_H: torch.Tensor | None = None,
                mean: bool = False, operands: str = "exact") -> torch.Tensor:
    """merged_TH in act's dtype: sum of weighted expert rows of act_RI, which is in (token, slot) order, R = T * K.

    Plus the shared expert's rows times its gate. The other arguments are those of moe_fast::experts. Products
    accumulate in fp32; down, shared and merged rows are rounded to act's dtype. Raises UsageValueError /
    UsageTypeError on wrong shapes or dtypes.
    """
    return merged_down_forward(MergedDownArguments(
        act_RI, ids_TK, weights_TK, hosted_E, w2_EHI, shared_act_TI, shared_w2_HI, shared_gate_T1, w2_bias_EH,
        shared_w2_bias_H, output_bias_H, mean, operands))


@merged_down.register_fake
def _(*arguments, **options) -> torch.Tensor:
    given = MergedDownArguments(*arguments, **options)
    given.check("moe_fast::merged_down")
    return given.act_RI.new_empty(given.ids_TK.shape[0], given.w2_EHI.shape[1])


def merged_down_forward(given: MergedDownArguments | EncodedDownArguments, trace: Trace | None = None) -> torch.Tensor:
    """What the operator runs, over encoded experts too; called by itself it shows its stages to a trace, and has no
    gradient.
    """
    given.check("moe_fast::merged_down" if isinstance(given, MergedDownArguments) else "moe_fast::encoded_merged_down")
    if isinstance(given, MergedDownArguments) and given.operands == "fp8_row":
        given = down_in_fp8(given)
    rows = _down_rows(given.routed(), trace is not None)
    alignment, down_RH = rows.alignment, rows.down_RH
    shared, shared_TH = given.shared(), None
    if shared is not None:
        shared_TH = _down_rows(shared).down_RH
    record_codes(trace, alignment, rows.codes)
    if trace is not None:
        trace.record(Stage.DOWN, down_RH.masked_fill(alignment.local_ids_R[:, None] < 0, 0.0))
        if shared_TH is not None:
            trace.record(Stage.SHARED, shared_TH)
    return combine(down_RH, shared_TH, alignment.local_ids_R, *given.ids_TK.shape, bias_H=given.output_bias_H,
                   mean=given.mean)


def _down_rows(rows: GroupedDown | EncodedDown, traced: bool = False) -> EncodedDownRows:
    """Weighted rows."""
    if isinstance(rows, EncodedDown):
        return encoded_down_rows(rows, traced)
    num_experts, hidden, intermediate = rows.w2_EHI.shape
    tile = gemm_tile(rows.act_RI.device, rows.act_RI.dtype, load_of(rows.ids_TK, num_experts), hidden, intermediate,
                     kernel="down")
    alignment = align(rows.ids_TK, rows.hosted_E, tile.block_m)
    sorted_act_RI = take(rows.act_RI, order(alignment)[0])
    return EncodedDownRows(alignment, down(sorted_act_RI, rows.w2_EHI, rows.w2_bias_EH, rows.weights_TK.reshape(-1),
                                           alignment, tile))


@torch.library.custom_op("moe_fast::merged_down_backward", mutates_args=())
def merged_down_backward(grad_TH: torch.Tensor, act_RI: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor,
                         hosted_E: torch.Tensor, w2_EHI: torch.Tensor, shared_act_TI: torch.Tensor | None,
                         shared_w2_HI: torch.Tensor | None, shared_gate_T1: torch.Tensor | None,
                         w2_bias_EH: torch.Tensor | None = None, shared_w2_bias_H: torch.Tensor | None = None,
                         output_bias_H: torch.Tensor | None = None, mean: bool = False,
                         operands: str = "exact") -> Nine:
    """Gradients of act_RI, weights_TK, w2_EHI, shared_act_TI, shared_w2_HI, shared_gate_T1, and of the biases.

    In the order of the operator's arguments, which follow grad_TH, the gradient of merged_TH. Each has the shape and
    dtype of its tensor; of those that are not given, shape (0,). Sums are in fp32 and in fixed order. Formulas:
    moe_ref.oracle.backward.mlp. Raises UsageValueError / UsageTypeError on wrong shapes or dtypes.
    """
    given = MergedDownArguments(act_RI, ids_TK, weights_TK, hosted_E, w2_EHI, shared_act_TI, shared_w2_HI,
                                shared_gate_T1, w2_bias_EH, shared_w2_bias_H, output_bias_H, mean, operands)
    given.check("moe_fast::merged_down_backward", grad_TH)
    part_TH, shared_rows = grad_TH * 0.5 if mean else grad_TH, given.shared()
    is_gated = shared_gate_T1 is not None
    routed = _gradients(part_TH, given.routed()) if operands == "exact" else _gradients_in_fp8(part_TH, given.routed())
    shared = None
    if shared_rows is not None:
        shared = _gradients(part_TH, shared_rows) if operands == "exact" else _gradients_in_fp8(part_TH, shared_rows,
                                                                                              is_gated)
    of_shared = (None,) * 4 if shared is None else (
        shared.act_RI, shared.w2_EHI[0], None if shared_gate_T1 is None else shared.weights_TK,
        None if shared.w2_bias_EH is None else shared.w2_bias_EH[0])
    found = (routed.act_RI, routed.weights_TK, routed.w2_EHI, *of_shared[:3], routed.w2_bias_EH, of_shared[3],
             None if output_bias_H is None else sum_of_tokens(grad_TH))
    return tuple(act_RI.new_empty(0) if one is None else one for one in found)  # type: ignore[return-value]


class _Gradients(NamedTuple):
    """Of one grouped down product; weights_TK None: not wanted."""

    act_RI: torch.Tensor
    weights_TK: torch.Tensor | None
    w2_EHI: torch.Tensor
    w2_bias_EH: torch.Tensor | None


def _gradients(grad_TH: torch.Tensor, rows: GroupedDown) -> _Gradients:
    (num_experts, hidden, intermediate), top_k = rows.w2_EHI.shape, rows.ids_TK.shape[1]
    tile = gemm_tile(rows.act_RI.device, rows.act_RI.dtype, load_of(rows.ids_TK, num_experts), intermediate, hidden,
                     accumulators=4, kernel="down_gradient")
    alignment, weights_R = align(rows.ids_TK, rows.hosted_E, tile.block_m), rows.weights_TK.reshape(-1)
    grad_act_RI, weighted_act_RI, grad_weights_R = down_gradient(grad_TH, rows.act_RI, rows.w2_EHI, weights_R,
                                                                 alignment, top_k, tile)
    grad_w2_EHI, grad_bias_EH = torch.empty_like(rows.w2_EHI), None
    # Of w2 the features of the token are H, so that its gradient is written through a transposed view.
    weight_gradient(weighted_act_RI[:, None], grad_TH, grad_w2_EHI.transpose(1, 2)[:, None], alignment, top_k)
    if rows.w2_bias_EH is not None:
        grad_bias_EH = weighted_bias_gradient(grad_TH, weights_R, num_experts, alignment, top_k)
        grad_weights_R = grad_weights_R + bias_product(grad_TH, rows.w2_bias_EH, alignment.local_ids_R, top_k)
    return _Gradients(grad_act_RI, grad_weights_R.view(rows.ids_TK.shape), grad_w2_EHI, grad_bias_EH)


def _gradients_in_fp8(grad_TH: torch.Tensor, rows: GroupedDown, is_weighted: bool = True) -> _Gradients:
    w2, bias_EH, weights_TK = rounded_columns(rows.w2_EHI[:, None]), None, None
    routed = rows_for(w2, 1, rows.ids_TK, rows.hosted_E, rows.weights_TK.reshape(-1) if is_weighted else None)
    grad_act_RI = through_down(grad_TH, w2, routed).masked_fill_(routed.alignment.local_ids_R[:, None] < 0, 0.0)
    sorted_act_RI = take(rows.act_RI, order(routed.alignment)[0])
    if rows.w2_bias_EH is not None:
        bias_EH = weighted_bias_gradient(grad_TH, routed.weights_R, len(rows.hosted_E), routed.alignment, routed.top_k)
    if is_weighted:
        weights_TK = of_output_weights(sorted_act_RI, grad_TH, rows.w2_EHI, rows.w2_bias_EH, routed)
    return _Gradients(grad_act_RI, weights_TK, of_down_weights(sorted_act_RI, grad_TH, rows.w2_EHI, routed), bias_EH)


@merged_down_backward.register_fake
def _(grad_TH: torch.Tensor, *arguments, **options) -> tuple[torch.Tensor, ...]:
    given = MergedDownArguments(*arguments, **options)
    given.check("moe_fast::merged_down_backward", grad_TH)

    def like(tensor: torch.Tensor | None) -> torch.Tensor:
        return grad_TH.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    def dense_like(tensor: torch.Tensor | None) -> torch.Tensor:
        return grad_TH.new_empty(0) if tensor is None else torch.empty_like(tensor)

    return (like(given.act_RI), like(given.weights_TK), dense_like(given.w2_EHI), like(given.shared_act_TI),
            dense_like(given.shared_w2_HI), like(given.shared_gate_T1), like(given.w2_bias_EH),
            like(given.shared_w2_bias_H), like(given.output_bias_H))


def _setup_context(ctx, inputs: tuple, output: torch.Tensor) -> None:
    *tensors, ctx.mean, ctx.operands = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_TH: torch.Tensor):
    given = merged_down_backward(grad_TH, *ctx.saved_tensors, ctx.mean, ctx.operands)
    found = dict(zip(GRADIENT_PLACES, given, strict=True))
    gradients = (found.get(place) if tensor is not None else None for place, tensor in enumerate(ctx.saved_tensors))
    return *gradients, None, None


GRADIENT_PLACES = (0, 2, 4, 5, 6, 7, 8, 9, 10)
"""Places among the arguments of what merged_down_backward returns gradients of, in its order."""

merged_down.register_autograd(_backward, setup_context=_setup_context)
merged_down_backward.register_autograd(refuse_second_gradients)
