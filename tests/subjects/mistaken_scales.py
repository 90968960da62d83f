"""Layers over encoded experts that take a scale from a wrong place, after defects that shipped elsewhere."""

from dataclasses import replace

import torch

from moe_ref.contract.encoded import Encoded, packed, unpacked
from moe_ref.contract.quantised import QuantisedWeights
from moe_ref.contract.schemes import ENCODINGS
from tests.subjects.parallel_call import ParallelCall
from tests.subjects.parallel_variants import UNCOUNTED
from tests.subjects.quantised import QuantisedMoE
from tests.subjects.quantised_variants import ShuffledScales, TravellingCodes

# Where every rank has all of its scales.


class ScaleOfNextBlock(QuantisedMoE):
    """The scale of the next block of columns."""

    def scales(self, w: Encoded) -> torch.Tensor:
        return super().scales(replace(w, scales=w.scales.roll(-1, -1)))


class ScaleOfNextRow(QuantisedMoE):
    """The scale of the next row, or block of rows."""

    def scales(self, w: Encoded) -> torch.Tensor:
        return super().scales(replace(w, scales=w.scales.roll(-1, -2)))


class ScaleOfRowBefore(QuantisedMoE):
    """The scale of the row, or block of rows, before."""

    def scales(self, w: Encoded) -> torch.Tensor:
        return super().scales(replace(w, scales=w.scales.roll(1, -2)))


class RunsForGroups(QuantisedMoE):
    """Groups of columns taken for runs of them, although they are in act-order."""

    def of_columns(self, per_block: torch.Tensor, w: Encoded) -> torch.Tensor:
        return super().of_columns(per_block, replace(w, groups=None))


class ScaleOfNextExpert(QuantisedMoE):
    """Scales of w13 come from the next expert."""

    def taken(self, call: ParallelCall, weights: QuantisedWeights) -> QuantisedWeights:
        return replace(weights, w13=replace(weights.w13, scales=weights.w13.scales.roll(-1, 0)))


class TailOfNextExpert(QuantisedMoE):
    """The last block of columns has the scales of the next expert, whose descriptor was written too early."""

    def taken(self, call: ParallelCall, weights: QuantisedWeights) -> QuantisedWeights:
        scales = weights.w13.scales.clone()
        scales[:-1, ..., -1] = weights.w13.scales[1:, ..., -1]
        return replace(weights, w13=replace(weights.w13, scales=scales))


class UpScalesForGate(QuantisedMoE):
    """Rows of the gate have the scales of up."""

    def taken(self, call: ParallelCall, weights: QuantisedWeights) -> QuantisedWeights:
        scales = weights.w13.scales[:, 1:].expand_as(weights.w13.scales)
        return replace(weights, w13=replace(weights.w13, scales=scales))


class FirstScaleOfAll(QuantisedMoE):
    """A pointer that goes on by no whole group, so that all groups of columns have the first one's scale."""

    def scales(self, w: Encoded) -> torch.Tensor:
        return super().scales(replace(w, scales=w.scales[..., :1].expand_as(w.scales)))


class HalfOfTheShuffle(ShuffledScales):
    """Rows of scales are permuted, but the interleaving of groups that should follow is left out."""

    def interleaved(self, scales: torch.Tensor) -> torch.Tensor:
        return scales


# Where ranks have parts.


class LocalWidthForTheWhole(ShuffledScales):
    """Whether there are several groups is told from the rank's intermediate size, for w13 too."""

    def has_groups(self, call: ParallelCall, w: Encoded) -> bool:
        start, stop = call.parallel.ranges(call.spec.intermediate_size)[call.rank]
        return stop - start > (ENCODINGS[w.scheme].columns or 0)


