"""Scores of given logits with their error bounds, and everything a router makes of them."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from moe_ref.inputs.build import Inputs
from moe_ref.oracle.router import capped, score, selection_score, top_ids, weigh
from moe_ref.verify.bounds.kept_choice import KeptChoice, kept_choice
from moe_ref.verify.bounds.rounding import FLUSH, RoundingModel
from moe_ref.verify.bounds.rows import Rows
from moe_ref.verify.bounds.selection import allowed_choice


@dataclass(frozen=True)
class Weights:
    """Routing weights (T, K) and weights of shared experts (T, S), where the router gates those."""

    routed: Rows
    shared: Rows | None


class Scores:
    """The logits may be the oracle's or the subject's own; shared ones (T, S) are always the oracle's."""

    def __init__(self, logits: Rows, shared_logits: Rows | None, inputs: Inputs, model: RoundingModel) -> None:
        router = inputs.problem.spec.router
        assert router is not None
        self.router, self.model, self.logits = router, model, logits
        self.bias_E, self.scale_E = inputs.weights.selection_bias_E, inputs.weights.weight_scale_E
        self.score_TE, self.relative_TE, self.spread_TE = self._scores(logits)
        self.shared_TS, self.shared_relative_TS, self.shared_spread_TS = (
            (None, None, None) if shared_logits is None else self._scores(shared_logits))

    def _scores(self, logits: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores, what they may be off by relative to themselves, and the mean square of what is expected."""
        # |d score| <= score * (exp(2 b) - 1) when every logit of the token is off by at most b, for all scores.
        after = self.model.capped(logits, self.router)
        propagated_T1 = torch.expm1(2 * after.bound.amax(-1, keepdim=True))
        units_TE = self.model.score_units(after.value, self.router)
        variance = torch.full_like(after.value, torch.inf) if after.variance is None else after.variance
        # d log score = d logit - sum of p d logit, of which the second part is at most as large as the largest.
        spread_TE = variance + variance.amax(-1, keepdim=True) + self.model.evaluated(units_TE)
        return score(logits.value, self.router), propagated_T1 + units_TE, spread_TE

    @cached_property
    def selection(self) -> Rows:
        """What experts compete with before any group limit."""
        base = Rows(self.score_TE, self.score_TE * self.relative_TE + FLUSH)
        if self.router.selection_bias == "logit":
            after = self.model.capped(self.logits, self.router)
            base = Rows(capped(self.logits.value, self.router), after.bound)
        value_TE = base.value if self.bias_E is None else base.value + self.bias_E.double()
        return Rows(value_TE, base.bound + 2 * self.model.evaluation_unit * (value_TE.abs() + base.bound))

    @cached_property
    def choice(self) -> KeptChoice:
        """Which selections these scores allow, and what a capacity may leave of them."""
        capacity, selection = self.router.capacity, self.selection
        chosen = allowed_choice(selection.value, selection.bound, self.router)
        low_TE, high_TE = selection.value - selection.bound, selection.value + selection.bound
        unknown_T1 = torch.zeros(len(low_TE), 1, dtype=torch.bool)
        if capacity is not None and capacity.priority == "weight":
            ranked = self._ranked()
            low_TE, high_TE = ranked.value - ranked.bound, ranked.value + ranked.bound
            unknown_T1 = ~chosen.unambiguous_T[:, None]
        elif self.router.num_groups > 1 and self.router.group_fill == "zero":
            unknown_T1 = ~unknown_T1
        low_TE, high_TE = (torch.where(unknown_T1, end, values) for end, values in ((-torch.inf, low_TE),
                                                                                   (torch.inf, high_TE)))
        return kept_choice(chosen, low_TE, high_TE, self.router)

    def _ranked(self) -> Rows:
        """Weights before any scale at the oracle's choice, (T, E + Z); what is not chosen is 0."""
        capacity = self.router.capacity
        assert capacity is not None
        plain = replace(self.router, capacity=None, scaling_factor=1.0, learned_scale=None)
        if capacity.renormalize_after:
            plain = replace(plain, renormalize=False, epsilon_rule="add")
        ids_TK = self._selected()
        weights_TK = weigh(self.score_TE, ids_TK, plain, None, self.shared_TS)[1]
        units_TK, _ = self.model.weight_units(self.relative_TE.gather(1, ids_TK), plain, self.shared_relative_TS)
        zeros_TE = torch.zeros_like(self.score_TE)
        bound_TK = weights_TK * units_TK + FLUSH
        return Rows(zeros_TE.scatter(1, ids_TK, weights_TK), zeros_TE.scatter(1, ids_TK, bound_TK))

    def _selected(self) -> torch.Tensor:
        grouped_TE = selection_score(self.score_TE, self.logits.value, self.bias_E, self.router)
        return top_ids(grouped_TE, self.router.top_k)

    def ids(self) -> torch.Tensor:
        """The oracle's choice, (T, K), -1 where its expert was full."""
        return weigh(self.score_TE, self._selected(), self.router, self.scale_E, self.shared_TS)[0]

    def weights(self, ids_TK: torch.Tensor) -> Weights:
        """Weights of the chosen experts and their bounds; a slot with an id out of range has weight 0.

        Nothing is known where the sum that is divided by holds a dropped expert and it is not certain which.
        """
        router, capacity = self.router, self.router.capacity
        kept_TK = (ids_TK >= 0) & (ids_TK < router.num_choices)
        whole_TK = torch.where(kept_TK, ids_TK, 0).long()
        score_TE, unknown_T1 = self.score_TE, torch.zeros(len(ids_TK), 1, dtype=torch.bool)
        if capacity is not None:
            whole_TK = self.choice.whole(torch.where(kept_TK, ids_TK, -1))
            if capacity.renormalize_after:
                score_TE = score_TE.scatter(1, whole_TK, score_TE.gather(1, whole_TK) * kept_TK)
            elif router.renormalize:
                unknown_T1 = (~kept_TK.all(-1) & ~self.choice.chosen.unambiguous_T)[:, None]
        # What is kept is known here, so that a capacity has nothing left to drop.
        _, weights_TK, shared_TS = weigh(score_TE, whole_TK, replace(router, capacity=None), self.scale_E,
                                         self.shared_TS)
        units_TK, units_TS = self.model.weight_units(self.relative_TE.gather(1, whole_TK), router,
                                                     self.shared_relative_TS)
        spread_TK, spread_TS = self._weight_spread(whole_TK)
        routed = self._bounded(weights_TK, units_TK, spread_TK).masked(unknown_T1)
        routed = routed.mapped(lambda one: torch.where(kept_TK, one, 0.0))
        if shared_TS is None or units_TS is None or spread_TS is None:
            return Weights(routed, None)
        return Weights(routed, self._bounded(shared_TS, units_TS, spread_TS).masked(unknown_T1))

    def _weight_spread(self, whole_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean square of relative errors of weights: of the score, of the sum that divides it, of both roundings."""
        spread_TK, spread_TS = self.spread_TE.gather(1, whole_TK), self.shared_spread_TS
        both = spread_TK if spread_TS is None else torch.cat([spread_TK, spread_TS], -1)
        if self.router.renormalize:
            both = both + both.amax(-1, keepdim=True)
        both = both + (both.shape[1] + 6) * self.model.evaluation_unit**2
        return both[:, :self.router.top_k], None if spread_TS is None else both[:, self.router.top_k:]

    def _bounded(self, weights: torch.Tensor, units: torch.Tensor, spread: torch.Tensor) -> Rows:
        floor = FLUSH * self.router.scaling_factor
        return Rows(weights, weights.abs() * units + floor, weights.square() * spread + floor**2)
