"""Layers with one mistake each in how they are spread over ranks, after defects that shipped elsewhere."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from moe_ref.contract.comm import Comm, Groups
from moe_ref.contract.vocabulary import Format, Hosting, Stage
from moe_ref.contract.weights import ExpertWeights, MoEWeights
from tests.subjects.base import ROUND_EACH_STAGE, Call
from tests.subjects.parallel import ParallelMoE
from tests.subjects.parallel_call import ParallelCall, Routed, Served
from tests.subjects.parallel_variants import UNCOUNTED

# Weights of the wrong part. The shards that a loader would cut wrongly are fetched from the other ranks here.


class GateOfOneRankUpOfAnother(ParallelMoE):
    """The gate shard of rank r beside the up shard of rank tp - 1 - r."""

    promises = UNCOUNTED

    def loaded(self, call: ParallelCall) -> ParallelCall:
        w13_EGIH = call.weights.w13_EGIH
        up_EIH = call.groups.tp.all_gather(w13_EGIH[:, 1])[call.groups.tp.size - 1 - call.rank]
        weights = replace(call.weights, w13_EGIH=torch.stack([w13_EGIH[:, 0], up_EIH], 1))
        return replace(call, weights=weights)


class MergedAxisCutNaively(ParallelMoE):
    """The merged 2I axis cut as one, so that rank 0 of 2 has gate rows only."""

    promises = UNCOUNTED

    def loaded(self, call: ParallelCall) -> ParallelCall:
        parts = call.groups.tp.all_gather(call.weights.w13_EGIH.permute(2, 0, 1, 3).contiguous())
        return replace(call, weights=naively_cut(call.weights, torch.cat(parts).permute(1, 2, 0, 3), call.rank))


def naively_cut(weights: MoEWeights, whole_EGIH: torch.Tensor, rank: int) -> MoEWeights:
    """A rank's weights with its part of the rows gate 0, gate 1, ..., up 0, up 1, ... cut in runs."""
    width = 2 * weights.w13_EGIH.shape[2]
    rows_EIH = whole_EGIH.flatten(1, 2)[:, rank * width:(rank + 1) * width]
    return replace(weights, w13_EGIH=rows_EIH.unflatten(1, (2, -1)).contiguous())


class EvenSplitAssumed(ParallelMoE):
    """Every rank uses I / tp columns, so a rank with more loses some."""

    def projected_back(self, call: Call, act_RI: torch.Tensor, expert: ExpertWeights) -> torch.Tensor:
        width = call.spec.intermediate_size // call.size
        return super().projected_back(call, act_RI[:, :width], expert._replace(w2_HI=expert.w2_HI[:, :width]))


class BiasOnEveryRank(ParallelMoE):
    """Every tp rank adds the bias of w2 to its rows, so the sum holds it tp times."""

    def down_bias(self, call: Call, bias_H: torch.Tensor) -> torch.Tensor:
        return bias_H


# Reductions.


