"""From tokens to expert ids and weights.

    logits = x @ router^T + bias                       then * logit_scale, then softcap * tanh(. / softcap)
    score  = softmax(logits), sigmoid(logits) or sqrt(softplus(logits))
    ids    = the top_k experts by score + selection_bias, inside the best groups; ties to the lower id
    weight = score[ids]  [/ (their sum + epsilon)]  * scaling_factor [* learned scale]
    ids beyond an expert's capacity become -1, their weight 0
"""

import torch

from moe_ref.contract.checks import check_logits, check_tokens
from moe_ref.contract.dtypes import PLAIN_DTYPES
from moe_ref.contract.quantised import QuantisedWeights
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec, Router
from moe_ref.contract.weights import WeightSource, WholeParameters, check_whole_parameters
from moe_ref.oracle.capacity import kept_slots


def route(x_TH: torch.Tensor, weights: WeightSource | QuantisedWeights, spec: MoESpec, *,
          logits_TE: torch.Tensor | None = None) -> Routing:
    """Ids (int64), weights, logits and shared gates, all in fp64 whatever the dtype of x_TH.

    logits_TE (T, E + Z), if given, replaces x @ router^T + bias. Without a router every token gets expert 0 with
    weight 1. Raises UsageValueError when injected logits have another shape.
    """
    check_tokens(x_TH, spec, PLAIN_DTYPES, "moe_ref")
    check_whole_parameters(weights, spec)
    router = spec.router
    if router is None:
        ids_TK = torch.zeros(len(x_TH), 1, dtype=torch.int64, device=x_TH.device)
        return Routing(ids_TK, torch.ones_like(ids_TK, dtype=torch.float64),
                       shared_TS=shared_gates(x_TH, weights, spec))
    if logits_TE is None:
        logits_TE = router_logits(x_TH, weights)
    check_logits(logits_TE, spec, len(x_TH))
    logits_TE = logits_TE.double()
    score_TE = score(logits_TE, router)
    ids_TK = select(selection_score(score_TE, logits_TE, weights.selection_bias_E, router), router)
    shared_TS = shared_scores(x_TH, weights, router) if router_gated(spec) else None
    ids_TK, weights_TK, shared_TS = weigh(score_TE, ids_TK, router, weights.weight_scale_E, shared_TS)
    if shared_TS is None:
        shared_TS = shared_gates(x_TH, weights, spec)
    return Routing(ids_TK, weights_TK, logits_TE, shared_TS)


def router_logits(x_TH: torch.Tensor, weights: WholeParameters) -> torch.Tensor:
    """x @ router^T + bias, (T, E + Z) in fp64."""
    assert weights.router_EH is not None
    logits_TE = x_TH.double() @ weights.router_EH.double().T
    return logits_TE if weights.router_bias_E is None else logits_TE + weights.router_bias_E.double()


def router_gated(spec: MoESpec) -> bool:
    """Whether the shared experts are weighted by further columns of the router."""
    return spec.shared is not None and spec.shared.gate == "router"


def shared_scores(x_TH: torch.Tensor, weights: WholeParameters, router: Router) -> torch.Tensor:
    """Scores of the router's further columns, (T, S), before any renormalisation."""
    assert weights.shared_gate_SH is not None
    return score(x_TH.double() @ weights.shared_gate_SH.double().T, router)


def shared_gates(x_TH: torch.Tensor, weights: WholeParameters, spec: MoESpec) -> torch.Tensor | None:
    """sigmoid(x @ shared_gate^T), (T, 1), the shared expert's weight; None where the layer has no such gate."""
    if spec.shared is None or spec.shared.gate != "sigmoid":
        return None
    assert weights.shared_gate_SH is not None
    return sigmoid(x_TH.double() @ weights.shared_gate_SH.double().T)


def score(logits_TE: torch.Tensor, router: Router) -> torch.Tensor:
    """Score of every choice, (T, E + Z), from logits before their scale and cap."""
    logits_TE = capped(logits_TE, router)
    if router.score == "softmax":
        return torch.softmax(logits_TE, dim=-1)
    return sigmoid(logits_TE) if router.score == "sigmoid" else torch.sqrt(softplus(logits_TE))


def capped(logits_TE: torch.Tensor, router: Router) -> torch.Tensor:
    """logit_scale and logit_softcap applied."""
    logits_TE = logits_TE * router.logit_scale
    if router.logit_softcap:
        return router.logit_softcap * torch.tanh(logits_TE / router.logit_softcap)
    return logits_TE


