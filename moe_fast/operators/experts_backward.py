"""moe_fast::experts_backward, the gradients of moe_fast::experts."""

import torch

from moe_fast.kernels.combine import combine
from moe_fast.operators.arguments import NAMES, ExpertsArguments
from moe_fast.operators.fp8_gradients import mlp_gradients_in_fp8
from moe_fast.operators.mlp_gradients import mlp_gradients
from moe_fast.operators.once import refuse_second_gradients
from moe_fast.operators.rows import sum_of_tokens
from moe_ref.contract.errors import raise_faults

Tensor = torch.Tensor
Twelve = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("moe_fast::experts_backward", mutates_args=())
def experts_backward(grad_TH: torch.Tensor, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor,
                     hosted_E: torch.Tensor, w13_EGIH: torch.Tensor, w2_EHI: torch.Tensor,
                     shared_w13_GIH: torch.Tensor | None, shared_w2_HI: torch.Tensor | None,
                     shared_gate_T1: torch.Tensor | None, form: str, shared_form: str,
                     w13_bias_EGI: torch.Tensor | None = None, w2_bias_EH: torch.Tensor | None = None,
                     shared_w13_bias_GI: torch.Tensor | None = None, shared_w2_bias_H: torch.Tensor | None = None,
                     output_bias_H: torch.Tensor | None = None, mean: bool = False,
                     operands: str = "exact", products_RGI: torch.Tensor | None = None,
                     shared_products_TGI: torch.Tensor | None = None) -> Twelve:
    """Gradients of x_TH, weights_TK, w13_EGIH, w2_EHI, shared_w13_GIH, shared_w2_HI, shared_gate_T1, and of the biases.

    In the order of the operator's arguments, which follow grad_TH, the gradient of its result in x's dtype. Each has
    the shape and dtype of its tensor; of those that are not given, shape (0,). Sums are in fp32 and in fixed order;
    rows between the products are rounded to x's dtype. products_RGI, shared_products_TGI: of moe_fast::saved_experts;
    without them gate and up are made again, with the same bits, and always where operands are rounded. Formulas:
    moe_ref.oracle.backward.layer. Raises UsageValueError / UsageTypeError on wrong shapes, dtypes or words.
    """
    given = ExpertsArguments(
        x_TH, ids_TK, weights_TK, hosted_E, w13_EGIH, w2_EHI, shared_w13_GIH, shared_w2_HI, shared_gate_T1, form,
        shared_form, w13_bias_EGI, w2_bias_EH, shared_w13_bias_GI, shared_w2_bias_H, output_bias_H, mean, operands)
    given.check("moe_fast::experts_backward")
    _check_gradient(grad_TH, x_TH)
    part_TH = grad_TH * 0.5 if mean else grad_TH
    shared_mlp, in_fp8, is_gated = given.shared(), operands == "fp8_row", shared_gate_T1 is not None
    routed = mlp_gradients_in_fp8(part_TH, given.routed()) if in_fp8 else mlp_gradients(part_TH, given.routed(),
                                                                                         products_RGI)
    shared = None
    if shared_mlp is not None:
        shared = mlp_gradients_in_fp8(part_TH, shared_mlp, is_gated) if in_fp8 else mlp_gradients(
            part_TH, shared_mlp, shared_products_TGI)
    grad_x_TH = combine(routed.rows_RH, None if shared is None else shared.rows_RH, routed.alignment.local_ids_R,
                        *ids_TK.shape)
    of_shared = (None,) * 4 if shared is None else [None if one is None else one[0] for one in shared[3:]]
    gate_T1 = None if shared is None or shared_gate_T1 is None else shared.weights_TK
    found = (grad_x_TH, routed.weights_TK, routed.w13_EGIH, routed.w2_EHI, *of_shared[:2], gate_T1,
             routed.w13_bias_EGI, routed.w2_bias_EH, *of_shared[2:],
             None if output_bias_H is None else sum_of_tokens(grad_TH))
    return tuple(x_TH.new_empty(0) if one is None else one for one in found)  # type: ignore[return-value]


@experts_backward.register_fake
def _(grad_TH: torch.Tensor, *arguments, products_RGI: torch.Tensor | None = None,
      shared_products_TGI: torch.Tensor | None = None, **options) -> tuple[torch.Tensor, ...]:
    given = ExpertsArguments(*arguments[:len(NAMES)], **options)
    given.check("moe_fast::experts_backward")
    _check_gradient(grad_TH, given.x_TH)

    def like(tensor: torch.Tensor | None) -> torch.Tensor:
        return given.x_TH.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    def dense_like(tensor: torch.Tensor | None) -> torch.Tensor:
        return given.x_TH.new_empty(0) if tensor is None else torch.empty_like(tensor)

    return (like(given.x_TH), like(given.weights_TK), dense_like(given.w13_EGIH), dense_like(given.w2_EHI),
            dense_like(given.shared_w13_GIH), dense_like(given.shared_w2_HI), like(given.shared_gate_T1),
            like(given.w13_bias_EGI), like(given.w2_bias_EH), like(given.shared_w13_bias_GI),
            like(given.shared_w2_bias_H), like(given.output_bias_H))


experts_backward.register_autograd(refuse_second_gradients)


def _check_gradient(grad_TH: torch.Tensor, x_TH: torch.Tensor) -> None:
    if grad_TH.shape != x_TH.shape or grad_TH.dtype != x_TH.dtype:
        raise_faults("moe_fast::experts_backward", [f"grad_TH: {tuple(grad_TH.shape)} {grad_TH.dtype}, but should be "
                                                    f"{tuple(x_TH.shape)} {x_TH.dtype} as x_TH"])
