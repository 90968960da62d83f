"""The router backward: from gradients of routing weights and shared gates to those of router and tokens, in fp64.

    d_logits = through weights and scores (moe_ref.oracle.backward.weights)
    d_router = d_logits^T @ x        d_bias = sum over tokens of d_logits        d_x = d_logits @ router

The further columns for shared experts go the same way. A sigmoid gate v = sigmoid(x @ gate^T) has
d_l = v (1 - v) d_v. The selection bias only selects: it has no gradient.
"""

from dataclasses import replace

import torch

from moe_ref.contract.checks import check_logits
from moe_ref.contract.gradients import RouterGradients
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.weights import WeightSource, check_whole_parameters
from moe_ref.oracle import router as formula
from moe_ref.oracle.backward.weights import ScoreGradients, score_backward, weigh_backward


@torch.no_grad()
def route_backward(grad_weights_TK: torch.Tensor, grad_shared_TS: torch.Tensor | None, x_TH: torch.Tensor,
                   weights: WeightSource, spec: MoESpec, *,
                   logits_TE: torch.Tensor | None = None) -> RouterGradients:
    """Gradients through route(x_TH, weights, spec, logits_TE=...), from those of its weights_TK and shared_TS.

    All in fp64; every rank gets the same and no collective is called. Injected logits get their gradient and the
    router none. Raises what route raises.
    """
    check_whole_parameters(weights, spec)
    if spec.router is None:
        result = RouterGradients(x_TH=torch.zeros_like(x_TH, dtype=torch.float64))
    else:
        given_TE = logits_TE
        if logits_TE is None:
            logits_TE = formula.router_logits(x_TH, weights)
        check_logits(logits_TE, spec, len(x_TH))
        scores = _scores(grad_weights_TK, grad_shared_TS, x_TH, weights, spec, logits_TE.double())
        result = _linear(scores, x_TH.double(), weights, injected=given_TE is not None)
    if spec.shared is None or spec.shared.gate != "sigmoid" or grad_shared_TS is None:
        return result
    grad_x_TH, grad_gate_SH = shared_gates_backward(grad_shared_TS, x_TH, weights)
    return replace(result, x_TH=result.x_TH + grad_x_TH, shared_gate_SH=grad_gate_SH)


def shared_gates_backward(grad_shared_TS: torch.Tensor, x_TH: torch.Tensor,
                          weights: WeightSource) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the tokens (T, H) and of shared_gate_SH through sigmoid(x @ shared_gate^T)."""
    assert weights.shared_gate_SH is not None
    gate_SH = weights.shared_gate_SH.double()
    logits_TS = x_TH.double() @ gate_SH.T
    grad_TS = grad_shared_TS.double() * formula.sigmoid(logits_TS) * formula.sigmoid(-logits_TS)
    return grad_TS @ gate_SH, grad_TS.T @ x_TH.double()


def _scores(grad_weights_TK: torch.Tensor, grad_shared_TS: torch.Tensor | None, x_TH: torch.Tensor,
            weights: WeightSource, spec: MoESpec, logits_TE: torch.Tensor) -> ScoreGradients:
    """Gradients of both kinds of logits, in place of their scores, and of the learned scale."""
    router = spec.router
    assert router is not None
    score_TE = formula.score(logits_TE, router)
    ids_TK = formula.select(formula.selection_score(score_TE, logits_TE, weights.selection_bias_E, router), router)
    gated, no_columns = formula.router_gated(spec), torch.empty_like(score_TE[:, :0])
    shared_TS = formula.shared_scores(x_TH, weights, router) if gated else no_columns
    grad_columns_TS = grad_shared_TS if gated and grad_shared_TS is not None else torch.zeros_like(shared_TS)
    grads = weigh_backward(grad_weights_TK, grad_columns_TS, score_TE, ids_TK, router, weights.weight_scale_E,
                           shared_TS)
    columns_TS = grads.shared_TS
    if gated:
        assert weights.shared_gate_SH is not None
        columns_TS = score_backward(columns_TS, x_TH.double() @ weights.shared_gate_SH.double().T, router)
    return ScoreGradients(score_backward(grads.score_TE, logits_TE, router), columns_TS, grads.weight_scale_E)


def _linear(logits: ScoreGradients, x_TH: torch.Tensor, weights: WeightSource, injected: bool) -> RouterGradients:
    """From logits to the router, its further columns and the tokens."""
    grad_x_TH, router_EH, router_bias_E, shared_gate_SH = torch.zeros_like(x_TH), None, None, None
    if not injected:
        assert weights.router_EH is not None
        grad_x_TH = logits.score_TE @ weights.router_EH.double()
        router_EH = logits.score_TE.T @ x_TH
        router_bias_E = None if weights.router_bias_E is None else logits.score_TE.sum(0)
    if logits.shared_TS.shape[1]:
        assert weights.shared_gate_SH is not None
        grad_x_TH = grad_x_TH + logits.shared_TS @ weights.shared_gate_SH.double()
        shared_gate_SH = logits.shared_TS.T @ x_TH
    return RouterGradients(x_TH=grad_x_TH, logits_TE=logits.score_TE, router_EH=router_EH,
                           router_bias_E=router_bias_E, weight_scale_E=logits.weight_scale_E,
                           shared_gate_SH=shared_gate_SH)
