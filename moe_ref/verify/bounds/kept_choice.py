"""Set-valued capacity: which chosen slots a right router may keep, when choices and their order are intervals.

An expert keeps the first `limit` tokens in the order of its priority. A token surely stays when fewer than
`limit` others can come before it, and may stay when fewer than `limit` others surely do. Exact ties of weights
are left open, since only their order in memory could decide them.
"""

from dataclasses import dataclass

import torch

from moe_ref.contract.spec import Router
from moe_ref.verify.bounds.selection import AllowedChoice


@dataclass(frozen=True)
class KeptChoice:
    """chosen: what the scores allow; kept: what of it may or must stay."""

    chosen: AllowedChoice
    kept: AllowedChoice
    router: Router

    @property
    def unambiguous_T(self) -> torch.Tensor:
        """Tokens of which both the choice and what is left of it are known."""
        return self.chosen.unambiguous_T & self.kept.unambiguous_T

    def accepts(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """Per token: distinct ids, or -1; all that must stay, none that may not, and as many dropped as can be.

        Besides, no expert holds more than its limit, and none drops a token while it has room.
        """
        num_choices, dropped_TK = self.chosen.may_TE.shape[1], ids_TK == -1
        in_range_T = ((ids_TK >= -1) & (ids_TK < num_choices)).all(-1)
        shown_TE = shown_choices(ids_TK, num_choices)
        distinct_T = shown_TE.sum(-1) == (~dropped_TK).sum(-1)
        stays_T = ~(shown_TE & ~self.kept.may_TE).any(-1) & ~(self.kept.must_TE & ~shown_TE).any(-1)
        can_drop_TE = self.chosen.may_TE & ~self.kept.must_TE & ~shown_TE
        must_drop_T, num_dropped_T = (self.chosen.must_TE & ~shown_TE).sum(-1), dropped_TK.sum(-1)
        return in_range_T & distinct_T & stays_T & (must_drop_T <= num_dropped_T) & (
            num_dropped_T <= can_drop_TE.sum(-1)) & ~self._wrong_load(shown_TE)

    def _wrong_load(self, shown_TE: torch.Tensor) -> torch.Tensor:
        """Tokens of an expert above its limit, or that an expert dropped while it had room, (T,)."""
        wrong_TE = torch.zeros_like(shown_TE)
        for window, limit in windows(self.router, len(shown_TE)):
            load_E = shown_TE[window].sum(0)
            dropped_TE = self.chosen.must_TE[window] & ~shown_TE[window]
            wrong_TE[window] = (shown_TE[window] & (load_E > limit)) | (dropped_TE & (load_E < limit))
        return wrong_TE[:, :self.router.num_experts].any(-1)

    def whole(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """The choice before anything was dropped, (T, K): dropped slots hold missing experts, the surest first."""
        shown_TE = shown_choices(ids_TK, self.chosen.may_TE.shape[1])
        likely_TE = self.chosen.must_TE.int() + self.chosen.may_TE.int() - 4 * shown_TE.int()
        pool_TK = torch.sort(likely_TE, dim=-1, descending=True, stable=True).indices[:, :ids_TK.shape[1]]
        dropped_TK = ids_TK == -1
        number_TK = (dropped_TK.cumsum(-1) - 1).clamp(min=0)
        return torch.where(dropped_TK, pool_TK.gather(1, number_TK), ids_TK.long())


def shown_choices(ids_TK: torch.Tensor, num_choices: int) -> torch.Tensor:
    """True for every choice among the ids of a token, (T, E + Z)."""
    in_range_TK = (ids_TK >= 0) & (ids_TK < num_choices)
    padded_TE = torch.zeros(len(ids_TK), num_choices + 1, dtype=torch.bool)
    padded_TE.scatter_(1, torch.where(in_range_TK, ids_TK.long(), num_choices), True)
    return padded_TE[:, :num_choices]


def windows(router: Router, num_tokens: int) -> list[tuple[slice, int]]:
    """Runs of tokens that share a limit, and the limit; none without a capacity."""
    capacity = router.capacity
    if capacity is None:
        return []
    step = capacity.sequence_length or max(1, num_tokens)
    ends = [(start, min(num_tokens, start + step)) for start in range(0, num_tokens, step)]
    return [(slice(start, stop), capacity.limit(stop - start, router.top_k, router.num_experts))
            for start, stop in ends]


def kept_choice(chosen: AllowedChoice, low_TE: torch.Tensor, high_TE: torch.Tensor,
                router: Router) -> KeptChoice:
    """What may and must stay. low, high: intervals of what orders tokens and slots: the selection score for
    priority "choice", the weight before any scale for "weight"; not read for "token"."""
    may_TE, must_TE = chosen.may_TE.clone(), chosen.must_TE.clone()
    capacity = router.capacity
    if capacity is None:
        return KeptChoice(chosen, chosen, router)
    if capacity.priority == "choice":
        low_TE, high_TE = _slot_intervals(chosen, low_TE, high_TE)
    elif capacity.priority == "weight":
        low_TE, high_TE = -high_TE, -low_TE
    else:
        low_TE = high_TE = torch.zeros_like(may_TE, dtype=torch.float64)
    for window, limit in windows(router, len(may_TE)):
        for e in range(router.num_experts):
            token_R = window.start + chosen.may_TE[window, e].nonzero().flatten()
            surely_R, possibly_R = _before(low_TE[token_R, e], high_TE[token_R, e], chosen.must_TE[token_R, e],
                                           ties_open=capacity.priority == "weight")
            may_TE[token_R, e] = surely_R < limit
            must_TE[token_R, e] &= possibly_R < limit
    return KeptChoice(chosen, AllowedChoice(may_TE, must_TE), router)


def _before(low_R: torch.Tensor, high_R: torch.Tensor, must_R: torch.Tensor,
            ties_open: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """How many others come before each for certain, and how many can; equal keys go to the lower token."""
    lower_RR = torch.ones(len(low_R), len(low_R), dtype=torch.bool).triu(1)  # [other, one]: the other is lower
    surely_RR, possibly_RR = high_R[:, None] < low_R[None, :], low_R[:, None] < high_R[None, :]
    if ties_open:
        possibly_RR |= low_R[:, None] == high_R[None, :]
    else:
        surely_RR |= (high_R[:, None] == low_R[None, :]) & lower_RR
        possibly_RR |= (low_R[:, None] == high_R[None, :]) & lower_RR
    # What is not a number can come anywhere.
    possibly_RR |= torch.isnan(low_R[:, None] + high_R[None, :])
    possibly_RR.fill_diagonal_(False)
    return (surely_RR & must_R[:, None]).sum(0), possibly_RR.sum(0)


def _slot_intervals(chosen: AllowedChoice, low_TE: torch.Tensor,
                    high_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fewest and most chosen experts that stand before each in its token's own order."""
    above_TEE = (low_TE[:, :, None] > high_TE[:, None, :]) & chosen.must_TE[:, :, None]
    maybe_TEE = ~(high_TE[:, :, None] < low_TE[:, None, :]) & chosen.may_TE[:, :, None]
    return above_TEE.sum(1).double(), maybe_TEE.sum(1).double() - chosen.may_TE.double()
