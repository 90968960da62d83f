"""Collects the comparison of one stage, block by block, into plain numbers."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from moe_ref.contract.vocabulary import Stage
from moe_ref.numerics.formats import half_cell, unit_in_last_place
from moe_ref.records.schema import StageResult, Statistic, Worst, to_number
from moe_ref.verify.bounds.rows import Rows, exact

TILE = 64
"""Columns per localisation tile."""
NAMED_TOKENS = 8


@dataclass(frozen=True)
class Place:
    """Where a block of compared elements sits: R rows of one expert and rank, columns from `column`.

    token_R: None for rows of a parameter, which start at `row`.
    """

    rank: int
    token_R: torch.Tensor | None
    slot_R: torch.Tensor | None = None
    expert: int | None = None
    column: int = 0
    row: int = 0


Watch = Callable[[torch.Tensor, Place], None]
"""Called with the ratios of a block, R x C, and its place."""

Watched = Mapping[Stage, Watch]


@dataclass
class StageMeter:
    """Collects one stage block by block; holds tensors only while a block is added.

    sigmas_allowed: how many predicted standard deviations an element may be off. whole_layer: stores are part of what
    is predicted, since those inside the layer are not known. exact: nothing is allowed. tainted_T: tokens that hold a
    NaN or an infinity before the layer: what is not finite in them must stay so, and of the rest nothing is said.
    """

    stage: Stage
    num_columns: int = 0
    largest: float = math.inf
    tainted_T: torch.Tensor | None = None
    sigmas_allowed: float = math.inf
    whole_layer: bool = False
    exact: bool = False
    watch: Watch | None = None
    sigmas: float = 0.0
    ratio: float = 0.0
    bound_ratio: float = 0.0
    power: float = 0.0
    worst: Worst | None = None
    num_checked: int = 0
    num_bad: int = 0
    tokens: set[int] = field(default_factory=set)
    experts: set[int] = field(default_factory=set)
    ranks: set[int] = field(default_factory=set)
    tiles: set[int] = field(default_factory=set)
    bias_sum: float = 0.0
    got_want: float = 0.0
    want_want: float = 0.0
    error_error: float = 0.0
    notes: list[str] = field(default_factory=list)
    statistics: list[Statistic] = field(default_factory=list)

    def add(self, got: torch.Tensor, want: Rows, place: Place) -> None:
        """Compare R x C elements; NaN where a number is wanted, or an infinity, counts as infinitely wrong.

        Where want + allowed passes the largest finite value of the stored format, an infinity of the right
        sign is right. Where the wanted value itself is not finite (a fault upstream), nothing is said.
        """
        want = exact(want.value) if self.exact else want
        got, value = got.double(), want.value
        if got.numel() == 0:
            return
        # One look at the sums: mostly all is finite, and what is said below of the rest can be left out.
        variance = want.bound if want.variance is None else want.variance
        clean = math.isfinite(float(got.sum() + value.sum() + want.bound.sum() + variance.sum()))
        allowed, beyond = self._allowed(got, want, clean)
        ratio = self._ratios(got, value, want.bound, clean)
        bounded = ratio
        regular = None if clean else torch.isfinite(got) & torch.isfinite(value)
        ratio = torch.maximum(ratio, beyond if regular is None else torch.where(regular, beyond, 0.0))
        if self.tainted_T is not None and place.token_R is not None:
            lost = torch.where(torch.isfinite(got) & ~torch.isfinite(value), math.inf, 0.0)
            ratio, bounded = (torch.where(self.tainted_T[place.token_R][:, None], lost, one)
                              for one in (ratio, bounded))
        if self.watch is not None:
            self.watch(ratio, place)
        self.bound_ratio = max(self.bound_ratio, float(bounded.max()))
        self.num_checked += ratio.numel()
        self._add_sums(got, value, allowed, regular)
        wanted = torch.where((value == 0) | ~torch.isfinite(value), 0.0, value.abs() / allowed)
        self.power = max(self.power, float(wanted.max()))
        top = float(ratio.max())
        if top > self.ratio or self.worst is None:
            self.ratio = max(self.ratio, top)
            self._keep_worst(int(ratio.argmax()), got, value, allowed, place)
        if top > 1.0:
            self._locate(ratio > 1.0, place)

    def _add_sums(self, got: torch.Tensor, value: torch.Tensor, allowed: torch.Tensor,
                  regular: torch.Tensor | None) -> None:
        """Sums over elements that are finite and of which something is said."""
        finite = (allowed > 0) | self.exact
        if regular is not None:
            finite = finite & regular & torch.isfinite(allowed)
        if not bool(finite.all()):
            got, value = torch.where(finite, got, 0.0), torch.where(finite, value, 0.0)
            allowed = torch.where(finite, allowed, 0.0)
        error = got - value
        self.bias_sum += float((error * value.sign() / allowed.clamp(min=1e-300)).masked_fill(
            allowed == 0, 0.0).sum())
        self.error_error += float((error * error).sum())
        self.got_want += float((got * value).sum())
        self.want_want += float((value * value).sum())

    def _allowed(self, got: torch.Tensor, want: Rows, clean: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The smaller of bound and what is likely, and the error beyond the stored number's cell over the latter.

        Likely are so many standard deviations beyond the cell.
        """
        # An infinite bound times a zero weight is NaN: still no bound. Nothing is said of such elements.
        bound = want.bound if clean else torch.nan_to_num(want.bound, nan=math.inf, posinf=math.inf)
        if want.variance is None or self.sigmas_allowed == math.inf:
            return bound, torch.zeros_like(bound)
        variance, cell, own_cell = want.variance, torch.zeros_like(bound), torch.zeros_like(bound)
        if want.unrounded is not None and want.stored is not None and not self.whole_layer:
            finite = got if clean else torch.nan_to_num(got)
            variance, cell = want.unrounded, half_cell(want.value, finite, want.stored)
            own_cell = unit_in_last_place(want.value if clean else torch.nan_to_num(want.value), want.stored) / 2
        sigma = (variance if clean else torch.nan_to_num(variance, nan=math.inf, posinf=math.inf)).sqrt()
        off = ((got - want.value).abs() - cell).clamp(min=0.0)
        # No bound, no expectation: beyond the largest finite number an infinity is right.
        beyond = torch.where((off == 0) | (bound == math.inf), 0.0, off / sigma)
        largest = float(beyond.max())
        if not math.isfinite(largest):
            largest = float(torch.nan_to_num(beyond, nan=0.0, posinf=0.0).max())
        self.sigmas = max(self.sigmas, largest)
        return torch.minimum(bound, own_cell + self.sigmas_allowed * sigma), beyond / self.sigmas_allowed

    def _ratios(self, got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor, clean: bool) -> torch.Tensor:
        error = (got - want).abs()
        if clean:
            return torch.where(error == 0, 0.0, error / bound)
        allowed = torch.nan_to_num(bound, nan=math.inf, posinf=math.inf)
        ratio = torch.where(error == 0, 0.0, error / allowed)
        ratio = torch.where(torch.isfinite(got), ratio, math.inf)
        overflow = torch.isinf(got) & (got.sign() == want.sign()) & (want.abs() + allowed >= self.largest)
        return torch.where(overflow | ~torch.isfinite(want) | torch.isinf(allowed), 0.0, ratio)

    def _keep_worst(self, flat: int, got: torch.Tensor, want: torch.Tensor, allowed: torch.Tensor,
                    place: Place) -> None:
        row, column = divmod(flat, got.shape[1])
        slot = None if place.slot_R is None else int(place.slot_R[row])
        token, place_row = (None, place.row + row) if place.token_R is None else (int(place.token_R[row]), None)
        self.worst = Worst(rank=place.rank, token=token, row=place_row, slot=slot, expert=place.expert,
                           column=place.column + column, got=to_number(float(got[row, column])),
                           want=to_number(float(want[row, column])), allowed=to_number(float(allowed[row, column])))

    def _locate(self, bad: torch.Tensor, place: Place) -> None:
        self.num_bad += int(bad.sum())
        if place.token_R is not None:
            self.tokens.update(place.token_R[bad.any(1)].tolist())
        columns = torch.nonzero(bad.any(0)).flatten() + place.column
        self.tiles.update((columns // TILE).tolist())
        self.ranks.add(place.rank)
        if place.expert is not None:
            self.experts.add(place.expert)

    def result(self) -> StageResult:
        """The numbers of the stage."""
        tiles = -(-self.num_columns // TILE)
        return StageResult(
            stage=self.stage, ratio=to_number(self.ratio), bound_ratio=to_number(self.bound_ratio),
            exact=self.exact, num_checked=self.num_checked,
            num_bad=self.num_bad,
            worst=self.worst, num_bad_tokens=len(self.tokens), bad_tokens=sorted(self.tokens)[:NAMED_TOKENS],
            bad_experts=sorted(self.experts), bad_ranks=sorted(self.ranks), bad_tiles=sorted(self.tiles),
            num_tiles=tiles, sigmas=to_number(self.sigmas), statistics=self.statistics,
            bias=to_number(self.bias_sum / max(1, self.num_checked)),
            scale=to_number(self.got_want / self.want_want if self.want_want else 1.0),
            bits=to_number(self._bits()), note="; ".join(self.notes))

    def _bits(self) -> float:
        """Effective bits; see StageResult."""
        if not self.error_error:
            return math.inf if self.want_want else 0.0
        return max(0.0, 0.5 * math.log2(self.want_want / self.error_error)) if self.want_want else 0.0
