"""Layers with one fault each in how they are spread over ranks."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch

from moe_ref.contract.hosting import serving_copies
from moe_ref.contract.parallel import Range, cut
from moe_ref.contract.shares import RankShare
from moe_ref.contract.vocabulary import Schedule, Stage
from moe_ref.contract.weights import ExpertWeights
from moe_ref.verify.diagnosis.known import Known
from moe_ref.verify.diagnosis.layer import Layer
from moe_ref.verify.measure.placing import servers


class OverTP(Layer):
    """Faults of layers that are cut over tp."""

    first = Stage.GATE_UP

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        return (None,) * (known.case.parallel.tp > 1)


class OfGatedTP(OverTP):
    """Faults of rows of w13 that a loader cuts; parts of ranks are equal."""

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        spec, parallel = known.case.problem.spec, known.case.parallel
        widths = {stop - start for start, stop in parallel.ranges(spec.intermediate_size)}
        return (None,) * (parallel.tp > 1 and spec.experts.gated and len(widths) == 1)

    def weights_of(self, expert: int) -> ExpertWeights:
        whole = super().weights_of(expert)
        bias_GI = whole.w13_bias_GI
        bias_GI = bias_GI if bias_GI is None else self.of_wrong_rows(bias_GI[..., None])[..., 0]
        return whole._replace(w13_GIH=self.of_wrong_rows(whole.w13_GIH), w13_bias_GI=bias_GI)

    def of_wrong_rows(self, whole_GIH: torch.Tensor) -> torch.Tensor:
        """What the ranks hold, each where its own columns belong."""
        raise NotImplementedError


class MergedAxisCutAsOne(OfGatedTP):
    words = "D04 merged gate and up rows cut as one axis"

    def of_wrong_rows(self, whole_GIH: torch.Tensor) -> torch.Tensor:
        parts = whole_GIH.flatten(0, 1).unflatten(0, (self.parallel.tp, 2, -1))
        return parts.transpose(0, 1).flatten(1, 2)


class UpOfAnotherRank(OfGatedTP):
    words = "K09 gate rows of a rank beside up rows of another"

    def of_wrong_rows(self, whole_GIH: torch.Tensor) -> torch.Tensor:
        up_IH = whole_GIH[1].unflatten(0, (self.parallel.tp, -1)).flip(0).flatten(0, 1)
        return torch.stack([whole_GIH[0], up_IH])


class EvenSplitAssumed(OverTP):
    words = "F13 I / tp columns assumed on every rank"
    first = Stage.DOWN

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        return (None,) * (known.case.parallel.tp > 1 and known.case.parallel.schedule is not Schedule.GATHER)

    def inner(self, share: RankShare) -> Range:
        start, stop = super().inner(share)
        return start, min(stop, start + self.spec.intermediate_size // self.parallel.tp)


class IdsNotShifted(Layer):
    """Variants: what is done with an id beyond the experts that the rank has."""

    words = "K10 expert ids not shifted by what the ep rank hosts"
    first = Stage.GATE_UP

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        return ("clamped", "modulo") if known.case.parallel.ep > 1 and len(known.case.parallel.redundant) == 0 else ()

    def weights_of(self, expert: int) -> ExpertWeights:
        hosted = self.parallel.hosted(self.spec.num_experts)
        host_11 = serving_copies(torch.tensor([[expert]]), self.parallel, self.spec.num_experts)[0]
        experts = hosted[int(host_11)]
        index = min(expert, len(experts) - 1) if self.variant == "clamped" else expert % len(experts)
        return super().weights_of(experts[index])


class BiasTimesTP(OverTP):
    words = "F01 bias of w2 added by every tp rank"
    first = Stage.DOWN

    def adds_bias(self, share: RankShare) -> bool:
        return True


class IdentityTimesTP(OverTP):
    words = "identity experts added by every tp rank"
    first = Stage.DOWN

    def adds_identity(self, share: RankShare) -> bool:
        return True


class OutputBiasTimesRanks(Layer):
    words = "F01 bias of the output added by every rank"
    first = Stage.MERGED

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        return (None,) * (known.case.problem.spec.output_bias and known.case.parallel.size > 1)

    def adds_output_bias(self, share: RankShare) -> bool:
        return True


class ActGatheredInOtherOrder(OverTP):
    words = "K08 gathered columns of the activation in another order of ranks"
    first = Stage.DOWN

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        parallel = known.case.parallel
        equal = known.case.problem.spec.intermediate_size % parallel.tp == 0
        by_output = parallel.tp > 1 and parallel.schedule is Schedule.GATHER
        return (("reverse", "alternating") if equal else ("reverse",)) if by_output else ()

    def fed_act(self, row_R: torch.Tensor) -> torch.Tensor:
        parts = [super(ActGatheredInOtherOrder, self).fed_act(row_R)[:, start:stop]
                 for start, stop in self.parallel.ranges(self.spec.intermediate_size)]
        return torch.cat(parts[::-1], 1) if self.variant == "reverse" else torch.stack(parts, 2).flatten(1)


class WeightsInReverse(OverTP):
    words = "K08 routing weights of the ranks gathered in reverse order"

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        return (None,) * (known.case.parallel.tokens.over_tp and known.case.parallel.tp > 1)

    def row_weights(self, weights_TK: torch.Tensor) -> torch.Tensor:
        cuts = [slice(*share.tokens) for share in self.shares[:self.parallel.tp]]
        reverse_TK = torch.cat([weights_TK[cut] for cut in reversed(cuts)])
        return torch.cat([reverse_TK, weights_TK[len(reverse_TK):]])


class RowsBackReversed(Layer):
    words = "K08 rows that come back from another rank in reverse order"
    first = Stage.MERGED

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        return (None,) * known.case.parallel.tokens.over_ep

    def slots(self, rows_PTKH: torch.Tensor) -> torch.Tensor:
        rows_PRH, server_TK = rows_PTKH.flatten(1, 2), servers(self.stage(Stage.IDS), self.case, self.shares)
        back_PRH = rows_PRH.clone()
        for home in range(self.parallel.ep):
            for server in range(self.parallel.ep):
                row_R = ((self.home_R == home) & (server_TK.flatten() == server)).nonzero().flatten()
                back_PRH[:, row_R] = rows_PRH[:, row_R.flip(0)]
        return back_PRH.view_as(rows_PTKH)


class OfRanks(Layer):
    """Faults of layers with several ranks, in how their sums become the result."""

    first = Stage.REDUCED

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        return (None,) * (known.case.parallel.size > 1)


class Residuals(Layer):
    """Variants: how often the residual is in the result."""

    words = "F02 residual added {} times"
    first = Stage.REDUCED

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        parallel = known.case.parallel
        return sorted({0, 2, parallel.tp, parallel.ep, parallel.size} - {1}) if known.case.problem.residual else ()

    @property
    def residuals(self) -> float:
        return self.variant


class NotReduced(OfRanks):
    words = "sums of the ranks not added up"

    def summed(self, merged_PTH: torch.Tensor) -> torch.Tensor:
        return merged_PTH


class ReducedTwice(OfRanks):
    """Variants: by how much the sum grows."""

    words = "F09 sum of the ranks added up again, {} times the result"

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        parallel = known.case.parallel
        return sorted({parallel.tp, parallel.ep, parallel.size} - {1})

    def summed(self, merged_PTH: torch.Tensor) -> torch.Tensor:
        return super().summed(merged_PTH) * self.variant


class MeanForSum(OfRanks):
    words = "mean of the ranks' sums for their sum"

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        return ReducedTwice.variants(known)

    def summed(self, merged_PTH: torch.Tensor) -> torch.Tensor:
        return super().summed(merged_PTH) / self.variant


class OverTheWrongGroup(OfRanks):
    words = "F07 reduced over the {} ranks alone"

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        return ("tp", "ep") if min(known.case.parallel.tp, known.case.parallel.ep) > 1 else ()

    def summed(self, merged_PTH: torch.Tensor) -> torch.Tensor:
        tp, own_PTH = self.parallel.tp, self.at_own_place(merged_PTH)
        axis = 1 if self.variant == "tp" else 0
        return self.at_home(own_PTH.unflatten(0, (-1, tp)).sum(axis, keepdim=True).expand(
            self.parallel.ep, tp, *own_PTH.shape[1:]).flatten(0, 1), merged_PTH)

    def at_own_place(self, merged_PTH: torch.Tensor) -> torch.Tensor:
        """Every rank's tokens from row 0 on, as its memory has them."""
        own_PTH = torch.zeros_like(merged_PTH)
        for share in self.shares:
            start, stop = share.merged_tokens
            own_PTH[share.rank, :stop - start] = merged_PTH[share.rank, start:stop]
        return own_PTH

    def at_home(self, own_PTH: torch.Tensor, merged_PTH: torch.Tensor) -> torch.Tensor:
        """The reverse."""
        home_PTH = torch.zeros_like(merged_PTH)
        for share in self.shares:
            start, stop = share.merged_tokens
            home_PTH[share.rank, start:stop] = own_PTH[share.rank, :stop - start]
        return home_PTH


