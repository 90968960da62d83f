"""The layer backward: gradients of sum(grad_y * moe(...)) by written-out formulas, expert by expert, no autograd.

    for each expert e, rows = the (token, slot) pairs with ids[token, slot] == e:
        d_rows = weights * grad_y[token]               d_weights[token, slot] = sum over H of grad_y[token] * rows
        d_x[token] += through the expert               (weight on the input: d_in through it from grad_y, then
                                                        d_weights = sum over H of d_in * x, d_x += weights * d_in)
    identity experts: d_x += weights * grad_y,  d_weights = sum over H of grad_y * x
    shared expert: as an expert of weight 1, its gates likewise;  mean: grad_y / 2 for both parts
    d_residual = grad_y;  d_output_bias = sum over tokens of grad_y
    d_router, d_logits, further d_x: from d_weights (moe_ref.oracle.backward.router)

With tensor parallelism x, routing weights and gates meet every rank's shard, so the ranks' parts of their
gradients are added up: one all-reduce of T*H elements, one of T*K, with shared gates one of T*S, in this order.
All else is either a shard's own, or made of tensors that are complete on every rank (biases of w2 and of the
output, identity experts, the router), and needs no collective.
"""

from dataclasses import replace

import torch

from moe_ref.contract.checks import check_devices, check_groups, check_injected, check_routing, check_tokens
from moe_ref.contract.comm import Comm, Groups
from moe_ref.contract.dtypes import PLAIN_DTYPES
from moe_ref.contract.errors import UsageTypeError, UsageValueError
from moe_ref.contract.gradients import Gradients, OnExpert
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.weights import WeightSource, check_weights
from moe_ref.oracle.backward.experts import RoutedBackward
from moe_ref.oracle.backward.router import route_backward, shared_gates_backward
from moe_ref.oracle.backward.shared import shared_backward
from moe_ref.oracle.router import route, shared_gates


@torch.no_grad()
def moe_backward(grad_y_TH: torch.Tensor, x_TH: torch.Tensor, weights: WeightSource, spec: MoESpec,
                 parallel: Parallel | None = None, groups: Groups | None = None, *, routing: Routing | None = None,
                 logits_TE: torch.Tensor | None = None, on_expert: OnExpert | None = None) -> Gradients:
    """Gradients of sum(grad_y_TH * moe(x_TH, ...)) with respect to every input, in fp64.

    grad_y_TH (T, H), complete on every rank; the other arguments as in moe. An injected routing gets the gradient
    of its weights and the router none; injected logits get theirs. on_expert(e, gradients) receives the routed
    experts' own gradients in ascending order, zeros included, instead of the result. Raises UsageValueError /
    UsageTypeError as moe does, for a grad_y_TH of another shape or kind, and for another form of parallelism than one
    all-reduce over tp.
    """
    injected = routing is not None
    check_tokens(x_TH, spec, PLAIN_DTYPES, "moe_ref")
    parallel, groups = check_groups(parallel, groups)
    _check_form(parallel)
    check_weights(weights, spec, parallel, groups.rank)
    check_injected(routing, logits_TE)
    if routing is None:
        routing = route(x_TH, weights, spec, logits_TE=logits_TE)
    result = experts_backward(grad_y_TH, x_TH, routing, weights, spec, parallel, groups, on_expert=on_expert)
    result = replace(result, residual_TH=grad_y_TH.double())
    if injected:
        return result
    router = route_backward(result.weights_TK, result.shared_TS, x_TH, weights, spec, logits_TE=logits_TE)
    return replace(result, x_TH=result.x_TH + router.x_TH, logits_TE=router.logits_TE, router_EH=router.router_EH,
                   router_bias_E=router.router_bias_E, weight_scale_E=router.weight_scale_E,
                   shared_gate_SH=router.shared_gate_SH)


@torch.no_grad()
def experts_backward(grad_y_TH: torch.Tensor, x_TH: torch.Tensor, routing: Routing, weights: WeightSource,
                     spec: MoESpec, parallel: Parallel | None = None, groups: Groups | None = None, *,
                     on_expert: OnExpert | None = None) -> Gradients:
    """Gradients of sum(grad_y_TH * experts(x_TH, routing, ...)), in fp64, the routing held fixed.

    Where routing.shared_TS is not given, experts computes a sigmoid gate itself, and x_TH and shared_gate_SH get
    its gradient. A partial sum (reduce=False) has the same gradients: grad_y_TH is that of the complete sum.
    """
    check_tokens(x_TH, spec, PLAIN_DTYPES, "moe_ref")
    parallel, groups = check_groups(parallel, groups)
    _check_form(parallel)
    check_weights(weights, spec, parallel, groups.rank)
    check_routing(routing, spec, len(x_TH), "metadata")
    check_devices(x_TH, weights, routing, grad_y_TH)
    _check_gradient(grad_y_TH, x_TH)
    gate_TS = routing.shared_TS if routing.shared_TS is not None else shared_gates(x_TH, weights, spec)
    grad_y_TH, x64_TH = grad_y_TH.double(), x_TH.double()
    grad_merged_TH = grad_y_TH / 2 if spec.shared is not None and spec.shared.merge == "mean" else grad_y_TH
    routed = RoutedBackward(grad_merged_TH, x64_TH, routing, weights, spec, parallel, groups.tp)
    parameters = routed.run(on_expert)
    shared = shared_backward(grad_merged_TH, x64_TH, gate_TS, weights, spec, parallel, groups.tp)
    tp = groups.tp
    result = Gradients(
        x_TH=_complete(routed.partial_x_TH + shared.partial_x_TH, tp) + routed.whole_x_TH,
        weights_TK=_complete(routed.partial_weights_TK, tp) + routed.whole_weights_TK,
        shared_TS=None if shared.partial_gates_TS is None else _complete(shared.partial_gates_TS, tp),
        output_bias_H=None if weights.output_bias_H is None else grad_y_TH.sum(0),
        **parameters, **shared.parameters)
    if routing.shared_TS is None and result.shared_TS is not None:
        grad_x_TH, grad_gate_SH = shared_gates_backward(result.shared_TS, x_TH, weights)
        result = replace(result, x_TH=result.x_TH + grad_x_TH, shared_gate_SH=grad_gate_SH)
    return result


def _complete(partial: torch.Tensor, tp: Comm) -> torch.Tensor:
    """The sum over ranks."""
    return tp.all_reduce(partial) if tp.size > 1 else partial


def _check_form(parallel: Parallel) -> None:
    """Raise unless the layer is spread as the formulas are written."""
    if parallel != Parallel(tp=parallel.tp, splits=parallel.splits):
        raise UsageValueError(f"moe_backward: {parallel}, but the formulas are for ep=1, one all-reduce, "
                              "replicated tokens and a sharded shared expert; differentiate moe instead")


def _check_gradient(grad_y_TH: torch.Tensor, x_TH: torch.Tensor) -> None:
    if grad_y_TH.shape != x_TH.shape:
        raise UsageValueError(f"grad_y_TH: shape {tuple(grad_y_TH.shape)}, "
                              f"but should be {tuple(x_TH.shape)} as x_TH")
    if not grad_y_TH.dtype.is_floating_point:
        raise UsageTypeError(f"grad_y_TH: dtype {grad_y_TH.dtype}, but should be floating point")
