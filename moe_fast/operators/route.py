"""moe_fast::route, the router's product and the selection of experts by it at once."""

import torch

from moe_fast.kernels import route as kernels
from moe_fast.operators.router_logits import check_product, router_logits_backward
from moe_fast.operators.select import CHOICE, WEIGHTING, check_selection, select_backward
from moe_ref.contract.spec import Router

Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def route_by(router: Router, x_TH: torch.Tensor, router_EH: torch.Tensor, router_bias_E: torch.Tensor | None,
             shared_logits_TS: torch.Tensor | None, selection_bias_E: torch.Tensor | None,
             weight_scale_E: torch.Tensor | None) -> Four:
    """The operator with the options of `router`, but for its capacity."""
    return route(x_TH, router_EH, router_bias_E, shared_logits_TS, selection_bias_E, weight_scale_E,
                 *(getattr(router, name) for name in (*CHOICE, *WEIGHTING)))


@torch.library.custom_op("moe_fast::route", mutates_args=())
def route(x_TH: torch.Tensor, router_EH: torch.Tensor, router_bias_E: torch.Tensor | None,
          shared_logits_TS: torch.Tensor | None, selection_bias_E: torch.Tensor | None,
          weight_scale_E: torch.Tensor | None, top_k: int, selection_bias: str | None, num_groups: int,
          num_groups_kept: int, group_score: str, group_fill: str, score: str, logit_scale: float,
          logit_softcap: float, renormalize: bool, renormalize_epsilon: float, epsilon_rule: str,
          scaling_factor: float, learned_scale: str | None) -> Four:
    """ids_TK (int32), weights_TK and shared_TS as of moe_fast::select, and the logits_TE that they follow, in fp32.

    logits_TE = x_TH @ router_EH^T + router_bias_E, accumulated in fp32. Raises UsageValueError / UsageTypeError on
    wrong shapes, dtypes or options.
    """
    options = (top_k, selection_bias, num_groups, num_groups_kept, group_score, group_fill, score, logit_scale,
               logit_softcap, renormalize, renormalize_epsilon, epsilon_rule, scaling_factor, learned_scale)
    given = x_TH, router_EH, router_bias_E, shared_logits_TS, selection_bias_E, weight_scale_E
    return kernels.route(*given, _check(*given, options))


@route.register_fake
def _(x_TH: torch.Tensor, router_EH: torch.Tensor, router_bias_E: torch.Tensor | None,
      shared_logits_TS: torch.Tensor | None, selection_bias_E: torch.Tensor | None,
      weight_scale_E: torch.Tensor | None, top_k: int, *options: object) -> Four:
    _check(x_TH, router_EH, router_bias_E, shared_logits_TS, selection_bias_E, weight_scale_E, (top_k, *options))
    num_tokens, num_shared = x_TH.shape[0], 0 if shared_logits_TS is None else shared_logits_TS.shape[1]
    weights_TK = x_TH.new_empty(num_tokens, top_k, dtype=torch.float32)
    return (torch.empty_like(weights_TK, dtype=torch.int32), weights_TK, weights_TK.new_empty(num_tokens, num_shared),
            weights_TK.new_empty(num_tokens, router_EH.shape[0]))


def _setup_context(ctx, inputs: tuple, output: Four) -> None:
    x_TH, router_EH, router_bias_E, shared_logits_TS, _, weight_scale_E, *options = inputs
    ctx.mark_non_differentiable(output[0])
    # Nobody may ask for the gradient of logits, and zeros of their size would be added in vain.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_TH, router_EH, router_bias_E, shared_logits_TS, weight_scale_E, output[0], output[3])
    ctx.options = options[len(CHOICE):]


def _backward(ctx, grad_ids: torch.Tensor | None, grad_TK: torch.Tensor | None, grad_TS: torch.Tensor | None,
              grad_TE: torch.Tensor | None):
    x_TH, router_EH, router_bias_E, shared_logits_TS, weight_scale_E, ids_TK, logits_TE = ctx.saved_tensors
    shared_TS = scale_E = None
    if grad_TK is not None or grad_TS is not None:
        if grad_TK is None:
            grad_TK = torch.zeros_like(ids_TK, dtype=torch.float32)
        if shared_logits_TS is None:
            grad_TS = None
        elif grad_TS is None:
            grad_TS = torch.zeros_like(shared_logits_TS)
        selected_TE, shared_TS, scale_E = select_backward(grad_TK, grad_TS, logits_TE, shared_logits_TS,
                                                          weight_scale_E, ids_TK, *ctx.options)
        grad_TE = selected_TE if grad_TE is None else selected_TE + grad_TE
    grads = router_logits_backward(grad_TE, x_TH, router_EH, router_bias_E)
    return (*grads[:2], None if router_bias_E is None else grads[2], None if shared_logits_TS is None else shared_TS,
            None, None if weight_scale_E is None else scale_E, *(None,) * len(CHOICE + WEIGHTING))


route.register_autograd(_backward, setup_context=_setup_context)


def _check(x_TH: torch.Tensor, router_EH: torch.Tensor, router_bias_E: torch.Tensor | None,
           shared_logits_TS: torch.Tensor | None, selection_bias_E: torch.Tensor | None,
           weight_scale_E: torch.Tensor | None, options: tuple) -> Router:
    operator = "moe_fast::route"
    check_product(operator, x_TH, router_EH, router_bias_E)
    return check_selection(operator, {"x_TH": x_TH, "router_EH": router_EH}, router_EH.shape[0], shared_logits_TS,
                           selection_bias_E, weight_scale_E, options)
