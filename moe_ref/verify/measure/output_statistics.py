"""Statistics of a whole layer's errors: each a sum over many elements, so that what hides in one shows in all.

    rms      root mean square of error / predicted, over all elements
    sign     errors along the sign of the output: a store that truncates, a scale
    slots    errors along one routed row's part of its token: a wrong weight, a wrong row
    ranks    errors along one tp rank's part of a routed row, in two rows of each expert: a partial sum lost

Errors of a token are correlated between columns, since they share the errors of its activations and of its weights, so
a sum along a direction v has the variance  w^2 sum v_act (w2^T v)^2 + v_w (v . row)^2  of each row, besides that of
independent errors. The last is taken as the whole predicted variance: some is counted twice, on the safe side.
"""

from dataclasses import dataclass, field, replace

import torch

from moe_ref.contract.parallel import Range
from moe_ref.contract.vocabulary import Format
from moe_ref.numerics.formats import round_to, unit_in_last_place
from moe_ref.records.schema import Statistic, to_number
from moe_ref.tolerances.quantile import tau
from moe_ref.tolerances.schema import OutputCheck
from moe_ref.verify.bounds.rows import Rows, relative_variance
from moe_ref.verify.measure.shared_errors import SharedErrors

SAMPLED_ROWS = 2
"""Rows per expert whose parts by rank are looked at: a partial sum that is lost is lost in all of them."""
_ROWS = 128
"""Rows of w2 that are converted at once."""
COHERENT = 1 / 32
"""Share of its sigma that an error may have as mean: short operands fall on ties, equal numbers err alike."""
_UNITS = 4.0
"""Below so many units of the coarsest store a row's part is not looked at."""
_DEGREE = 3.0
"""How much more than its weight a row of weighted tokens may change: the activation times up."""
LARGEST_KEPT = 2**25
"""Elements of directions that are kept until the truth is known; rows beyond that are left out, and counted."""


@dataclass(frozen=True)
class Beside:
    """What joins routed rows, so that less is said of sums of errors.

    late: something added after the merge: what is small beside it is lost in the last store, and errors follow rows.
    shared: a shared expert, whose errors lie along routed rows in ways that are not followed.
    """

    late: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Largest:
    """The largest sum along a direction in standard deviations, and whose direction it is."""

    value: float = 0.0
    token: int | None = None
    expert: int | None = None
    rank: int | None = None


@dataclass(frozen=True)
class _Part:
    """Directions v (N, H) of tokens, in fp32, and the variance that each has besides independent errors."""

    token_N: torch.Tensor
    v_NH: torch.Tensor
    shared_N: torch.Tensor
    expert: int
    rank: int | None


@dataclass
class Directions:
    """Directions along which errors are added up when the truth is known."""

    parts: list[_Part] = field(default_factory=list)
    number: int = 0

    def add(self, token_N: torch.Tensor, v_NH: torch.Tensor, shared_N: torch.Tensor, expert: int,
            rank: int | None = None) -> None:
        """Remember N directions of one expert, or of one rank's part of it."""
        self.parts.append(_Part(token_N, v_NH.float(), shared_N, expert, rank))
        self.number += len(token_N)

    def largest(self, error_TH: torch.Tensor, variance_TH: torch.Tensor, drift_TH: torch.Tensor,
                rows: "RowDirections") -> Largest:
        """Largest sum of errors along a direction, less its drift, in standard deviations; 0: nothing predicted."""
        worst = Largest()
        for part in self.parts:
            along_N = (part.v_NH * error_TH[part.token_N]).sum(-1)
            drift_N = (part.v_NH * drift_TH[part.token_N]).abs().sum(-1)
            along_N = (along_N.abs() - drift_N).clamp(min=0.0)
            independent_N = (part.v_NH.double().square() * variance_TH[part.token_N]).sum(-1)
            sigma_N = (part.shared_N + rows.shared_along(part) + independent_N).sqrt()
            z_N = torch.nan_to_num(torch.where(along_N == 0, 0.0, along_N.abs() / sigma_N), nan=0.0)
            if len(z_N) and float(z_N.max()) > worst.value:
                index = int(z_N.argmax())
                worst = Largest(float(z_N[index]), int(part.token_N[index]), part.expert, part.rank)
        return worst