class OverAllRanks(OverTheWrongGroup):
    words = "F07 reduced over ranks that have other tokens"

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        return (None,) * (known.case.parallel.tokens.over_ep and known.case.parallel.size > 1)

    def summed(self, merged_PTH: torch.Tensor) -> torch.Tensor:
        total_PTH = self.at_own_place(merged_PTH).sum(0, keepdim=True).expand_as(merged_PTH)
        return self.at_home(total_PTH, merged_PTH)


class PartsInOtherOrder(OfRanks):
    """Variants: parts of the result in reverse, or each rank with that of the next or of the one before."""

    words = "K08 parts of the ranks in another order"

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        parallel = known.case.parallel
        cuts = parallel.schedule in (Schedule.GATHER, Schedule.REDUCE_SCATTER) and parallel.tp > 1
        return ("reverse", 1, -1) if cuts else ()

    def summed(self, merged_PTH: torch.Tensor) -> torch.Tensor:
        total_TH = merged_PTH.sum(0)
        columns = self.parallel.schedule is Schedule.GATHER
        total = total_TH.T if columns else total_TH
        whole = torch.cat([self.reordered(total[start:stop], start) for start, stop in self.groups(len(total))])
        total_TH = whole.T if columns else whole
        return total_TH.expand(self.parallel.size, *total_TH.shape)

    def groups(self, length: int) -> list[Range]:
        """Rows of each tp group: all of them, or those of one ep rank."""
        if not self.parallel.tokens.over_ep:
            return [(0, length)]
        return [share.merged_tokens for share in self.shares[::self.parallel.tp]]

    def reordered(self, part: torch.Tensor, first: int) -> torch.Tensor:
        tp = self.parallel.tp
        cuts = cut(len(part), (1,) * tp)
        if self.parallel.schedule is Schedule.GATHER:
            cuts = self.parallel.ranges(len(part))
        if self.parallel.tokens.over_tp:
            held = [share.tokens for share in self.shares if first <= share.tokens[0] and share.tp_rank in range(tp)]
            ends = [start - first for start, _ in held[:tp]] + [len(part)]
            cuts = tuple(pairwise(ends))
        parts = [part[start:stop] for start, stop in cuts]
        if self.variant == "reverse":
            return torch.cat(parts[::-1])
        return torch.cat(parts[self.variant:] + parts[:self.variant])


PARALLEL_FAULTS: tuple[type[Layer], ...] = (
    MergedAxisCutAsOne, UpOfAnotherRank, EvenSplitAssumed, IdsNotShifted, BiasTimesTP, IdentityTimesTP,
    OutputBiasTimesRanks, ActGatheredInOtherOrder, WeightsInReverse, RowsBackReversed, Residuals, NotReduced,
    ReducedTwice, MeanForSum, OverTheWrongGroup, OverAllRanks, PartsInOtherOrder)
