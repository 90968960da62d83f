"""A router in plain torch, for implementations that begin where the routing is known."""

import torch

from moe_ref.contract.errors import raise_faults
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.weights import WholeParameters

SCORES = ("softmax", "sigmoid")


def routed(x_TH: torch.Tensor, weights: WholeParameters, spec: MoESpec, routing: Routing | None,
           logits_TE: torch.Tensor | None) -> Routing:
    """The injected routing, or that of a softmax or sigmoid router, in fp32: ids int64 and weights, both (T, K).

    Differentiable in tokens, router and injected logits. UsageValueError for options it does not have.
    """
    if routing is not None:
        return routing
    router = spec.router
    assert router is not None
    raise_faults("adapters.routed", [f"score {router.score}"] * (router.score not in SCORES))
    if logits_TE is None:
        assert weights.router_EH is not None
        logits_TE = x_TH.float() @ weights.router_EH.float().T
        if weights.router_bias_E is not None:
            logits_TE = logits_TE + weights.router_bias_E.float()
    logits_TE = logits_TE.float()
    score_TE = torch.softmax(logits_TE, -1) if router.score == "softmax" else torch.sigmoid(logits_TE)
    # Chosen by the logits, which rise with the scores: sigmoids that round to the same number do not tie.
    ids_TK = torch.sort(logits_TE, dim=-1, descending=True, stable=True).indices[:, :router.top_k]
    weights_TK = score_TE.gather(1, ids_TK)
    if router.renormalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + router.renormalize_epsilon)
    return Routing(ids_TK, weights_TK * router.scaling_factor, logits_TE)
