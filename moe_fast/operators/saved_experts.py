"""moe_fast::saved_experts: moe_fast::experts that also returns the products of gate and up for the backward pass."""

import torch

from moe_fast.operators.arguments import NAMES, ExpertsArguments
from moe_fast.operators.experts import GRADIENT_PLACES, Products, experts, experts_forward
from moe_fast.operators.experts_backward import experts_backward
from moe_fast.saving import saves

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def experts_by_choice(*values: object) -> torch.Tensor:
    """merged_TH by one operator or the other, whose arguments are the same but for operands, the last: rounded ones are
    not saved.
    """
    records = torch.is_grad_enabled() and any(isinstance(value, torch.Tensor) and value.requires_grad
                                              for value in values)
    if saves() and records and values[-1] == "exact":
        return saved_experts(*values[:-1])[0]
    return experts(*values)


@torch.library.custom_op("moe_fast::saved_experts", mutates_args=())
def saved_experts(x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, hosted_E: torch.Tensor,
                  w13_EGIH: torch.Tensor, w2_EHI: torch.Tensor, shared_w13_GIH: torch.Tensor | None,
                  shared_w2_HI: torch.Tensor | None, shared_gate_T1: torch.Tensor | None, form: str, shared_form: str,
                  w13_bias_EGI: torch.Tensor | None = None, w2_bias_EH: torch.Tensor | None = None,
                  shared_w13_bias_GI: torch.Tensor | None = None, shared_w2_bias_H: torch.Tensor | None = None,
                  output_bias_H: torch.Tensor | None = None, mean: bool = False) -> Three:
    """merged_TH of moe_fast::experts, which see, and products_RGI and shared_products_TGI in fp32.

    The products are those of x with w13, before bias, weight and activation; of rows of no expert at hand they are
    undefined, and without a shared expert the last has no elements.
    """
    given = ExpertsArguments(
        x_TH, ids_TK, weights_TK, hosted_E, w13_EGIH, w2_EHI, shared_w13_GIH, shared_w2_HI, shared_gate_T1, form,
        shared_form, w13_bias_EGI, w2_bias_EH, shared_w13_bias_GI, shared_w2_bias_H, output_bias_H, mean)
    given.check("moe_fast::saved_experts")
    products_RGI, shared_TGI = _empty_products(given)
    merged_TH = experts_forward(given, products=Products(products_RGI, None if shared_w13_GIH is None else shared_TGI))
    return merged_TH, products_RGI, shared_TGI


@saved_experts.register_fake
def _(*arguments, **options) -> Three:
    given = ExpertsArguments(*arguments, **options)
    given.check("moe_fast::saved_experts")
    return given.x_TH.new_empty(given.x_TH.shape), *_empty_products(given)


def _empty_products(given: ExpertsArguments) -> tuple[torch.Tensor, torch.Tensor]:
    (num_tokens, top_k), (_, num_parts, intermediate, _) = given.ids_TK.shape, given.w13_EGIH.shape
    shared_shape = (0,) if given.shared_w13_GIH is None else (num_tokens, *given.shared_w13_GIH.shape[:2])
    return (given.x_TH.new_empty(num_tokens * top_k, num_parts, intermediate, dtype=torch.float32),
            given.x_TH.new_empty(shared_shape, dtype=torch.float32))


def _setup_context(ctx, inputs: tuple, output: Three) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.plain = {place: value for place, value in enumerate(inputs) if isinstance(value, str | bool)}
    ctx.save_for_backward(*(None if place in ctx.plain else value for place, value in enumerate(inputs)), *output[1:])


def _backward(ctx, grad_TH: torch.Tensor | None, *of_products: torch.Tensor | None):
    *tensors, products_RGI, shared_TGI = ctx.saved_tensors
    if grad_TH is None:
        return (None,) * (len(NAMES) - 1)
    inputs = [ctx.plain.get(place, tensor) for place, tensor in enumerate(tensors)]
    gradients = experts_backward(grad_TH, *inputs, products_RGI=products_RGI,
                                 shared_products_TGI=None if shared_TGI.dim() == 1 else shared_TGI)
    found = dict(zip(GRADIENT_PLACES, gradients, strict=True))
    return tuple(found.get(place) if tensor is not None else None for place, tensor in enumerate(tensors))


saved_experts.register_autograd(_backward, setup_context=_setup_context)
