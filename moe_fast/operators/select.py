"""moe_fast::select, from logits to expert ids and weights, and moe_fast::select_backward."""

from collections.abc import Mapping
from functools import cache

import torch

from moe_fast.kernels import select as kernels
from moe_fast.kernels.product import column_sums
from moe_fast.kernels.select_gradient import select_gradient
from moe_fast.operators.checks import check_dtypes, check_one_device, check_shapes
from moe_fast.operators.once import refuse_second_gradients
from moe_fast.operators.router_logits import FLOATING
from moe_ref.contract.errors import raise_faults
from moe_ref.contract.spec import Router

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

CHOICE = ("top_k", "selection_bias", "num_groups", "num_groups_kept", "group_score", "group_fill")
WEIGHTING = ("score", "logit_scale", "logit_softcap", "renormalize", "renormalize_epsilon", "epsilon_rule",
             "scaling_factor", "learned_scale")
"""Options of a Router in the order in which operators take them."""


def select_by(router: Router, logits_TE: torch.Tensor, shared_logits_TS: torch.Tensor | None,
              selection_bias_E: torch.Tensor | None, weight_scale_E: torch.Tensor | None) -> Three:
    """The operator with the options of `router`, but for its capacity."""
    return select(logits_TE, shared_logits_TS, selection_bias_E, weight_scale_E,
                  *(getattr(router, name) for name in (*CHOICE, *WEIGHTING)))


@torch.library.custom_op("moe_fast::select", mutates_args=())
def select(logits_TE: torch.Tensor, shared_logits_TS: torch.Tensor | None, selection_bias_E: torch.Tensor | None,
           weight_scale_E: torch.Tensor | None, top_k: int, selection_bias: str | None, num_groups: int,
           num_groups_kept: int, group_score: str, group_fill: str, score: str, logit_scale: float,
           logit_softcap: float, renormalize: bool, renormalize_epsilon: float, epsilon_rule: str,
           scaling_factor: float, learned_scale: str | None) -> Three:
    """ids_TK (int32), weights_TK and shared_TS (fp32) of fp32 logits.

    shared_logits_TS: of the router's further columns, whose scores take part in the renormalisation; without them
    shared_TS is (T, 0). weight_scale_E: (E,), or (1,) for the layer. The options are those of
    moe_ref.contract.spec.Router. Raises UsageValueError / UsageTypeError on wrong shapes, dtypes or options.
    """
    options = (top_k, selection_bias, num_groups, num_groups_kept, group_score, group_fill, score, logit_scale,
               logit_softcap, renormalize, renormalize_epsilon, epsilon_rule, scaling_factor, learned_scale)
    router = _check("moe_fast::select", logits_TE, shared_logits_TS, selection_bias_E, weight_scale_E, options)
    return kernels.select(logits_TE[None], shared_logits_TS, selection_bias_E, weight_scale_E, router)[:3]


@select.register_fake
def _(logits_TE: torch.Tensor, shared_logits_TS: torch.Tensor | None, selection_bias_E: torch.Tensor | None,
      weight_scale_E: torch.Tensor | None, top_k: int, *options: object) -> Three:
    _check("moe_fast::select", logits_TE, shared_logits_TS, selection_bias_E, weight_scale_E, (top_k, *options))
    num_tokens, num_shared = logits_TE.shape[0], 0 if shared_logits_TS is None else shared_logits_TS.shape[1]
    weights_TK = logits_TE.new_empty(num_tokens, top_k)
    return torch.empty_like(weights_TK, dtype=torch.int32), weights_TK, logits_TE.new_empty(num_tokens, num_shared)


@torch.library.custom_op("moe_fast::select_backward", mutates_args=())
def select_backward(grad_TK: torch.Tensor, grad_TS: torch.Tensor | None, logits_TE: torch.Tensor,
                    shared_logits_TS: torch.Tensor | None, weight_scale_E: torch.Tensor | None, ids_TK: torch.Tensor,
                    score: str, logit_scale: float, logit_softcap: float, renormalize: bool,
                    renormalize_epsilon: float, epsilon_rule: str, scaling_factor: float,
                    learned_scale: str | None) -> Three:
    """Gradients of logits_TE, shared_logits_TS (fp32) and weight_scale_E (in its dtype), for the ids (int32) selected.

    grad_TK, grad_TS: of weights_TK and shared_TS, fp32; the second goes with shared_logits_TS. Of a tensor that is not
    given the gradient has no elements. The choice itself, and so the selection bias and the groups, have none. Sums are
    in fp32 and in fixed order. Formulas: moe_ref.oracle.backward.weights. Raises UsageValueError / UsageTypeError on
    wrong shapes, dtypes or options.
    """
    options = (score, logit_scale, logit_softcap, renormalize, renormalize_epsilon, epsilon_rule, scaling_factor,
               learned_scale)
    router = _check_backward(grad_TK, grad_TS, logits_TE, shared_logits_TS, weight_scale_E, ids_TK, options)
    if grad_TS is None:
        grad_TS = grad_TK.new_empty(len(grad_TK), 0)
    grad_logits_TE, grad_columns_TS, parts = select_gradient(grad_TK, grad_TS, logits_TE, shared_logits_TS,
                                                             weight_scale_E, ids_TK, router)
    scale_E = logits_TE.new_empty(0) if weight_scale_E is None else column_sums(parts, weight_scale_E.dtype)
    return grad_logits_TE, grad_columns_TS, scale_E