class ActOrderScalesByRank(QuantisedMoE):
    """The table of w2's scales is cut by rank, although columns in act-order have groups of the whole table."""

    def taken(self, call: ParallelCall, weights: QuantisedWeights) -> QuantisedWeights:
        w2, size = weights.w2, ENCODINGS[weights.scheme].columns
        if w2.groups is None or not size:
            return weights
        start, stop = call.parallel.ranges(call.spec.intermediate_size)[call.rank]
        part = w2.scales[..., start // size:-(-stop // size)]
        return replace(weights, w2=replace(w2, scales=part, groups=w2.groups % part.shape[-1]))


class CutAfterThePermutation(QuantisedMoE):
    """A rank has a run of w2's columns in the order of their groups, and its activation a run of the columns' own."""

    promises = UNCOUNTED

    def taken(self, call: ParallelCall, weights: QuantisedWeights) -> QuantisedWeights:
        w2, comm = weights.w2, call.groups.tp
        if w2.groups is None:
            return weights
        codes = unpacked(w2.codes, w2.num_columns)
        codes = torch.cat(comm.all_gather(codes.movedim(-1, 0).contiguous())).movedim(0, -1)
        groups = torch.cat(comm.all_gather(w2.groups.T.contiguous())).T
        order = groups.argsort(dim=-1, stable=True)
        start, stop = call.parallel.ranges(call.spec.intermediate_size)[call.rank]
        order = order[:, start:stop]
        codes = codes.gather(-1, order[:, None].expand(-1, codes.shape[1], -1))
        return replace(weights, w2=replace(w2, codes=packed(codes), groups=groups.gather(-1, order)))


def whole_scales(call: ParallelCall, w2: Encoded) -> torch.Tensor:
    """Scales of all groups of w2, of which every tp rank has those that it has columns of."""
    size, num_columns = ENCODINGS[w2.scheme].columns or 1, call.spec.intermediate_size
    parts = call.groups.tp.all_gather(w2.scales.movedim(-1, 0).contiguous())
    whole = parts[0].new_zeros(-(-num_columns // size), *parts[0].shape[1:])
    for (start, stop), part in zip(call.parallel.ranges(num_columns), parts, strict=True):
        whole[start // size:-(-stop // size)] = part
    return whole.movedim(0, -1)


class GroupSizeFromShapes(QuantisedMoE):
    """Every rank has all scales of w2, and the size of a group is derived from the shapes of both."""

    promises = UNCOUNTED

    def taken(self, call: ParallelCall, weights: QuantisedWeights) -> QuantisedWeights:
        return replace(weights, w2=replace(weights.w2, scales=whole_scales(call, weights.w2)))

    def of_columns(self, per_block: torch.Tensor, w: Encoded) -> torch.Tensor:
        size = max(1, w.num_columns // per_block.shape[1])
        return per_block[:, (torch.arange(w.num_columns) // size).clamp(max=per_block.shape[1] - 1)]


class ScalesByRankTimesWidth(QuantisedMoE):
    """A rank's first scale is rank * (width // block), at least one for each rank."""

    promises = UNCOUNTED

    def taken(self, call: ParallelCall, weights: QuantisedWeights) -> QuantisedWeights:
        size, count = ENCODINGS[weights.scheme].columns or 1, weights.w2.scales.shape[-1]
        start, stop = call.parallel.ranges(call.spec.intermediate_size)[call.rank]
        whole = whole_scales(call, weights.w2)
        first = min(call.rank * max((stop - start) // size, 1), whole.shape[-1] - count)
        return replace(weights, w2=replace(weights.w2, scales=whole[..., first:first + count]))


class ShardBeginsABlock(QuantisedMoE):
    """The first block of a shard is taken to begin with the shard."""

    def of_columns(self, per_block: torch.Tensor, w: Encoded) -> torch.Tensor:
        return super().of_columns(per_block, replace(w, column_start=0))


class ScalesLeftAsTheyCame(TravellingCodes):
    """Scales of rows that travelled are brought into the kernel's order for layers in fp32 alone."""

    def swizzled(self, call: ParallelCall, scales_RQ: torch.Tensor) -> torch.Tensor:
        if call.x_TH.dtype is torch.float32:
            return super().swizzled(call, scales_RQ)
        return scales_RQ.flatten()
