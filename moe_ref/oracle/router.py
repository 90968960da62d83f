"""From tokens to expert ids and weights.

    logits = x @ router^T
    score  = softmax(logits)  or  sigmoid(logits)
    ids    = the top_k experts by score + selection_bias, inside the best groups; ties to the lower id
    weight = score[ids]  [/ (their sum + epsilon)]  * scaling_factor
"""

import torch

from moe_ref.contract.checks import check_logits, check_router
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec, Router
from moe_ref.contract.weights import MoEWeights


def route(x_TH: torch.Tensor, weights: MoEWeights, spec: MoESpec, *,
          logits_TE: torch.Tensor | None = None) -> Routing:
    """Ids (int64), weights, logits and shared gate, all in fp64 whatever the dtype of x_TH.

    logits_TE, if given, replaces x @ router^T. Without a router every token gets expert 0 with weight 1.
    Raises UsageValueError when injected logits are not (T, E).
    """
    check_router(weights, spec)
    shared_TS = shared_gate(x_TH, weights)
    if spec.router is None:
        ids_TK = torch.zeros(len(x_TH), 1, dtype=torch.int64, device=x_TH.device)
        return Routing(ids_TK, torch.ones_like(ids_TK, dtype=torch.float64), shared_TS=shared_TS)
    if logits_TE is None:
        assert weights.router_EH is not None
        logits_TE = x_TH.double() @ weights.router_EH.double().T
    check_logits(logits_TE, spec, len(x_TH))
    logits_TE = logits_TE.double()
    score_TE = score(logits_TE, spec.router)
    ids_TK = select(selection_score(score_TE, weights.selection_bias_E, spec.router), spec.router)
    return Routing(ids_TK, weigh(score_TE.gather(1, ids_TK), spec.router), logits_TE, shared_TS)


def shared_gate(x_TH: torch.Tensor, weights: MoEWeights) -> torch.Tensor | None:
    """sigmoid(x @ shared_gate^T), (T, 1), the shared expert's weight; None where the layer has no such gate."""
    if weights.shared_gate_SH is None:
        return None
    return sigmoid(x_TH.double() @ weights.shared_gate_SH.double().T)


def score(logits_TE: torch.Tensor, router: Router) -> torch.Tensor:
    """Score of every expert, (T, E)."""
    return torch.softmax(logits_TE, dim=-1) if router.score == "softmax" else sigmoid(logits_TE)


def sigmoid(logits: torch.Tensor) -> torch.Tensor:
    """1 / (1 + exp(-l)), written out: torch.sigmoid rounds equal logits differently in vector body and remainder
    of a CPU tensor (seen in torch 2.13), which would break exact ties by position in memory."""
    return 1 / (1 + torch.exp(-logits))


def selection_score(score_TE: torch.Tensor, selection_bias_E: torch.Tensor | None, router: Router) -> torch.Tensor:
    """What experts compete with, (T, E): score plus bias; -inf outside the groups kept (DeepSeek-V3, section 2.1.2)."""
    if selection_bias_E is not None:
        score_TE = score_TE + selection_bias_E.double()
    if router.num_groups == 1:
        return score_TE
    score_TGE = score_TE.unflatten(-1, (router.num_groups, -1))
    largest = 1 if router.group_score == "max" else 2
    group_TG = score_TGE.topk(largest, dim=-1).values.sum(-1)
    kept_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter(
        1, top_ids(group_TG, router.num_groups_kept), True)
    return score_TGE.masked_fill(~kept_TG[..., None], -torch.inf).flatten(1)


def select(selection_TE: torch.Tensor, router: Router) -> torch.Tensor:
    """The top_k experts, best first, (T, K)."""
    return top_ids(selection_TE, router.top_k)


def top_ids(values_TN: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest per row; a stable sort sends ties to the lower index, which topk does not."""
    return torch.sort(values_TN, dim=-1, descending=True, stable=True).indices[:, :count]


def weigh(score_TK: torch.Tensor, router: Router) -> torch.Tensor:
    """Routing weights of the selected experts, (T, K); the selection bias has no part in them."""
    if router.renormalize:
        score_TK = score_TK / (score_TK.sum(-1, keepdim=True) + router.renormalize_epsilon)
    return score_TK * router.scaling_factor