@select_backward.register_fake
def _(grad_TK: torch.Tensor, grad_TS: torch.Tensor | None, logits_TE: torch.Tensor,
      shared_logits_TS: torch.Tensor | None, weight_scale_E: torch.Tensor | None, ids_TK: torch.Tensor,
      *options: object) -> Three:
    _check_backward(grad_TK, grad_TS, logits_TE, shared_logits_TS, weight_scale_E, ids_TK, options)
    scale_E = logits_TE.new_empty(0) if weight_scale_E is None else weight_scale_E.new_empty(weight_scale_E.shape)
    shape_TS = (logits_TE.shape[0], 0) if grad_TS is None else grad_TS.shape
    return logits_TE.new_empty(logits_TE.shape), logits_TE.new_empty(shape_TS), scale_E


def _setup_context(ctx, inputs: tuple, output: Three) -> None:
    logits_TE, shared_logits_TS, _, weight_scale_E, *options = inputs
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(logits_TE, shared_logits_TS, weight_scale_E, output[0])
    ctx.options = options[len(CHOICE):]


def _backward(ctx, grad_ids: torch.Tensor | None, grad_TK: torch.Tensor, grad_TS: torch.Tensor):
    has_shared, has_scale = (ctx.saved_tensors[place] is not None for place in (1, 2))
    # Autograd makes zeros for a result without columns: plain ones, also where all others are DTensors.
    given_TS = grad_TS if has_shared else None
    logits_TE, shared_logits_TS, scale_E = select_backward(grad_TK, given_TS, *ctx.saved_tensors, *ctx.options)
    return (logits_TE, shared_logits_TS if has_shared else None, None, scale_E if has_scale else None,
            *(None,) * len(CHOICE + WEIGHTING))


select.register_autograd(_backward, setup_context=_setup_context)
select_backward.register_autograd(refuse_second_gradients)


@cache
def _router(num_experts: int, options: tuple) -> Router:
    """The options as a Router, which checks them."""
    return Router(num_experts=num_experts, **dict(zip((*CHOICE, *WEIGHTING), options, strict=True)))


def _check_backward(grad_TK: torch.Tensor, grad_TS: torch.Tensor | None, logits_TE: torch.Tensor,
                    shared_logits_TS: torch.Tensor | None, weight_scale_E: torch.Tensor | None, ids_TK: torch.Tensor,
                    options: tuple) -> Router:
    operator = "moe_fast::select_backward"
    tensors = {"logits_TE": logits_TE, "ids_TK": ids_TK, "grad_TK": grad_TK}
    check_shapes(operator, tensors, {})
    if (grad_TS is None) != (shared_logits_TS is None):
        raise_faults(operator, ["grad_TS and shared_logits_TS are given in part, but should be both or neither"])
    check_shapes(operator, {"shared_logits_TS": shared_logits_TS, "grad_TS": grad_TS}, {"T": logits_TE.shape[0]})
    check_one_device(operator, tensors | {"grad_TS": grad_TS})
    check_dtypes(operator, {"grad_TK": grad_TK, "grad_TS": grad_TS}, (torch.float32,))
    check_dtypes(operator, {"ids_TK": ids_TK}, (torch.int32,))
    return _check(operator, logits_TE, shared_logits_TS, None, weight_scale_E,
                  (int(ids_TK.shape[1]), None, 1, 1, "max", "minus_inf", *options))


def _check(operator: str, logits_TE: torch.Tensor, shared_logits_TS: torch.Tensor | None,
           selection_bias_E: torch.Tensor | None, weight_scale_E: torch.Tensor | None, options: tuple) -> Router:
    logits = {"logits_TE": logits_TE}
    check_dtypes(operator, logits, (torch.float32,))
    check_shapes(operator, logits, {})
    return check_selection(operator, logits, logits_TE.shape[1], shared_logits_TS, selection_bias_E, weight_scale_E,
                           options)


def check_selection(operator: str, leaders: Mapping[str, torch.Tensor], num_experts: int,
                    shared_logits_TS: torch.Tensor | None, selection_bias_E: torch.Tensor | None,
                    weight_scale_E: torch.Tensor | None, options: tuple) -> Router:
    """The options as a Router; leaders: what has the axes T and E that others should have.

    Raises UsageValueError / UsageTypeError on wrong shapes, devices, dtypes or options.
    """
    shared_logits = {"shared_logits_TS": shared_logits_TS}
    parameters = {"selection_bias_E": selection_bias_E, "weight_scale_E": weight_scale_E}
    check_shapes(operator, {**leaders, **shared_logits, "selection_bias_E": selection_bias_E}, {})
    # Axes of the router are never dynamic; int makes a plain number of one under torch.compile.
    router = _router(int(num_experts), options)
    check_shapes(operator, {"weight_scale_E": weight_scale_E},
                 {"E": 1 if router.learned_scale == "layer" else router.num_experts})
    check_one_device(operator, {**leaders, **shared_logits, **parameters})
    check_dtypes(operator, shared_logits, (torch.float32,))
    check_dtypes(operator, parameters, FLOATING)
    needed = {"selection_bias_E": router.selection_bias, "weight_scale_E": router.learned_scale}
    raise_faults(operator, [f"{name} is {'missing' if given is None else 'given'}, but the option is {needed[name]!r}"
                            for name, given in parameters.items() if (given is None) != (needed[name] is None)])
    return router
