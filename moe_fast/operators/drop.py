"""moe_fast::drop, a capacity: slots that exceed it leave, and moe_fast::drop_backward."""

from dataclasses import replace
from functools import cache

import torch

from moe_fast.kernels import drop as kernels
from moe_fast.kernels.drop_gradient import drop_gradient
from moe_fast.kernels.product import column_sums
from moe_fast.operators.checks import check_dtypes, check_one_device, check_shapes
from moe_fast.operators.once import refuse_second_gradients
from moe_fast.operators.router_logits import FLOATING
from moe_ref.contract.spec import Capacity, Router

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

CAPACITY = ("tokens", "factor", "priority", "sequence_length", "renormalize_after")
WEIGHTING = ("num_experts", "num_zero_experts", "top_k", "renormalize", "renormalize_epsilon", "epsilon_rule",
             "scaling_factor", "learned_scale")
"""Options of a Capacity and of a Router in the order in which operators take them."""


def before_drop(router: Router) -> Router:
    """What is selected by before a capacity: nothing is scaled yet, nor divided where that comes after it."""
    assert router.capacity is not None
    plain = replace(router, capacity=None, scaling_factor=1.0, learned_scale=None)
    return replace(plain, renormalize=False, epsilon_rule="add") if router.capacity.renormalize_after else plain


def drop_by(router: Router, ids_TK: torch.Tensor, scores_TK: torch.Tensor, shared_TS: torch.Tensor,
            weight_scale_E: torch.Tensor | None) -> Three:
    """The operator with the options of `router`, on what was selected by before_drop(router)."""
    after = router.capacity is not None and router.capacity.renormalize_after
    router = router if after else replace(router, renormalize=False, epsilon_rule="add")
    return drop(ids_TK, scores_TK, shared_TS, weight_scale_E, *(getattr(router.capacity, name) for name in CAPACITY),
                *(getattr(router, name) for name in WEIGHTING))


@torch.library.custom_op("moe_fast::drop", mutates_args=())
def drop(ids_TK: torch.Tensor, scores_TK: torch.Tensor, shared_TS: torch.Tensor, weight_scale_E: torch.Tensor | None,
         tokens: int | None, factor: float | None, priority: str, sequence_length: int | None,
         renormalize_after: bool, num_experts: int, num_zero_experts: int, top_k: int, renormalize: bool,
         renormalize_epsilon: float, epsilon_rule: str, scaling_factor: float, learned_scale: str | None) -> Three:
    """ids_TK (int32) with -1 for slots beyond their expert's capacity, weights_TK, 0 there, and shared_TS, in fp32.

    scores_TK, shared_TS: fp32, what is ranked by priority "weight", then renormalised over what is left, and scaled.
    Ids from num_experts on have no limit. The options are those of moe_ref.contract.spec.Capacity and Router. Raises
    UsageValueError / UsageTypeError on wrong shapes, dtypes or options.
    """
    router = _router((tokens, factor, priority, sequence_length, renormalize_after),
                     (num_experts, num_zero_experts, top_k, renormalize, renormalize_epsilon, epsilon_rule,
                      scaling_factor, learned_scale))
    _check("moe_fast::drop", ids_TK, scores_TK, shared_TS, weight_scale_E, router)
    return kernels.drop(ids_TK.contiguous(), scores_TK.contiguous(), shared_TS.contiguous(), weight_scale_E, router)


@drop.register_fake
def _(ids_TK: torch.Tensor, scores_TK: torch.Tensor, shared_TS: torch.Tensor, weight_scale_E: torch.Tensor | None,
      *options: object) -> Three:
    router = _router(options[:len(CAPACITY)], options[len(CAPACITY):])
    _check("moe_fast::drop", ids_TK, scores_TK, shared_TS, weight_scale_E, router)
    return ids_TK.new_empty(ids_TK.shape), scores_TK.new_empty(scores_TK.shape), shared_TS.new_empty(shared_TS.shape)


