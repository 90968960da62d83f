"""Routing in fp64 from stored logits: what remains of it are its stores."""

import torch

from moe_ref.contract.spec import Router


def chosen(logits_TE: torch.Tensor, router: Router) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (T, K) int64, best first and ties to the lower id, and weights (T, K) fp64 before their store.

    softmax or sigmoid scores, renormalised and scaled as the router says; the other options are refused before.
    """
    # Scores rise with their logits, and a tie that only rounding made must not decide.
    ids_TK = torch.sort(logits_TE, dim=-1, descending=True, stable=True).indices[:, :router.top_k]
    # torch.sigmoid rounds equal logits by their position in memory.
    score_TE = torch.softmax(logits_TE, -1) if router.score == "softmax" else 1 / (1 + torch.exp(-logits_TE))
    weights_TK = score_TE.gather(1, ids_TK)
    if router.renormalize:
        sum_T1 = weights_TK.sum(-1, keepdim=True)
        epsilon = router.renormalize_epsilon
        weights_TK = weights_TK / (sum_T1 + epsilon if router.epsilon_rule == "add" else sum_T1.clamp(min=epsilon))
    return ids_TK, weights_TK * router.scaling_factor