def sigmoid(logits: torch.Tensor) -> torch.Tensor:
    """1 / (1 + exp(-l)) and, for negative l, exp(l) / (1 + exp(l)): no overflow, so autograd has finite slopes.

    Written out: torch.sigmoid rounds equal logits differently in vector body and remainder of a CPU tensor (seen in
    torch 2.13), which would break exact ties by position in memory.
    """
    small = torch.exp(logits.clamp(max=0.0))
    return torch.where(logits < 0.0, small / (1 + small), 1 / (1 + torch.exp(-logits.clamp(min=0.0))))


def softplus(logits: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(l)), l itself above 100; written out as sigmoid is, since F.softplus rounds by position too."""
    return torch.where(logits > 100.0, logits, torch.log1p(torch.exp(logits.clamp(max=100.0))))


def selection_score(score_TE: torch.Tensor, logits_TE: torch.Tensor, selection_bias_E: torch.Tensor | None,
                    router: Router) -> torch.Tensor:
    """What experts compete with, (T, E + Z): score or logit plus bias; the fill outside the groups kept
    (DeepSeek-V3, section 2.1.2, with -inf; DeepSeek-V2's released code with 0).

    Without bias and groups it is the logits themselves: every score rises with its logit, but saturates in fp64, and
    a tie that only rounding made must not decide.
    """
    if router.selection_bias is None and router.num_groups == 1:
        return logits_TE
    if selection_bias_E is not None:
        base_TE = capped(logits_TE, router) if router.selection_bias == "logit" else score_TE
        score_TE = base_TE + selection_bias_E.double()
    if router.num_groups == 1:
        return score_TE
    score_TGE = score_TE.unflatten(-1, (router.num_groups, -1))
    largest = 1 if router.group_score == "max" else 2
    group_TG = score_TGE.topk(largest, dim=-1).values.sum(-1)
    kept_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter(
        1, top_ids(group_TG, router.num_groups_kept), True)
    fill = -torch.inf if router.group_fill == "minus_inf" else 0.0
    return score_TGE.masked_fill(~kept_TG[..., None], fill).flatten(1)


def select(selection_TE: torch.Tensor, router: Router) -> torch.Tensor:
    """The top_k experts, best first, (T, K)."""
    return top_ids(selection_TE, router.top_k)


def top_ids(values_TN: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest per row; a stable sort sends ties to the lower index, which topk does not."""
    return torch.sort(values_TN.detach(), dim=-1, descending=True, stable=True).indices[:, :count]


def weigh(score_TE: torch.Tensor, ids_TK: torch.Tensor, router: Router, weight_scale_E: torch.Tensor | None = None,
          shared_TS: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Ids, routing weights (T, K) and shared weights (T, S) from scores; the selection bias has no part in them.

    ids_TK must lie in [0, E + Z). What exceeds an expert's capacity leaves with id -1 and weight 0, before the
    renormalisation where the spec says so. shared_TS: scores of the router's further columns.
    """
    score_TK = score_TE.gather(1, ids_TK)
    after = router.capacity is not None and router.capacity.renormalize_after
    ranked_TK = score_TK if after else score_TK / _denominator(score_TK, shared_TS, router)
    kept_TK = kept_slots(ids_TK, ranked_TK.detach(), router)
    sum_T1 = _denominator(torch.where(kept_TK, score_TK, 0.0) if after else score_TK, shared_TS, router)
    if shared_TS is None:
        # A token whose every slot was dropped may have no sum to divide by; its weights are 0 anyway.
        sum_T1 = torch.where(kept_TK.any(-1, keepdim=True), sum_T1, 1.0)
    scale = router.scaling_factor * _learned_scale(weight_scale_E, ids_TK, router)
    weights_TK = torch.where(kept_TK, score_TK / sum_T1 * scale, 0.0)
    if shared_TS is not None:
        shared_TS = shared_TS / sum_T1 * router.scaling_factor
        if weight_scale_E is not None and router.learned_scale == "layer":
            shared_TS = shared_TS * weight_scale_E.double()
    return torch.where(kept_TK, ids_TK, -1), weights_TK, shared_TS


def _denominator(score_TK: torch.Tensor, shared_TS: torch.Tensor | None, router: Router) -> torch.Tensor:
    """What scores are divided by, (T, 1): 1 without renormalisation."""
    if not router.renormalize:
        return torch.ones_like(score_TK[:, :1])
    sum_T1 = score_TK.sum(-1, keepdim=True)
    if shared_TS is not None:
        sum_T1 = sum_T1 + shared_TS.sum(-1, keepdim=True)
    epsilon = router.renormalize_epsilon
    return sum_T1 + epsilon if router.epsilon_rule == "add" else sum_T1.clamp(min=epsilon)


def _learned_scale(weight_scale_E: torch.Tensor | None, ids_TK: torch.Tensor, router: Router) -> torch.Tensor | float:
    if weight_scale_E is None:
        return 1.0
    return weight_scale_E.double() if router.learned_scale == "layer" else weight_scale_E.double()[ids_TK]
