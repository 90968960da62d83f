"""Layers with one fault each in how tokens are routed; ids in front of the words are those of the catalogue of defects.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, get_args

import torch

from moe_ref.contract.router_spec import Priority, Router
from moe_ref.contract.vocabulary import Stage
from moe_ref.oracle import router as routing
from moe_ref.verify.diagnosis.blocks import blocks, without_last
from moe_ref.verify.diagnosis.known import Known
from moe_ref.verify.diagnosis.layer import Layer


def _router(known: Known) -> Router | None:
    return known.case.problem.spec.router if known.inputs.routing is None else None


class OfRouter(Layer):
    """Faults of layers with a router that has something to be wrong about."""

    first = Stage.IDS

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        router = _router(known)
        return () if router is None else cls.of(router, known)

    @classmethod
    def of(cls, router: Router, known: Known) -> Iterable[Any]:
        """The forms of the fault under this router."""
        return (None,)


class LogitBiasDropped(OfRouter):
    words = "bias of the router left out"
    first = Stage.LOGITS

    @classmethod
    def of(cls, router: Router, known: Known) -> Iterable[Any]:
        return (None,) * (router.logit_bias and known.inputs.logits_TE is None)

    def logits(self) -> torch.Tensor:
        assert self.inputs.weights.router_EH is not None
        return self.x_TH @ self.inputs.weights.router_EH.double().T


class LogitsOfFewerColumns(OfRouter):
    words = "last block of H left out of the logits"
    first = Stage.LOGITS

    @classmethod
    def of(cls, router: Router, known: Known) -> Iterable[Any]:
        return blocks(known.case.problem.spec.hidden_size) if known.inputs.logits_TE is None else ()

    def tokens(self) -> torch.Tensor:
        return without_last(self.x_TH, self.variant)


class TiesToHigherId(OfRouter):
    words = "B07 ties given to the higher expert id"

    def top(self, selection_TE: torch.Tensor, router: Router) -> torch.Tensor:
        last = selection_TE.shape[1] - 1
        return last - routing.top_ids(selection_TE.flip(1), router.top_k)


class SelectionBiasDropped(OfRouter):
    words = "bias left out of the selection"

    @classmethod
    def of(cls, router: Router, known: Known) -> Iterable[Any]:
        return (None,) * (router.selection_bias is not None)

    def selection(self, score_TE: torch.Tensor, logits_TE: torch.Tensor, router: Router) -> torch.Tensor:
        return routing.selection_score(score_TE, logits_TE, None, replace(router, selection_bias=None))


class AnotherRouter(OfRouter):
    """A router that does something else than it was asked for: variants are what it does."""

    def router(self, router: Router) -> Router:
        return replace(router, **self.variant)


class BiasAtTheOtherPlace(AnotherRouter):
    words = "selection bias added to the {0[selection_bias]}"

    @classmethod
    def of(cls, router: Router, known: Known) -> Iterable[Any]:
        others = {"score": "logit", "logit": "score"}
        allowed = router.selection_bias is not None and router.num_groups == 1
        return ({"selection_bias": others[router.selection_bias]},) if allowed else ()  # pyrefly: ignore


class GroupsIgnored(AnotherRouter):
    words = "limit to the best groups ignored"

    @classmethod
    def of(cls, router: Router, known: Known) -> Iterable[Any]:
        default = {"num_groups": 1, "num_groups_kept": 1, "group_score": "max", "group_fill": "minus_inf"}
        return (default,) if router.num_groups > 1 else ()


class GroupFill(AnotherRouter):
    words = "B11 experts outside the best groups filled with {0[group_fill]}"

    @classmethod
    def of(cls, router: Router, known: Known) -> Iterable[Any]:
        fits = router.top_k <= router.num_groups_kept * (router.num_experts // router.num_groups)
        other = "minus_inf" if router.group_fill == "zero" else "zero"
        return ({"group_fill": other},) if router.num_groups > 1 and fits else ()


class GroupScore(AnotherRouter):
    words = "B12 groups ranked by {0[group_score]}"

    @classmethod
    def of(cls, router: Router, known: Known) -> Iterable[Any]:
        fits = router.num_groups > 1 and router.num_experts > router.num_groups
        return ({"group_score": "max" if router.group_score == "top2_sum" else "top2_sum"},) if fits else ()


class CapacityIgnored(AnotherRouter):
    words = "limit of tokens per expert ignored"

    @classmethod
    def of(cls, router: Router, known: Known) -> Iterable[Any]:
        return ({"capacity": None},) if router.capacity else ()


class CapacityPriority(AnotherRouter):
    words = "full experts keep their tokens by {0[capacity].priority}"

    @classmethod
    def of(cls, router: Router, known: Known) -> Iterable[Any]:
        if router.capacity is None:
            return ()
        return [{"capacity": replace(router.capacity, priority=priority)} for priority in get_args(Priority)
                if priority != router.capacity.priority]


class CapacityOfTheBatch(AnotherRouter):
    words = "limit of a sequence applied to the whole batch"

    @classmethod
    def of(cls, router: Router, known: Known) -> Iterable[Any]:
        if router.capacity is None or router.capacity.sequence_length is None:
            return ()
        return ({"capacity": replace(router.capacity, sequence_length=None)},)


class NotRenormalised(AnotherRouter):
    words = "B16 weights not renormalised"
    first = Stage.WEIGHTS

    @classmethod
    def of(cls, router: Router, known: Known) -> Iterable[Any]:
        if not router.renormalize or (router.capacity and router.capacity.renormalize_after):
            return ()
        return ({"renormalize": False, "renormalize_epsilon": 0.0, "epsilon_rule": "add"},)


class Renormalised(AnotherRouter):
    words = "B16 weights renormalised unasked (B17 softmax over the chosen alone)"
    first = Stage.WEIGHTS

    @classmethod
    def of(cls, router: Router, known: Known) -> Iterable[Any]:
        return ({"renormalize": True},) * (not router.renormalize)


class OtherEpsilon(AnotherRouter):
    words = "another epsilon in the renormalisation"
    first = Stage.WEIGHTS

    @classmethod
    def of(cls, router: Router, known: Known) -> Iterable[Any]:
        if not router.renormalize:
            return []
        rules = [{"renormalize_epsilon": 0.0, "epsilon_rule": "add"}]
        other = "clamp" if router.epsilon_rule == "add" else "add"
        return [*rules, {"epsilon_rule": other}] if router.renormalize_epsilon else []


class ScalingDropped(AnotherRouter):
    words = "B20 scaling factor left out"
    first = Stage.WEIGHTS

    @classmethod
    def of(cls, router: Router, known: Known) -> Iterable[Any]:
        return ({"scaling_factor": 1.0},) * (router.scaling_factor != 1.0)


class ScalingTwice(AnotherRouter):
    words = "B20 scaling factor applied twice"
    first = Stage.WEIGHTS

    @classmethod
    def of(cls, router: Router, known: Known) -> Iterable[Any]:
        return ({"scaling_factor": router.scaling_factor**2},) * (router.scaling_factor != 1.0)


class OtherScore(AnotherRouter):
    words = "{0[score]} for the score that was asked for"

    @classmethod
    def of(cls, router: Router, known: Known) -> Iterable[Any]:
        if router.score == "softmax":
            return [{"score": "sigmoid"}]
        return [{"score": score} for score in ("softmax", "sigmoid", "sqrt_softplus")
                if score != router.score and not (score == "softmax" and routing.router_gated(known.case.problem.spec))]


class RootOfSoftplusDropped(OfRouter):
    words = "softplus without its root"

    @classmethod
    def of(cls, router: Router, known: Known) -> Iterable[Any]:
        return (None,) * (router.score == "sqrt_softplus")

    def score(self, logits_TE: torch.Tensor, router: Router) -> torch.Tensor:
        return super().score(logits_TE, router).square()


class LogitsNotCapped(AnotherRouter):
    words = "logits neither scaled nor capped"

    @classmethod
    def of(cls, router: Router, known: Known) -> Iterable[Any]:
        changed = router.logit_scale != 1.0 or router.logit_softcap != 0.0
        return ({"logit_scale": 1.0, "logit_softcap": 0.0},) * changed


class BiasInWeights(OfRouter):
    words = "B13 selection bias in the weights"
    first = Stage.WEIGHTS

    @classmethod
    def of(cls, router: Router, known: Known) -> Iterable[Any]:
        return (None,) * (router.selection_bias is not None)

    def weight_scores(self) -> torch.Tensor:
        assert self.used_router is not None
        assert self.inputs.weights.selection_bias_E is not None
        logits_TE, bias_E = self.stage(Stage.LOGITS), self.inputs.weights.selection_bias_E.double()
        if self.used_router.selection_bias == "logit":
            return routing.capped(logits_TE, self.used_router) + bias_E
        return self.score(logits_TE, self.used_router) + bias_E


class LearnedScaleDropped(OfRouter):
    words = "learned scale left out"
    first = Stage.WEIGHTS

    @classmethod
    def of(cls, router: Router, known: Known) -> Iterable[Any]:
        return (None,) * (router.learned_scale is not None)

    def learned_scale(self) -> torch.Tensor | None:
        return None


class LearnedScaleOfSlot(OfRouter):
    words = "learned scale read by slot, not by expert"
    first = Stage.WEIGHTS

    @classmethod
    def of(cls, router: Router, known: Known) -> Iterable[Any]:
        return (None,) * (router.learned_scale == "expert")

    def weigh(self, score_TE: torch.Tensor, ids_TK: torch.Tensor,
              router: Router) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        ids_TK, weights_TK, shared_TS = super().weigh(score_TE, ids_TK, router)
        assert self.inputs.weights.weight_scale_E is not None
        scale_E = self.inputs.weights.weight_scale_E.double()
        right_TK = scale_E[ids_TK.clamp(min=0)]
        return ids_TK, weights_TK / right_TK * scale_E[:ids_TK.shape[1]], shared_TS


class SharedNotInSum(OfRouter):
    words = "scores of shared experts left out of the renormalisation"
    first = Stage.WEIGHTS

    @classmethod
    def of(cls, router: Router, known: Known) -> Iterable[Any]:
        return (None,) * (router.renormalize and routing.router_gated(known.case.problem.spec))

    def weigh(self, score_TE: torch.Tensor, ids_TK: torch.Tensor,
              router: Router) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        _, _, shared_TS = super().weigh(score_TE, ids_TK, router)
        ids_TK, weights_TK, _ = routing.weigh(score_TE, ids_TK.long(), router, self.inputs.weights.weight_scale_E)
        return ids_TK, weights_TK, shared_TS


ROUTER_FAULTS: tuple[type[Layer], ...] = (
    LogitBiasDropped, LogitsOfFewerColumns, TiesToHigherId, SelectionBiasDropped, BiasAtTheOtherPlace, GroupsIgnored,
    GroupFill, GroupScore, CapacityIgnored, CapacityPriority, CapacityOfTheBatch, NotRenormalised, Renormalised,
    OtherEpsilon, ScalingDropped, ScalingTwice, OtherScore, RootOfSoftplusDropped, LogitsNotCapped, BiasInWeights,
    LearnedScaleDropped, LearnedScaleOfSlot, SharedNotInSum)
