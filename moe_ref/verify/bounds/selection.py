"""Set-valued selection: which experts a right router may choose when its scores are known only to a bound.

Score intervals [low, high] give two sets per token: `must` are chosen under every value inside the
intervals, `may` under some. A choice S of K distinct experts is accepted when must <= S <= may. Accepting is
sound: no right router is refused. Group limits apply the same rule twice, first to groups.
"""

from dataclasses import dataclass

import torch

from moe_ref.contract.spec import Router


@dataclass(frozen=True)
class AllowedChoice:
    """may_TE, must_TE: booleans per token and choice, identity experts among them."""

    may_TE: torch.Tensor
    must_TE: torch.Tensor

    @property
    def unambiguous_T(self) -> torch.Tensor:
        """Tokens with a single possible choice."""
        return (self.may_TE == self.must_TE).all(-1)

    def accepts(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """Per token: K distinct experts in range, all of `must`, none outside `may`."""
        num_experts = self.may_TE.shape[1]
        in_range_T = ((ids_TK >= 0) & (ids_TK < num_experts)).all(-1)
        chosen_TE = torch.zeros_like(self.may_TE).scatter(1, ids_TK.clamp(0, num_experts - 1).long(), True)
        distinct_T = chosen_TE.sum(-1) == ids_TK.shape[1]
        return in_range_T & distinct_T & ~(chosen_TE & ~self.may_TE).any(-1) & ~(self.must_TE & ~chosen_TE).any(-1)


def _compete(low: torch.Tensor, high: torch.Tensor, certain: torch.Tensor, possible: torch.Tensor,
             count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(may, must) for the best `count` per row among competitors that certainly or possibly take part."""
    minus_infinity = torch.full_like(low, -torch.inf)
    certain_low = torch.where(certain, low, minus_infinity)
    possible_high = torch.where(possible, high, minus_infinity)
    may = possible & (high >= _nth_largest(certain_low, count))
    must = certain & (low > _nth_largest(possible_high, count + 1))
    return may, must


def _nth_largest(values: torch.Tensor, n: int) -> torch.Tensor:
    if n > values.shape[-1]:
        return torch.full_like(values[..., :1], -torch.inf)
    return values.topk(n, dim=-1).values[..., -1:]


def allowed_choice(selection_TE: torch.Tensor, error_TE: torch.Tensor, router: Router) -> AllowedChoice:
    """The sets for selection scores (before any group limit) that are off by at most error_TE.

    Of a token with a score that is not finite nothing is known: any choice is allowed.
    """
    low_TE, high_TE = selection_TE - error_TE, selection_TE + error_TE
    everyone = torch.ones_like(selection_TE, dtype=torch.bool)
    certain_TE = possible_TE = everyone
    if router.num_groups > 1:
        group_low, group_high = (_group_score(values, router) for values in (low_TE, high_TE))
        # A sum of two scores is rounded once more, by far less than the scores' own error bounds.
        all_groups = torch.ones_like(group_low, dtype=torch.bool)
        may_TG, must_TG = _compete(group_low, group_high, all_groups, all_groups, router.num_groups_kept)
        size = router.num_experts // router.num_groups
        possible_TE, certain_TE = (kept.repeat_interleave(size, dim=1) for kept in (may_TG, must_TG))
        if router.group_fill == "zero":
            # Everyone competes: with 0 where the group is not kept, with either where that is not certain.
            low_TE, high_TE = (torch.where(certain_TE, own, torch.where(possible_TE, hull, 0.0))
                               for own, hull in ((low_TE, low_TE.clamp(max=0)), (high_TE, high_TE.clamp(min=0))))
            certain_TE = possible_TE = everyone
    may_TE, must_TE = _compete(low_TE, high_TE, certain_TE, possible_TE, router.top_k)
    known_T1 = (torch.isfinite(low_TE) & torch.isfinite(high_TE)).all(-1, keepdim=True)
    return AllowedChoice(may_TE | ~known_T1, must_TE & known_T1)


def _group_score(values_TE: torch.Tensor, router: Router) -> torch.Tensor:
    values_TGE = values_TE.unflatten(-1, (router.num_groups, -1))
    return values_TGE.amax(-1) if router.group_score == "max" else values_TGE.topk(2, dim=-1).values.sum(-1)


def broken_ties(ids_TK: torch.Tensor, logits_TE: torch.Tensor, selection_bias_E: torch.Tensor | None,
                router: Router) -> torch.Tensor:
    """Per token: an expert was passed over for one of higher id with the same logit and bias, in its own group.

    Tokens with a dropped slot are left out: who was dropped was not passed over.
    """
    num_experts = logits_TE.shape[1]
    chosen_TK = ids_TK.long().clamp(0, num_experts - 1)
    expert_E = torch.arange(num_experts)
    same_TEK = logits_TE[:, :, None] == logits_TE.gather(1, chosen_TK)[:, None, :]
    if selection_bias_E is not None:
        same_TEK &= selection_bias_E[None, :, None] == selection_bias_E[chosen_TK][:, None, :]
    size = num_experts // router.num_groups
    same_TEK &= (expert_E // size)[None, :, None] == (chosen_TK // size)[:, None, :]
    same_TEK &= expert_E[None, :, None] < chosen_TK[:, None, :]
    passed_over_TE = ~torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, chosen_TK, True)
    return (same_TEK & passed_over_TE[:, :, None]).any(-1).any(-1) & (ids_TK >= 0).all(-1)