@torch.library.custom_op("moe_fast::drop_backward", mutates_args=())
def drop_backward(grad_TK: torch.Tensor, grad_TS: torch.Tensor, ids_TK: torch.Tensor, scores_TK: torch.Tensor,
                  shared_TS: torch.Tensor, weight_scale_E: torch.Tensor | None, num_experts: int,
                  num_zero_experts: int, top_k: int, renormalize: bool, renormalize_epsilon: float, epsilon_rule: str,
                  scaling_factor: float, learned_scale: str | None) -> Three:
    """Gradients of scores_TK, shared_TS (fp32) and weight_scale_E (in its dtype), for the ids_TK that were kept.

    grad_TK, grad_TS: of weights_TK and shared_TS, fp32. Of a scale that is not given the gradient has shape (0,). What
    was dropped has none. Sums are in fp32 and in fixed order. Formulas: moe_ref.oracle.backward.weights. Raises
    UsageValueError / UsageTypeError on wrong shapes, dtypes or options.
    """
    router = _router(None, (num_experts, num_zero_experts, top_k, renormalize, renormalize_epsilon, epsilon_rule,
                            scaling_factor, learned_scale))
    _check("moe_fast::drop_backward", ids_TK, scores_TK, shared_TS, weight_scale_E, router, grad_TK, grad_TS)
    grad_scores_TK, grad_scores_TS, parts = drop_gradient(grad_TK, grad_TS, ids_TK.contiguous(),
                                                          scores_TK.contiguous(), shared_TS.contiguous(),
                                                          weight_scale_E, router)
    scale_E = scores_TK.new_empty(0) if weight_scale_E is None else column_sums(parts, weight_scale_E.dtype)
    return grad_scores_TK, grad_scores_TS, scale_E


@drop_backward.register_fake
def _(grad_TK: torch.Tensor, grad_TS: torch.Tensor, ids_TK: torch.Tensor, scores_TK: torch.Tensor,
      shared_TS: torch.Tensor, weight_scale_E: torch.Tensor | None, *options: object) -> Three:
    _check("moe_fast::drop_backward", ids_TK, scores_TK, shared_TS, weight_scale_E, _router(None, options), grad_TK,
           grad_TS)
    scale_E = scores_TK.new_empty(0) if weight_scale_E is None else weight_scale_E.new_empty(weight_scale_E.shape)
    return scores_TK.new_empty(scores_TK.shape), shared_TS.new_empty(shared_TS.shape), scale_E


def _setup_context(ctx, inputs: tuple, output: Three) -> None:
    _, scores_TK, shared_TS, weight_scale_E, *options = inputs
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(output[0], scores_TK, shared_TS, weight_scale_E)
    ctx.options = options[len(CAPACITY):]


def _backward(ctx, grad_ids: torch.Tensor | None, grad_TK: torch.Tensor, grad_TS: torch.Tensor):
    scores_TK, shared_TS, scale_E = drop_backward(grad_TK, grad_TS, *ctx.saved_tensors, *ctx.options)
    has_scale = ctx.saved_tensors[3] is not None
    return None, scores_TK, shared_TS, scale_E if has_scale else None, *(None,) * len(CAPACITY + WEIGHTING)


drop.register_autograd(_backward, setup_context=_setup_context)
drop_backward.register_autograd(refuse_second_gradients)


@cache
def _router(capacity: tuple | None, weighting: tuple) -> Router:
    """The options as a Router, which checks them."""
    given = None if capacity is None else Capacity(**dict(zip(CAPACITY, capacity, strict=True)))
    return Router(capacity=given, **dict(zip(WEIGHTING, weighting, strict=True)))


def _check(operator: str, ids_TK: torch.Tensor, scores_TK: torch.Tensor, shared_TS: torch.Tensor,
           weight_scale_E: torch.Tensor | None, router: Router, grad_TK: torch.Tensor | None = None,
           grad_TS: torch.Tensor | None = None) -> None:
    numbers = {"scores_TK": scores_TK, "shared_TS": shared_TS, "grad_TK": grad_TK, "grad_TS": grad_TS}
    scale = {"weight_scale_E": weight_scale_E}
    check_shapes(operator, {"ids_TK": ids_TK} | numbers, {"K": router.top_k})
    check_shapes(operator, scale, {"E": 1 if router.learned_scale == "layer" else router.num_experts})
    check_one_device(operator, {"ids_TK": ids_TK} | numbers | scale)
    check_dtypes(operator, {"ids_TK": ids_TK}, (torch.int32,))
    check_dtypes(operator, numbers, (torch.float32,))
    check_dtypes(operator, scale, FLOATING)
