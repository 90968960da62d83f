"""The router of the whole specification in fp32, every step on its own so that it can be replaced."""

import torch
import torch.nn.functional as F

from moe_ref.contract.spec import Router
from moe_ref.contract.weights import MoEWeights


class WholeRouter:
    """From tokens to ids, routing weights and weights of shared experts."""

    def logits(self, x_TH: torch.Tensor, weights: MoEWeights) -> torch.Tensor:
        logits_TE = x_TH.float() @ weights.router_EH.float().T
        return logits_TE if weights.router_bias_E is None else logits_TE + weights.router_bias_E.float()

    def capped(self, logits_TE: torch.Tensor, router: Router) -> torch.Tensor:
        logits_TE = logits_TE * router.logit_scale
        if router.logit_softcap:
            return router.logit_softcap * torch.tanh(logits_TE / router.logit_softcap)
        return logits_TE

    def score(self, capped_TE: torch.Tensor, router: Router) -> torch.Tensor:
        if router.score == "softmax":
            return torch.softmax(capped_TE, -1)
        # 1 / (1 + exp(-l)) and log1p(exp(l)): library functions round equal logits differently by position.
        if router.score == "sigmoid":
            return 1 / (1 + torch.exp(-capped_TE))
        return torch.where(capped_TE > 40, capped_TE, torch.log1p(torch.exp(capped_TE.clamp(max=40)))).sqrt()

    def selection(self, score_TE: torch.Tensor, capped_TE: torch.Tensor, weights: MoEWeights,
                  router: Router) -> torch.Tensor:
        if router.selection_bias is None:
            return score_TE
        return (capped_TE if router.selection_bias == "logit" else score_TE) + weights.selection_bias_E

    def group_score(self, selection_TGE: torch.Tensor, router: Router) -> torch.Tensor:
        return selection_TGE.topk(2 if router.group_score == "top2_sum" else 1, -1).values.sum(-1)

    def group_fill(self, router: Router) -> float:
        return -torch.inf if router.group_fill == "minus_inf" else 0.0

    def limited(self, selection_TE: torch.Tensor, router: Router) -> torch.Tensor:
        """Experts outside the groups kept get the fill."""
        if router.num_groups == 1:
            return selection_TE
        selection_TGE = selection_TE.unflatten(1, (router.num_groups, -1))
        group_TG = self.group_score(selection_TGE, router)
        kept_TG = torch.zeros_like(group_TG, dtype=torch.bool)
        kept_TG.scatter_(1, self.top(group_TG, router.num_groups_kept), True)
        return selection_TGE.masked_fill(~kept_TG[..., None], self.group_fill(router)).flatten(1)

    def top(self, values_TN: torch.Tensor, count: int) -> torch.Tensor:
        """Indices of the largest, ties to the lower one."""
        return torch.sort(values_TN, dim=-1, descending=True, stable=True).indices[:, :count]

    def kept(self, ids_TK: torch.Tensor, ranked_TK: torch.Tensor, router: Router) -> torch.Tensor:
        """Slots that fit into their expert's capacity: a walk over slots in the order of their priority."""
        kept_TK, capacity = torch.ones_like(ids_TK, dtype=torch.bool), router.capacity
        if capacity is None:
            return kept_TK
        num_tokens = len(ids_TK)
        step = capacity.sequence_length or max(1, num_tokens)
        for start in range(0, num_tokens, step):
            size = min(step, num_tokens - start)
            limit = capacity.limit(size, router.top_k, router.num_experts)
            slots = [(t, k) for t in range(start, start + size) for k in range(router.top_k)]
            if capacity.priority == "choice":
                slots.sort(key=lambda slot: slot[1])
            elif capacity.priority == "weight":
                slots.sort(key=lambda slot: -float(ranked_TK[slot]))
            load = [0] * router.num_choices
            for slot in slots:
                expert = int(ids_TK[slot])
                if expert < router.num_experts and load[expert] >= limit:
                    kept_TK[slot] = False
                load[expert] += 1
        return kept_TK

    def denominator(self, score_TK: torch.Tensor, shared_TS: torch.Tensor | None, router: Router) -> torch.Tensor:
        """What scores are divided by, (T, 1)."""
        if not router.renormalize:
            return torch.ones_like(score_TK[:, :1])
        sum_T1 = score_TK.sum(-1, keepdim=True)
        if shared_TS is not None:
            sum_T1 = sum_T1 + shared_TS.sum(-1, keepdim=True)
        epsilon = router.renormalize_epsilon
        return sum_T1 + epsilon if router.epsilon_rule == "add" else sum_T1.clamp(min=epsilon)

    def chosen_scores(self, score_TE: torch.Tensor, selection_TE: torch.Tensor,
                      ids_TK: torch.Tensor) -> torch.Tensor:
        """What weights are made of: scores without the selection bias."""
        return score_TE.gather(1, ids_TK)

    def scale(self, ids_TK: torch.Tensor, weights: MoEWeights, router: Router) -> torch.Tensor:
        """Factor of routed weights, (T, K)."""
        scale_TK = torch.full(ids_TK.shape, router.scaling_factor)
        if router.learned_scale is None:
            return scale_TK
        of_layer = router.learned_scale == "layer"
        return scale_TK * (weights.weight_scale_E if of_layer else weights.weight_scale_E[ids_TK])

    def shared_scale(self, weights: MoEWeights, router: Router) -> torch.Tensor | float:
        """Factor of the weights of shared experts."""
        learned = weights.weight_scale_E if router.learned_scale == "layer" else 1.0
        return router.scaling_factor * learned

    def route(self, x_TH: torch.Tensor, logits_TE: torch.Tensor, weights: MoEWeights, router: Router,
              shared_logits_TS: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """ids (T, K), weights (T, K) and shared weights (T, S)."""
        capped_TE = self.capped(logits_TE.float(), router)
        score_TE = self.score(capped_TE, router)
        selection_TE = self.selection(score_TE, capped_TE, weights, router)
        ids_TK = self.top(self.limited(selection_TE, router), router.top_k)
        score_TK, shared_TS = self.chosen_scores(score_TE, selection_TE, ids_TK), None
        if shared_logits_TS is not None:
            shared_TS = self.score(self.capped(shared_logits_TS.float(), router), router)
        after = router.capacity is not None and router.capacity.renormalize_after
        ranked_TK = score_TK if after else score_TK / self.denominator(score_TK, shared_TS, router)
        kept_TK = self.kept(ids_TK, ranked_TK, router)
        sum_T1 = self.denominator(score_TK * kept_TK if after else score_TK, shared_TS, router)
        weights_TK = torch.where(kept_TK, score_TK / sum_T1 * self.scale(ids_TK, weights, router), 0.0)
        if shared_TS is not None:
            shared_TS = shared_TS / sum_T1 * self.shared_scale(weights, router)
        return torch.where(kept_TK, ids_TK, -1), weights_TK, shared_TS


def sigmoid_gate(x_TH: torch.Tensor, weights: MoEWeights) -> torch.Tensor:
    """The shared expert's own gate, (T, 1)."""
    return F.sigmoid(x_TH.float() @ weights.shared_gate_SH.float().T)
