"""Routers of the whole specification with one mistake each, after defects that were shipped or nearly so."""

from dataclasses import replace

import torch

from moe_ref.contract.spec import Router
from moe_ref.contract.weights import MoEWeights
from tests.subjects.whole_router import WholeRouter


class SelectionBiasDropped(WholeRouter):
    """Experts are chosen by their scores alone."""

    def selection(self, score_TE: torch.Tensor, capped_TE: torch.Tensor, weights: MoEWeights,
                  router: Router) -> torch.Tensor:
        return score_TE


class SelectionBiasInWeights(WholeRouter):
    """Weights are made of what experts compete with."""

    def chosen_scores(self, score_TE: torch.Tensor, selection_TE: torch.Tensor,
                      ids_TK: torch.Tensor) -> torch.Tensor:
        return selection_TE.gather(1, ids_TK)


class SelectionBiasOnLogits(WholeRouter):
    """The bias is added before the score, not after it."""

    def selection(self, score_TE: torch.Tensor, capped_TE: torch.Tensor, weights: MoEWeights,
                  router: Router) -> torch.Tensor:
        return capped_TE + weights.selection_bias_E


class SelectionBiasOnScores(WholeRouter):
    """The bias is added after the score, not before it."""

    def selection(self, score_TE: torch.Tensor, capped_TE: torch.Tensor, weights: MoEWeights,
                  router: Router) -> torch.Tensor:
        return score_TE + weights.selection_bias_E


class GroupFillZero(WholeRouter):
    """Experts outside the groups kept compete with 0."""

    def group_fill(self, router: Router) -> float:
        return 0.0


class GroupFillMinusInfinity(WholeRouter):
    """Experts outside the groups kept can never be chosen."""

    def group_fill(self, router: Router) -> float:
        return -torch.inf


class GroupByMax(WholeRouter):
    """Groups are ranked by their best expert."""

    def group_score(self, selection_TGE: torch.Tensor, router: Router) -> torch.Tensor:
        return selection_TGE.amax(-1)


class NotRenormalised(WholeRouter):
    """Weights are the scores themselves."""

    def denominator(self, score_TK: torch.Tensor, shared_TS: torch.Tensor | None, router: Router) -> torch.Tensor:
        return torch.ones_like(score_TK[:, :1])


class LargeEpsilon(WholeRouter):
    """1e-6 is added to the sum, whatever was asked for."""

    def denominator(self, score_TK: torch.Tensor, shared_TS: torch.Tensor | None, router: Router) -> torch.Tensor:
        return super().denominator(score_TK, shared_TS, replace(router, renormalize_epsilon=1e-6))


class EpsilonAdded(WholeRouter):
    """The epsilon is added where it should clamp."""

    def denominator(self, score_TK: torch.Tensor, shared_TS: torch.Tensor | None, router: Router) -> torch.Tensor:
        return super().denominator(score_TK, shared_TS, replace(router, epsilon_rule="add"))


class SharedNotInSum(WholeRouter):
    """Scores of shared experts take no part in the renormalisation."""

    def denominator(self, score_TK: torch.Tensor, shared_TS: torch.Tensor | None, router: Router) -> torch.Tensor:
        return super().denominator(score_TK, None, router)


class ScalesDropped(WholeRouter):
    """No factor on the weights, given or learned."""

    def scale(self, ids_TK: torch.Tensor, weights: MoEWeights, router: Router) -> torch.Tensor:
        return torch.ones(ids_TK.shape)


class LearnedScaleOfSlot(WholeRouter):
    """The learned scale is read by slot, not by expert."""

    def scale(self, ids_TK: torch.Tensor, weights: MoEWeights, router: Router) -> torch.Tensor:
        return super().scale(torch.arange(ids_TK.shape[1]).expand_as(ids_TK), weights, router)


class LogitBiasDropped(WholeRouter):
    """The router's bias is forgotten."""

    def logits(self, x_TH: torch.Tensor, weights: MoEWeights) -> torch.Tensor:
        return x_TH.float() @ weights.router_EH.float().T


class LogitsNotCapped(WholeRouter):
    """Logits are neither scaled nor capped."""

    def capped(self, logits_TE: torch.Tensor, router: Router) -> torch.Tensor:
        return logits_TE


class SoftplusWithoutRoot(WholeRouter):
    """softplus where its square root is asked for."""

    def score(self, capped_TE: torch.Tensor, router: Router) -> torch.Tensor:
        return super().score(capped_TE, router).square()


class DroppedTokensKept(WholeRouter):
    """A full expert takes one token more, and one more again."""

    def kept(self, ids_TK: torch.Tensor, ranked_TK: torch.Tensor, router: Router) -> torch.Tensor:
        return torch.ones_like(ids_TK, dtype=torch.bool)


class FirstTokensFirst(WholeRouter):
    """A full expert keeps its first tokens, whatever the priority."""

    def kept(self, ids_TK: torch.Tensor, ranked_TK: torch.Tensor, router: Router) -> torch.Tensor:
        assert router.capacity is not None
        first = replace(router.capacity, priority="token")
        return super().kept(ids_TK, ranked_TK, replace(router, capacity=first))


class OneLimitForAllSequences(WholeRouter):
    """The limit of a sequence is applied to the whole batch."""

    def kept(self, ids_TK: torch.Tensor, ranked_TK: torch.Tensor, router: Router) -> torch.Tensor:
        assert router.capacity is not None
        whole = replace(router.capacity, sequence_length=None)
        return super().kept(ids_TK, ranked_TK, replace(router, capacity=whole))