class RowDirections:
    """Directions of all routed rows by token, (T, K, H): errors that one row shares lie along the others' too.

    What a row shares along any v is taken as what it shares along its own direction, times the square of v's part in
    that: exact for parallel rows, as of data of one sign, and small for others.
    """

    def __init__(self, slots: Directions, num_tokens: int, width: int) -> None:
        count_T = torch.zeros(num_tokens, dtype=torch.int64)
        places = []
        for part in slots.parts:
            places.append(count_T[part.token_N].clone())
            count_T[part.token_N] += 1
        most = int(count_T.max()) if num_tokens else 0
        self.v_TKH, self.shared_TK = torch.zeros(num_tokens, most, width), torch.zeros(num_tokens, most).double()
        self.expert_TK = torch.full((num_tokens, most), -1)
        for part, place_N in zip(slots.parts, places, strict=True):
            self.v_TKH[part.token_N, place_N] = part.v_NH
            self.shared_TK[part.token_N, place_N] = part.shared_N
            self.expert_TK[part.token_N, place_N] = part.expert
        self.size_TK = self.v_TKH.square().sum(-1)

    def shared_along(self, part: _Part) -> torch.Tensor:
        """Variance along the directions of a part that the other rows of its tokens share, (N,)."""
        rows_NKH, size_NK = self.v_TKH[part.token_N], self.size_TK[part.token_N]
        share_NK = torch.einsum("nh,nkh->nk", part.v_NH, rows_NKH) / size_NK.clamp(min=1e-30)
        others_NK = self.expert_TK[part.token_N] != part.expert
        along_NK = share_NK.double().square() * self.shared_TK[part.token_N]
        return torch.where(others_NK, along_NK, 0.0).sum(-1)


