"""Routing weights backward: from gradients of the weights to those of the scores and of the logits, in fp64.

With scores s, selected ids, m_k = 1 for slots that are not dropped, c_k the scale of slot k, c the scale of shared
columns, h their scores:

    p_k = s_k / D      w_k = m_k c_k p_k      q = h / D      v = c q      D = sum of a_k s_k + sum of h + epsilon
    d_p_k = m_k c_k d_w_k       d_q = c d_v       d_D = -(sum of d_p_k p_k + sum of d_q q) / D
    d_s_k = d_p_k / D + a_k d_D                   d_h = d_q / D + d_D

a_k is m_k where the weights are renormalised over what is left, else 1. Without renormalisation D = 1 and d_D = 0;
d_D = 0 too for a token that lost every slot and has no shared column, and under the rule max(sum, epsilon) while
the sum is below epsilon.
Ids and drops are decisions: they have no gradient.
"""

from typing import NamedTuple

import torch

from moe_ref.contract.spec import Router
from moe_ref.oracle import router as formula
from moe_ref.oracle.backward.mlp import softcap_slope
from moe_ref.oracle.capacity import kept_slots


class ScoreGradients(NamedTuple):
    """Gradients of all scores (T, E + Z), of the shared columns' scores (T, S), and of the learned scale."""

    score_TE: torch.Tensor
    shared_TS: torch.Tensor
    weight_scale_E: torch.Tensor | None


@torch.no_grad()
def weigh_backward(grad_weights_TK: torch.Tensor, grad_shared_TS: torch.Tensor, score_TE: torch.Tensor,
                   ids_TK: torch.Tensor, router: Router, weight_scale_E: torch.Tensor | None,
                   shared_TS: torch.Tensor) -> ScoreGradients:
    """Gradients through router.weigh; ids_TK as selected, before any drop; S = 0 without shared columns."""
    score_TK, scaling = score_TE.gather(1, ids_TK), router.scaling_factor
    kept_TK, counted_TK = _kept_and_counted(score_TK, shared_TS, ids_TK, router)
    sum_T1 = torch.where(counted_TK, score_TK, 0.0).sum(-1, keepdim=True) + shared_TS.sum(-1, keepdim=True)
    weighs_T1 = kept_TK.any(-1, keepdim=True) | bool(shared_TS.shape[1])  # else nothing is left to divide
    divisor_T1 = torch.where(weighs_T1, divisor(sum_T1, router), 1.0)
    share_TK, shared_share_TS = score_TK / divisor_T1, shared_TS / divisor_T1
    grad_weights_TK = torch.where(kept_TK, grad_weights_TK.double(), 0.0) * scaling
    grad_shared_TS = grad_shared_TS.double() * scaling
    grad_scale_E = _scale_gradient(grad_weights_TK * share_TK, grad_shared_TS * shared_share_TS, ids_TK, router,
                                   weight_scale_E)
    if weight_scale_E is not None:
        scale_E = weight_scale_E.double()
        grad_weights_TK = grad_weights_TK * (scale_E if router.learned_scale == "layer" else scale_E[ids_TK])
        grad_shared_TS = grad_shared_TS * (scale_E if router.learned_scale == "layer" else 1.0)
    grad_divisor_T1 = -((grad_weights_TK * share_TK).sum(-1, keepdim=True)
                        + (grad_shared_TS * shared_share_TS).sum(-1, keepdim=True)) / divisor_T1
    grad_sum_T1 = torch.where(weighs_T1, grad_divisor_T1 * divisor_slope(sum_T1, router), 0.0)
    grad_TK = grad_weights_TK / divisor_T1 + counted_TK * grad_sum_T1
    grad_TE = torch.zeros_like(score_TE).scatter_add(1, ids_TK, grad_TK)
    return ScoreGradients(grad_TE, grad_shared_TS / divisor_T1 + grad_sum_T1, grad_scale_E)


def _kept_and_counted(score_TK: torch.Tensor, shared_TS: torch.Tensor, ids_TK: torch.Tensor,
                      router: Router) -> tuple[torch.Tensor, torch.Tensor]:
    """m and a: which slots have weight, and which scores are in the sum, (T, K) each."""
    everything_TK = torch.ones_like(ids_TK, dtype=torch.bool)
    if router.capacity is None:
        return everything_TK, everything_TK
    if router.capacity.renormalize_after:
        kept_TK = kept_slots(ids_TK, score_TK, router)
        return kept_TK, kept_TK
    sum_T1 = score_TK.sum(-1, keepdim=True) + shared_TS.sum(-1, keepdim=True)
    return kept_slots(ids_TK, score_TK / divisor(sum_T1, router), router), everything_TK


def divisor(sum_T1: torch.Tensor, router: Router) -> torch.Tensor:
    """D: what scores are divided by, given the sum of those that count."""
    if not router.renormalize:
        return torch.ones_like(sum_T1)
    epsilon = router.renormalize_epsilon
    return sum_T1 + epsilon if router.epsilon_rule == "add" else sum_T1.clamp(min=epsilon)


def divisor_slope(sum_T1: torch.Tensor, router: Router) -> torch.Tensor:
    """Derivative of D: 1, or 0 without renormalisation and below a clamp; 1 at the clamp's edge, as in torch."""
    if not router.renormalize:
        return torch.zeros_like(sum_T1)
    if router.epsilon_rule == "add":
        return torch.ones_like(sum_T1)
    return (sum_T1 >= router.renormalize_epsilon).double()


def _scale_gradient(slots_TK: torch.Tensor, shared_TS: torch.Tensor, ids_TK: torch.Tensor, router: Router,
                    weight_scale_E: torch.Tensor | None) -> torch.Tensor | None:
    """Of the learned scale, from d_w p and d_v q: their sum, or each expert's own."""
    if weight_scale_E is None:
        return None
    if router.learned_scale == "layer":
        return (slots_TK.sum() + shared_TS.sum()).reshape(1)
    return torch.zeros_like(weight_scale_E, dtype=torch.float64).index_add(0, ids_TK.flatten(), slots_TK.flatten())


@torch.no_grad()
def score_backward(grad_score_TE: torch.Tensor, logits_TE: torch.Tensor, router: Router) -> torch.Tensor:
    """Gradient of the logits, before their scale and cap, (T, E + Z), through router.score.

    z = cap * tanh(scale * l / cap) has slope scale * sech(scale * l / cap)^2. Then d_z of softmax is
    s_e (d_s_e - sum over j of s_j d_s_j), of sigmoid s (1 - s) d_s, of sqrt(softplus) sigmoid(z) / (2 s) d_s.
    """
    capped_TE, score_TE = formula.capped(logits_TE.double(), router), formula.score(logits_TE.double(), router)
    if router.score == "softmax":
        grad_TE = score_TE * (grad_score_TE - (score_TE * grad_score_TE).sum(-1, keepdim=True))
    elif router.score == "sigmoid":
        grad_TE = grad_score_TE * score_TE * formula.sigmoid(-capped_TE)
    else:
        # A score that underflows to 0 (z below -745) has a slope below 2^-537, but 0 / 0 would be NaN.
        grad_TE = grad_score_TE * torch.where(score_TE > 0, formula.sigmoid(capped_TE) / (2 * score_TE), 0.0)
    if router.logit_softcap:
        grad_TE = grad_TE * softcap_slope(logits_TE.double() * router.logit_scale, router.logit_softcap)
    return grad_TE * router.logit_scale
