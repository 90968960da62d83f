"""How alike the errors of a token's columns are: from a sample of tokens and columns, what a mean square may be."""

import math

import torch

from moe_ref.contract.vocabulary import Format
from moe_ref.numerics.formats import unit_in_last_place
from moe_ref.verify.bounds.rows import Rows

TOKENS, COLUMNS = 16, 64
"""Sampled: enough for a mean of squared correlations, and a small share of the products of w2."""


def spread_evenly(count: int, most: int) -> torch.Tensor:
    """At most so many of `count` places, in equal steps."""
    kept = min(count, most)
    return torch.arange(kept) * count // max(1, kept)


class SharedErrors:
    """Covariances, between sampled columns, of the errors that a token's columns share; of sampled tokens.

    coarsest: the narrowest format that sums of rows are stored in, if any. Where one activation makes a row, its stores
    round multiples of one number, so that all their errors follow from that number: as one error, of that variance.
    """

    def __init__(self, num_tokens: int, width: int, coarsest: Format | None) -> None:
        self.coarsest = coarsest
        self.token_S, self.column_C = spread_evenly(num_tokens, TOKENS), spread_evenly(width, COLUMNS)
        self.place_T = torch.full((num_tokens,), -1)
        self.place_T[self.token_S] = torch.arange(len(self.token_S))
        self.covariance_SCC = torch.zeros(len(self.token_S), *(len(self.column_C),) * 2, dtype=torch.float64)
        self.repeated_SC = torch.zeros(len(self.token_S), len(self.column_C), dtype=torch.float64)

    def of_activations(self, token_R: torch.Tensor, w2_HI: torch.Tensor, act: Rows, factor_R1: torch.Tensor) -> None:
        """Those of activations (R, I), which w2 takes to every column and a factor multiplies."""
        chosen_R = self.place_T[token_R] >= 0
        if not bool(chosen_R.any()):
            return
        place_R = self.place_T[token_R[chosen_R]]
        if act.variance is None:
            self.covariance_SCC[place_R] = torch.inf
            return
        w2_CI = w2_HI[self.column_C].double()
        rows = zip(place_R.tolist(), *(one[chosen_R].double() for one in (act.value, act.variance, factor_R1)),
                   strict=True)
        for place, value_I, variance_I, factor in rows:
            self.covariance_SCC[place] += factor.square() * ((w2_CI * variance_I) @ w2_CI.T)
            if self.coarsest is not None:
                self._repeat(place, factor * w2_CI * value_I, self.coarsest)

    def _repeat(self, place: int, term_CI: torch.Tensor, coarsest: Format) -> None:
        """Count the store of sums of which all terms but the largest are together less than a unit."""
        square_CI, unit_C = term_CI.square(), unit_in_last_place(term_CI.sum(-1), coarsest)
        rest_C = square_CI.sum(-1) - square_CI.amax(-1)
        self.repeated_SC[place] += torch.where(rest_C < unit_C.square(), unit_C.square() / 12, 0.0)

    def along(self, token_R: torch.Tensor, direction_RH: torch.Tensor, variance_R1: torch.Tensor) -> None:
        """One error per row that all columns have in proportion to a direction, as that of a routing weight."""
        chosen_R = self.place_T[token_R] >= 0
        direction_RC = direction_RH[chosen_R][:, self.column_C].double()
        outer_RCC = variance_R1[chosen_R].double()[:, :, None] * direction_RC[:, :, None] * direction_RC[:, None, :]
        self.covariance_SCC.index_add_(0, self.place_T[token_R[chosen_R]], outer_RCC)

    def rms_allowed(self, variance_TH: torch.Tensor, known_TH: torch.Tensor, distinct: int, base: float,
                    alpha: float) -> float:
        """What the root mean square of known errors over their sigmas exceeds with probability alpha at most.

        A mean square of normal errors is sum l_i g_i^2 with independent g_i, sum l_i = 1. With q = sum l_i^2, the mean
        squared correlation, and m the largest l_i, it exceeds 1 + 2 sqrt(q t) + 2 m t with probability exp(-t) at most:
        Laurent and Massart, Ann. Statist. 28 (2000), lemma 1. base: what predicted sigmas may be too small by. Between
        different columns q is measured in the sample, and m^2 is at most q of one token. distinct: of so many values
        at most the errors differ.
        """
        known_SC = known_TH[self.token_S][:, self.column_C]
        sigma_SC = variance_TH[self.token_S][:, self.column_C].double().sqrt()
        correlation_SCC = self.covariance_SCC / (sigma_SC[:, :, None] * sigma_SC[:, None, :])
        # What is not predicted may all be one error.
        square_SCC = torch.nan_to_num(correlation_SCC, nan=1.0, posinf=1.0, neginf=1.0).clamp(-1.0, 1.0).square()
        pair_SCC = known_SC[:, :, None] & known_SC[:, None, :] & ~torch.eye(len(self.column_C), dtype=torch.bool)
        pairs_S = pair_SCC.sum((1, 2))
        q_S = torch.where(pair_SCC, square_SCC, 0.0).sum((1, 2)) / pairs_S.clamp(min=1)
        repeated_SC = torch.where(known_SC, (self.repeated_SC / sigma_SC.square()).nan_to_num(1.0).clamp(max=1.0), 0.0)
        q_S += (repeated_SC.sum(1) / known_SC.sum(1).clamp(min=1)).square()
        tokens, number = max(1, int(known_TH.any(-1).sum())), max(1, min(int(known_TH.sum()), distinct))
        sampled = max(1, int((pairs_S > 0).sum()))
        q = float(q_S.sum()) / sampled / tokens + 1 / number
        largest = max(max(q_S.tolist(), default=0.0) ** 0.5 / tokens, 1 / number)
        t = -math.log(alpha)
        return math.sqrt(base**2 + 2 * math.sqrt(q * t) + 2 * largest * t)