class OutputStatistics:
    """Collects directions while rows of experts pass by, and makes numbers of them when the truth is known.

    y_TH: what the subject returned, one copy of every token. A direction is scaled to 1 at its largest element.
    """

    def __init__(self, y_TH: torch.Tensor, check: OutputCheck, rows: int, coarsest: Format | None,
                 beside: Beside) -> None:
        self.finite_TH, self.check = torch.isfinite(y_TH), check
        self.y_TH = torch.where(self.finite_TH, y_TH.double(), 0.0)
        size_TH = self.y_TH.abs()
        # Errors grow with the result where it is large, and with the rest of its token where it is small.
        self.scale_TH = (size_TH + size_TH.square().mean(-1, keepdim=True).sqrt()).clamp(min=1e-300)
        self.sign_TH = self.y_TH.sign() / self.scale_TH
        self.sign_shared_T = torch.zeros(len(y_TH), dtype=torch.float64)
        self.alike = SharedErrors(len(y_TH), y_TH.shape[1], coarsest)
        self.drift_TH = torch.zeros_like(self.y_TH)
        self.unpredicted_T = torch.zeros(len(y_TH), dtype=torch.bool)
        self.slots, self.ranks, self.left_out = Directions(), Directions(), 0
        self.coarsest, self.beside = coarsest, beside
        self.keep = rows * y_TH.shape[1] <= LARGEST_KEPT

    def routed(self, token_R: torch.Tensor, w2_HI: torch.Tensor, act: Rows, weight: Rows, added_RH: torch.Tensor,
               cuts: list[Range], weight_in_act: bool, expert: int) -> None:
        """Rows of one expert: activations (R, I), weights (R, 1), what they add, and the columns of each tp rank.

        weight_in_act: the activations hold the weight already.
        """
        if weight_in_act:
            weight = replace(weight, value=torch.ones_like(weight.value), variance=relative_variance(weight))
        sign_RH = self.sign_TH[token_R]
        self.sign_shared_T.index_add_(0, token_R, _shared(sign_RH, w2_HI, act, weight, added_RH))
        self._alike(token_R, w2_HI, act, weight, added_RH)
        if not self.keep:
            self.left_out += len(token_R)
            return
        v_RH = self._direction(added_RH, token_R)
        self.slots.add(token_R, v_RH, _shared(v_RH, w2_HI, act, weight, added_RH), expert)
        if len(cuts) > 1:
            some = slice(0, SAMPLED_ROWS)
            for rank, (start, stop) in enumerate(cuts):
                part_RH = act.value[some, start:stop].float() @ w2_HI[:, start:stop].float().T
                v_RH = self._direction(weight.value[some] * part_RH, token_R[some])
                self.ranks.add(token_R[some], v_RH,
                               _shared(v_RH, w2_HI, act.rows(some), weight.rows(some), added_RH[some]), expert, rank)

    def drifts(self, token_R: torch.Tensor, outputs: Range, drift_RH: torch.Tensor) -> None:
        """What sums that are cut off lose in these rows on average, in the columns `outputs`."""
        self.drift_TH[:, slice(*outputs)].index_add_(0, token_R, drift_RH)

    def unpredicted(self, token_R: torch.Tensor, weight: Rows, added_RH: torch.Tensor) -> None:
        """Rows whose errors are shared by columns in a way that is not followed: nothing is said of their sums."""
        self.unpredicted_T[token_R] = True
        self.alike.along(token_R, _DEGREE * added_RH, relative_variance(weight))

    def shared(self, w2_HI: torch.Tensor, act: Rows, gate: Rows, added_TH: torch.Tensor) -> None:
        """Rows of the shared expert, of all tokens."""
        self.sign_shared_T += _shared(self.sign_TH, w2_HI, act, gate, added_TH)
        self._alike(torch.arange(len(added_TH)), w2_HI, act, gate, added_TH)

    def _alike(self, token_R: torch.Tensor, w2_HI: torch.Tensor, act: Rows, weight: Rows,
               added_RH: torch.Tensor) -> None:
        self.alike.of_activations(token_R, w2_HI, act, weight.value)
        self.alike.along(token_R, added_RH, relative_variance(weight))

    def _direction(self, part_RH: torch.Tensor, token_R: torch.Tensor) -> torch.Tensor:
        """Along a part of the output, where it is some units of the coarsest store: what is smaller is lost in stores.

        The error of such a store follows the part, also in a right layer.
        """
        scale_RH = self.scale_TH[token_R]
        v_RH = part_RH / scale_RH.square()
        if self.coarsest is not None:
            v_RH = torch.where(part_RH.abs() < _UNITS * unit_in_last_place(scale_RH, self.coarsest), 0.0, v_RH)
        return v_RH / v_RH.abs().amax(-1, keepdim=True).clamp(min=1e-300)

    def finish(self, output: Rows, error_TH: torch.Tensor | None = None) -> list[Statistic]:
        """All statistics of the tokens whose variance is known; error_TH: to be looked at in place of the subject's."""
        assert output.variance is not None
        error_TH = self.y_TH - output.value if error_TH is None else error_TH
        variance_TH = output.variance
        known_TH = (self.finite_TH & torch.isfinite(error_TH) & torch.isfinite(output.bound)
                    & torch.isfinite(variance_TH) & (variance_TH > 0))
        error_TH = torch.where(known_TH, error_TH, 0.0)
        variance_TH = torch.where(known_TH, variance_TH, 0.0)
        # Numbers that a store makes equal err alike where sums of stored numbers are stored again, so that no more
        # errors are independent than numbers are different; of the truth, since a subject's own may all be the same.
        kept = output.value[known_TH]
        distinct = len((kept if self.coarsest is None else round_to(kept, self.coarsest)).unique())
        found = [self._rms(error_TH, variance_TH, known_TH, distinct)]
        if self.beside.late:
            return found
        found.append(self._sign(error_TH, variance_TH, distinct))
        if self.beside.shared:
            return [one for one in found if one.name == "rms" or one.name in self.check.filters]
        rows = RowDirections(self.slots, *error_TH.shape)
        for name, directions in (("slots", self.slots), ("ranks", self.ranks)):
            if directions.number:
                largest = directions.largest(error_TH, variance_TH, self.drift_TH, rows)
                found.append(self._statistic(name, largest, directions.number))
        return [one for one in found if one.name == "rms" or one.name in self.check.filters]

    def _sign(self, error_TH: torch.Tensor, variance_TH: torch.Tensor, distinct: int) -> Statistic:
        """Of all tokens whose errors are followed; less the drift, which may be anything up to what is predicted."""
        followed_T1 = ~self.unpredicted_T[:, None]
        sign_TH = self.sign_TH * followed_T1
        shared = float(torch.nan_to_num(self.sign_shared_T, nan=torch.inf)[followed_T1[:, 0]].sum())
        repeated = max(1.0, int((variance_TH > 0).sum()) / max(1, distinct))
        variance = shared + repeated * float((sign_TH.square() * variance_TH).sum())
        mean_TH = self.drift_TH.abs() + COHERENT * variance_TH.sqrt()
        along = abs(float((sign_TH * error_TH).sum())) - float((sign_TH.abs() * mean_TH).sum())
        return self._statistic("sign", Largest(max(0.0, along) / variance**0.5 if variance > 0 else 0.0), 1)

    def _statistic(self, name: str, found: Largest, number: int) -> Statistic:
        allowed = self.check.sigmas_factor * tau(max(1, number), self.check.alpha)
        return Statistic(name=name, value=to_number(found.value), allowed=to_number(allowed), number=number,
                         token=found.token, expert=found.expert, rank=found.rank)

    def _rms(self, error_TH: torch.Tensor, variance_TH: torch.Tensor, known_TH: torch.Tensor,
             distinct: int) -> Statistic:
        number = int(known_TH.sum())
        if number == 0:
            return Statistic(name="rms", value=0.0, allowed=1.0, number=0)
        value = float((error_TH.square() / variance_TH.clamp(min=1e-300)).sum() / number) ** 0.5
        allowed = self.alike.rms_allowed(variance_TH, known_TH, distinct, self.check.rms_base, self.check.alpha)
        return Statistic(name="rms", value=to_number(value), allowed=to_number(allowed), number=number)


def _shared(v_RH: torch.Tensor, w2_HI: torch.Tensor, act: Rows, weight: Rows, added_RH: torch.Tensor) -> torch.Tensor:
    """Variance along v of the errors that the columns of a row share, (R,)."""
    if act.variance is None:
        return torch.full((len(v_RH),), torch.inf, dtype=torch.float64)
    scale_R1 = v_RH.abs().amax(-1, keepdim=True).clamp(min=1e-300)
    along_RI = torch.zeros(len(v_RH), w2_HI.shape[1])
    for start in range(0, len(w2_HI), _ROWS):
        along_RI.addmm_((v_RH[:, start:start + _ROWS] / scale_R1).float(), w2_HI[start:start + _ROWS].float())
    of_act = (act.variance * along_RI.square_()).sum(-1) * (weight.value * scale_R1).square()[:, 0]
    return of_act + relative_variance(weight)[:, 0] * (v_RH * added_RH).sum(-1).square()
