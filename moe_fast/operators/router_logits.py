"""moe_fast::router_logits, the router's product, and moe_fast::router_logits_backward."""

import torch

from moe_fast.kernels.product import column_sums, product
from moe_fast.operators.checks import check_dtypes, check_one_device, check_shapes
from moe_fast.operators.once import refuse_second_gradients

FLOATING = (torch.float32, torch.float16, torch.bfloat16)
Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@torch.library.custom_op("moe_fast::router_logits", mutates_args=())
def router_logits(x_TH: torch.Tensor, router_EH: torch.Tensor, router_bias_E: torch.Tensor | None) -> torch.Tensor:
    """logits_TE = x_TH @ router_EH^T + router_bias_E, accumulated and returned in fp32.

    Raises UsageValueError / UsageTypeError on wrong shapes or dtypes.
    """
    check_product("moe_fast::router_logits", x_TH, router_EH, router_bias_E)
    return product(x_TH, router_EH, torch.float32, router_bias_E)


@router_logits.register_fake
def _(x_TH: torch.Tensor, router_EH: torch.Tensor, router_bias_E: torch.Tensor | None) -> torch.Tensor:
    check_product("moe_fast::router_logits", x_TH, router_EH, router_bias_E)
    return x_TH.new_empty(x_TH.shape[0], router_EH.shape[0], dtype=torch.float32)


@torch.library.custom_op("moe_fast::router_logits_backward", mutates_args=())
def router_logits_backward(grad_TE: torch.Tensor, x_TH: torch.Tensor, router_EH: torch.Tensor,
                           router_bias_E: torch.Tensor | None) -> Three:
    """Gradients of x_TH, router_EH and router_bias_E, each in its tensor's dtype, from that of the logits (fp32).

    Sums are in fp32 and in fixed order. Of a bias that is not given the gradient has shape (0,). Raises UsageValueError
    / UsageTypeError on wrong shapes or dtypes.
    """
    check_product("moe_fast::router_logits_backward", x_TH, router_EH, router_bias_E, grad_TE)
    grad_bias_E = x_TH.new_empty(0) if router_bias_E is None else column_sums(grad_TE, router_bias_E.dtype)
    return product(grad_TE, router_EH.T, x_TH.dtype), product(grad_TE.T, x_TH.T, router_EH.dtype), grad_bias_E


@router_logits_backward.register_fake
def _(grad_TE: torch.Tensor, x_TH: torch.Tensor, router_EH: torch.Tensor,
      router_bias_E: torch.Tensor | None) -> Three:
    check_product("moe_fast::router_logits_backward", x_TH, router_EH, router_bias_E, grad_TE)
    grad_bias_E = x_TH.new_empty(0) if router_bias_E is None else router_bias_E.new_empty(router_bias_E.shape)
    return x_TH.new_empty(x_TH.shape), router_EH.new_empty(router_EH.shape), grad_bias_E


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_TE: torch.Tensor):
    x_TH, router_EH, router_bias_E = router_logits_backward(grad_TE, *ctx.saved_tensors)
    return x_TH, router_EH, None if ctx.saved_tensors[2] is None else router_bias_E


router_logits.register_autograd(_backward, setup_context=_setup_context)
router_logits_backward.register_autograd(refuse_second_gradients)


def check_product(operator: str, x_TH: torch.Tensor, router_EH: torch.Tensor, router_bias_E: torch.Tensor | None,
                  grad_TE: torch.Tensor | None = None) -> None:
    """Raise UsageValueError / UsageTypeError on wrong shapes, devices or dtypes."""
    tensors = {"x_TH": x_TH, "router_EH": router_EH, "router_bias_E": router_bias_E}
    check_shapes(operator, tensors | {"grad_TE": grad_TE}, {})
    check_one_device(operator, tensors | {"grad_TE": grad_TE})
    check_dtypes(operator, tensors, FLOATING)
    check_dtypes(operator, {"grad_TE": grad_TE}, (torch.float32,))
