"""From rows to the output: whose partial sum a row joins, and what every schedule makes of the sums."""

from dataclasses import dataclass, field, replace

import torch

from moe_ref.contract.parallel import Parallel
from moe_ref.contract.shares import RankShare
from moe_ref.contract.vocabulary import Schedule, SharedPlacement, Stage
from moe_ref.contract.volume import additions_between_ranks
from moe_ref.verify.bounds.rounding import FLUSH, ON_GRID, ORACLE_UNIT
from moe_ref.verify.bounds.rows import Partials, Rows, total_variance
from moe_ref.verify.bounds.steps import Steps


@dataclass
class Summing:
    """Partial sums of one layer, one per rank of the grid; a single one where rows are reduced before the merge.

    A rank's sum covers all tokens and columns, zero where the rank has no part. whole_shared: rows of a shared
    expert that joins after the reduction.
    """

    steps: Steps
    x_TH: torch.Tensor
    parallel: Parallel
    shares: tuple[RankShare, ...]
    partials: Partials = field(init=False)
    whole_shared: Rows | None = None

    def __post_init__(self) -> None:
        self.partials = Partials.zeros(1 if self.reduces_rows else self.parallel.size, self.x_TH)

    @property
    def reduces_rows(self) -> bool:
        """Whether rows are added up between ranks before they are merged."""
        return self.parallel.schedule is Schedule.ALL_REDUCE_ROWS

    @property
    def by_output(self) -> bool:
        """Whether ranks make columns of the output instead of partial sums."""
        return self.parallel.schedule is Schedule.GATHER

    def home_ep(self, token_R: torch.Tensor, server_R: torch.Tensor) -> torch.Tensor:
        """The ep rank in whose sums rows of these tokens end: where the token came from, else where it was served."""
        if not self.parallel.tokens.over_ep:
            return server_R
        ends = torch.tensor([share.merged_tokens[1] for share in self.shares[::self.parallel.tp]])
        return torch.searchsorted(ends, token_R, right=True)

    def add_routed(self, parts: list[Rows], token_R: torch.Tensor, server_R: torch.Tensor) -> None:
        """Rows of one expert as each tp rank adds them; server_R: the ep rank that serves each."""
        if self.reduces_rows:
            rows = self._between_ranks(parts, Stage.DOWN)
            self.partials.add(torch.zeros_like(token_R), token_R, rows, self.shares[0].outputs)
            return
        home_R = self.home_ep(token_R, server_R)
        for tp_rank, rows in enumerate(parts):
            rows = self._sent_home(rows) if self.parallel.tokens.over_ep else rows
            self.partials.add(home_R * self.parallel.tp + tp_rank, token_R, rows, self.shares[tp_rank].outputs)

    def _sent_home(self, rows: Rows) -> Rows:
        """Rows of which no store is declared, after their way back to their tokens in the reduction's format."""
        if self.steps.stored_in(Stage.DOWN) is not None:
            return rows
        # Weighted since, half an ulp of the row times the weight may be a whole one of their product.
        reduce, times = self.steps.numerics.reduce, 2 if self.steps.weighs_later else 1
        variance = total_variance(rows.variance, times**2 * self.steps.model.stored_variance(rows.value, reduce))
        return Rows(rows.value, rows.bound + times * self.steps.model.rounded(rows.largest, reduce), variance)

    def add_shared(self, parts: list[Rows]) -> None:
        """Rows of the shared expert as each rank of the grid adds them: of the tokens of its sum."""
        if self.parallel.shared is SharedPlacement.REPLICATED:
            self.whole_shared = parts[0]
            return
        groups: dict[tuple[int, int], list[int]] = {}
        for rank, share in enumerate(self.shares):
            groups.setdefault(share.merged_tokens, []).append(rank)
        for (start, stop), ranks in groups.items():
            token_T = torch.arange(start, stop)
            if self.reduces_rows:
                rows = self._between_ranks([parts[rank] for rank in ranks], Stage.SHARED)
                self.partials.add(torch.zeros_like(token_T), token_T, rows, self.shares[0].outputs)
                continue
            for rank in ranks:
                self.partials.add(torch.full_like(token_T, rank), token_T, parts[rank], self.shares[rank].outputs)

    def _between_ranks(self, parts: list[Rows], stage: Stage) -> Rows:
        """Rows added up between ranks, each addition rounded in the reduction's format, in whatever order."""
        if self.parallel.size == 1:
            return parts[0]
        value, bound, gauge, squares = (torch.stack(one).sum(0) for one in zip(
            *((rows.value, rows.bound, rows.largest, rows.value.square()) for rows in parts), strict=True))
        reduce, model = self.steps.numerics.reduce, self.steps.model
        # Rows in a wider format are rounded once each before they travel: those not stored, and those weighted since.
        travels_as = self.steps.stored_in(stage)
        if stage is Stage.DOWN and self.steps.weighs_later:
            travels_as = self.steps.numerics.merge
        first = 0 if travels_as == reduce else len(parts)
        added = [model.additions_variance(value, squares, len(parts), reduce)]
        added += [model.stored_variance(rows.value, reduce) for rows in parts[:first]]
        variance = total_variance(*(rows.variance for rows in parts), *added)
        return Rows(value, bound + (len(parts) - 1 + first) * model.rounded(gauge, reduce), variance)

    def merged(self, output_bias_H: torch.Tensor | None) -> Partials:
        """Sums of all addends as they are stored.

        What travels between ranks is rounded to the reduction's format even where no rounding of it is declared.
        """
        steps, partials, bias_H = self.steps, self.partials, output_bias_H
        shared = steps.spec.shared if self.parallel.shared is SharedPlacement.SHARDED else None
        value, bound, gauge = partials.value, partials.bound, partials.gauge
        variance, squares = partials.variance, partials.squares
        num_addends = steps.spec.top_k + (shared is not None)
        if shared is not None and shared.merge == "mean":
            # Halves are exact above the subnormals, whether they are taken of the sum or of each part.
            value, bound, gauge = value / 2, bound / 2 + steps.model.summed(torch.zeros_like(bound), 1), gauge / 2
            variance, squares = variance / 4, squares / 4
        if bias_H is not None and self.parallel.shared is SharedPlacement.SHARDED:
            num_addends, value, gauge, squares = num_addends + 1, value.clone(), gauge.clone(), squares.clone()
            for rank, tokens, columns in self._bias_adders():
                value[rank, tokens, columns] += bias_H[columns].double()
                gauge[rank, tokens, columns] += bias_H[columns].double().abs()
                squares[rank, tokens, columns] += bias_H[columns].double().square()
        bound, variance = (steps.summed(bound, gauge, num_addends),
                           variance + steps.additions(value, squares, num_addends))
        travels = len(value) > 1 and not self.by_output
        stored = steps.stored_in(Stage.MERGED) or (steps.numerics.reduce if travels else None)
        rows = steps.stored_as(Rows(value, bound, variance), stored)
        # What is summed may be stored in the same format: then more is rounded on average.
        grid = (ON_GRID - 1) * steps.model.stored_variance(value, stored)
        return Partials.of(replace(rows, variance=total_variance(rows.variance, grid)))

    def _bias_adders(self) -> list[tuple[int, slice, slice]]:
        """Which sums hold the output bias, for which tokens and columns."""
        everything = slice(None)
        if self.reduces_rows:
            return [(0, everything, everything)]
        if self.by_output:
            return [(share.rank, everything, slice(*share.outputs)) for share in self.shares]
        if self.parallel.tokens.over_ep:
            return [(share.rank, slice(*share.merged_tokens), everything) for share in self.shares
                    if share.tp_rank == 0]
        return [(0, everything, everything)]

    @property
    def _additions(self) -> int:
        """Additions between ranks that an element of the output may have seen."""
        return 0 if self.reduces_rows else additions_between_ranks(self.parallel)

    def reduced(self, partials: Partials, residual_TH: torch.Tensor | None, output_bias_H: torch.Tensor | None,
                bias_is_summed: bool) -> Rows:
        """The output: additions between ranks, each rounded in the reduction's format in whatever order, and the rest.

        A residual, a whole shared expert, and an output bias join any of the sums or their total, once.
        bias_is_summed: the bias sits in the partial sums for certain; otherwise it may still have to join.
        """
        steps, model = self.steps, self.steps.model
        value, bound, additions = partials.value.sum(0), partials.bound.sum(0), self._additions
        variance, squares = partials.variance.sum(0), partials.squares.sum(0)
        summed_in = steps.numerics.reduce if additions else steps.stored_in(Stage.MERGED)
        stored_in, gauge = steps.stored_in(Stage.REDUCED), partials.gauge.sum(0) + bound
        if whole := self.whole_shared:
            value, bound, gauge = value + whole.value, bound + whole.bound, gauge + whole.largest
            variance = variance + (torch.inf if whole.variance is None else whole.variance)
            squares, additions = squares + whole.value.square(), additions + 1
            if steps.spec.shared is not None and steps.spec.shared.merge == "mean":
                value, gauge, bound = value / 2, gauge / 2, bound / 2 + model.summed(torch.zeros_like(bound), 1)
                variance, squares = variance / 4, squares / 4
        comes_late = self.parallel.shared is SharedPlacement.REPLICATED
        added = [one.double() for one in (residual_TH, output_bias_H if comes_late else None) if one is not None]
        for one in added:
            value = value + one
        if output_bias_H is not None and not comes_late and not bias_is_summed:
            added.append(output_bias_H.double())
        for one in added:
            gauge, squares, additions = gauge + one.abs(), squares + one.square(), additions + 1
        # Without a declared format they are added up in that of every long sum.
        bound = bound + (additions * model.rounded(gauge, summed_in) if summed_in else model.summed(gauge, additions))
        # The truth itself is a sum in fp64, and in an order of its own.
        bound = bound + (len(partials.value) + len(added)) * ORACLE_UNIT * gauge
        before = variance + (additions * model.evaluation_unit * value).square() + (additions * FLUSH) ** 2
        # What one rank alone adds is in every later sum, or in none: then no order stands for the others.
        uneven = bool(added) or self.whole_shared is not None or steps.spec.experts.bias or (
            steps.spec.num_choices > steps.spec.num_experts)
        each = model.additions_variance(value, squares, additions + 1, summed_in or steps.numerics.accumulate,
                                        largest_first=uneven)
        rows = Rows(value, bound, before + each)
        if added or whole or summed_in != stored_in:
            return steps.stored_as(rows, stored_in)
        # The last addition is the store; what it rounds is taken out by the cell of the stored number.
        last = model.additions_variance(value, torch.zeros_like(value), 2, summed_in) if summed_in else each
        return Rows(value, bound, before + each, before + (each - last).clamp(min=0.0), summed_in)