class NoReduction(ParallelMoE):
    """Every rank goes on with its own sum."""

    def sum_over(self, call: ParallelCall, comm: Comm, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


class ReducedTwice(ParallelMoE):
    """The complete sum is summed over the ranks again."""

    def all_reduced(self, call: ParallelCall, tensor: torch.Tensor) -> torch.Tensor:
        return super().all_reduced(call, super().all_reduced(call, tensor))


class OverTheOtherGroup(ParallelMoE):
    """The sum runs over ep where it should over tp."""

    def all_reduced(self, call: ParallelCall, tensor: torch.Tensor) -> torch.Tensor:
        return super().all_reduced(replace(call, groups=Groups(tp=call.groups.ep, ep=call.groups.tp)), tensor)


class OverTheWorld(ParallelMoE):
    """The sum runs over all ranks, though those of another ep rank have other tokens."""

    def all_reduced(self, call: ParallelCall, tensor: torch.Tensor) -> torch.Tensor:
        return self.sum_over(call, call.groups.ep, self.sum_over(call, call.groups.tp, tensor))


class BF16Between(ParallelMoE):
    """Partial sums travel in bf16, where fp32 is declared."""

    stored = {**ROUND_EACH_STAGE, Stage.MERGED: Format.FP32, Stage.REDUCED: Format.FP32}
    reduce_in = Format.FP32

    def sum_over(self, call: ParallelCall, comm: Comm, tensor: torch.Tensor) -> torch.Tensor:
        return super().sum_over(call, comm, tensor.bfloat16()).float()


class RowsMergedFirst(ParallelMoE):
    """Declares to reduce rows, but merges them first and reduces their sum."""

    def all_reduced(self, call: ParallelCall, tensor: torch.Tensor) -> torch.Tensor:
        merged_TH = super().all_reduced(call, tensor.float().sum(1).to(tensor.dtype))
        return torch.cat([merged_TH[:, None], torch.zeros_like(tensor[:, 1:])], 1)


class Barrier(ParallelMoE):
    """One element is reduced so that ranks wait for each other."""

    def loaded(self, call: ParallelCall) -> ParallelCall:
        call.groups.tp.all_reduce(torch.zeros(1))
        return call


class NeighboursSlice(ParallelMoE):
    """The reduce-scatter leaves each rank the tokens of the next one; parts are equal."""

    def scatter(self, call: ParallelCall, merged_TH: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        return super().scatter(call, merged_TH.roll(-rows[0], 0), rows)


class GatheredInReverse(ParallelMoE):
    """What ranks gather is put together from the last rank on."""

    def of_all_columns(self, call: ParallelCall, merged_TH: torch.Tensor) -> torch.Tensor:
        return torch.cat(call.groups.tp.all_gather(merged_TH.T.contiguous())[::-1]).T.contiguous()

    def scattered(self, call: ParallelCall, group: Routed, merged_TH: torch.Tensor) -> torch.Tensor:
        y_TH = super().scattered(call, group, merged_TH)
        counts = [len(part) for part in y_TH.tensor_split(call.size)]
        return torch.cat(y_TH.split(counts)[::-1])


class OwnTokensUnderGather(ParallelMoE):
    """Broadcasts the tokens of rank 0 and goes on with its own."""

    def agreed(self, tp: Comm, x_TH: torch.Tensor) -> torch.Tensor:
        super().agreed(tp, x_TH)
        return x_TH


class ColumnsInterleaved(ParallelMoE):
    """The gathered activation alternates between ranks instead of following one after the other."""

    def act_of_all(self, call: ParallelCall, act_RI: torch.Tensor) -> torch.Tensor:
        return torch.stack(call.groups.tp.all_gather(act_RI.T.contiguous()), 1).flatten(0, 1).T


# What counts once.


class SharedReducedTwice(ParallelMoE):
    """The shared expert is reduced on its own and once more with the sum it joined."""

    def shared_of(self, call: ParallelCall, tokens: Routed) -> torch.Tensor:
        return self.all_reduced(call, call.travelling(super().shared_of(call, tokens))).float()


class WholeSharedInEverySum(ParallelMoE):
    """The shared expert is whole on every rank, and every rank adds it to its partial sum."""

    def last_addend(self, call: ParallelCall, merged_TH: torch.Tensor,
                    residual_TH: torch.Tensor | None) -> torch.Tensor:
        tokens = Routed(call.x_TH, torch.empty(0), torch.empty(0), None)
        return merged_TH + self.shared_of(call, tokens)

    def with_whole(self, call: ParallelCall, own: Routed, total_TH: torch.Tensor) -> torch.Tensor:
        return total_TH


class ResidualPerRank(ParallelMoE):
    """The residual is added as often as there are tp ranks."""

    def with_residual(self, call: ParallelCall, total_TH: torch.Tensor, residual_TH: torch.Tensor) -> torch.Tensor:
        return total_TH.float() + call.size * residual_TH.float()


# Rows on their way.


class RowsBackReversed(ParallelMoE):
    """Rows come back as many as they should, but from the last to the first."""

    def returned(self, call: ParallelCall, down_RH: torch.Tensor, served: Served) -> list[torch.Tensor]:
        return [part.flip(0) for part in super().returned(call, down_RH, served)]


class EmptyRankPadded(ParallelMoE):
    """A rank without tokens sends a row of zeros, and the receivers cut the last row off instead of that one."""

    def gathered(self, call: ParallelCall, own: Routed) -> Routed:
        x_TH = own.x_TH if len(own.x_TH) else torch.zeros(1, own.x_TH.shape[1], dtype=own.x_TH.dtype)
        group = super().gathered(call, replace(own, x_TH=x_TH))
        counts = [len(part) for part in call.groups.tp.all_gather(own.x_TH)]
        return replace(group, x_TH=group.x_TH[:len(group.ids_TK)], counts=tuple(counts))


class WeightsInReverse(ParallelMoE):
    """Routing weights are gathered from the last rank on, tokens and ids from the first."""

    def gathered_routing(self, call: ParallelCall, own: Routed) -> tuple[torch.Tensor, torch.Tensor]:
        ids_TK = torch.cat(call.groups.tp.all_gather(own.ids_TK))
        return ids_TK, torch.cat(call.groups.tp.all_gather(own.weights_TK)[::-1])


class WeightTwice(ParallelMoE):
    """Rows are weighted by their expert and once more at home."""

    def slots(self, call: ParallelCall, group: Routed) -> torch.Tensor:
        return super().slots(call, group) * group.weights_TK.float()[..., None]


class RoundRobinReadAsContiguous(ParallelMoE):
    """Slots go where runs of neighbours would lie, whatever the hosting."""

    def hosted(self, call: ParallelCall) -> tuple[tuple[int, ...], ...]:
        return replace(call.parallel, hosting=Hosting.CONTIGUOUS).hosted(call.spec.num_experts)


class EveryCopyServes(ParallelMoE):
    """Every ep rank with a copy of an expert serves every token that chose it."""

    def dispatched(self, call: ParallelCall, group: Routed) -> Served:
        held = torch.tensor(self.hosted(call)[call.groups.ep.rank])
        everything_R = group.ids_TK.flatten()
        mine_R = torch.isin(everything_R, held).nonzero().flatten()
        index_R = (everything_R[mine_R, None] == held).float().argmax(1)
        weight_R1 = group.weights_TK.flatten()[mine_R, None]
        x_RH = group.x_TH[mine_R // group.ids_TK.shape[1]]
        return Served(x_RH, index_R, weight_R1, [len(mine_R)], [mine_R] * call.groups.ep.size)


class NoCopyServes(ParallelMoE):
    """Each rank takes the other's copy to serve the tokens of an expert that has two."""

    def dispatched(self, call: ParallelCall, group: Routed) -> Served:
        copied = torch.isin(group.ids_TK, torch.tensor(call.parallel.redundant))
        return super().dispatched(call, replace(group, ids_TK=group.ids_TK.masked_fill(copied, -1)))


class DroppedBeyondTheMean(ParallelMoE):
    """A rank takes no more rows than the mean of all ranks: the buffer of the dispatch is of that size."""

    def places(self, call: ParallelCall, ids_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rank_TK, index_TK = super().places(call, ids_TK)
        room = -(-ids_TK.numel() // call.groups.ep.size)
        for rank in range(call.groups.ep.size):
            taken_R = (rank_TK.flatten() == rank).nonzero().flatten()
            rank_TK.view(-1)[taken_R[room:]] = -1
        return rank_TK, index_TK


class HiddenDroppedBeyondTheMean(DroppedBeyondTheMean):
    """The same, judged by its choice and its output."""

    shows = (Stage.IDS,)


class HiddenEveryCopyServes(EveryCopyServes):
    """The same, judged by its choice and its output."""

    shows = (Stage.IDS,)


class PartialSumReturned(ParallelMoE):
    """Communicates as it should and returns its own sum all the same."""

    def all_reduced(self, call: ParallelCall, tensor: torch.Tensor) -> torch.Tensor:
        super().all_reduced(call, tensor)
        return tensor


class MeanForSum(ParallelMoE):
    """The ranks' sums are averaged."""

    def all_reduced(self, call: ParallelCall, tensor: torch.Tensor) -> torch.Tensor:
        return super().all_reduced(call, tensor) / call.parallel.size


WRONG = {name: one for name, one in globals().items()
         if isinstance(one, type) and issubclass(one, ParallelMoE) and one is not ParallelMoE}
