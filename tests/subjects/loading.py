"""A right layer that loads its own part of the weights from a whole checkpoint, a step for every choice of a loader."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from moe_ref.contract.parallel import Range
from moe_ref.contract.vocabulary import Stage
from tests.subjects.loaded import whole
from tests.subjects.parallel import ParallelMoE
from tests.subjects.parallel_call import ParallelCall
from tests.subjects.parallel_variants import UNCOUNTED


class ShardLoader(ParallelMoE):
    """Puts the checkpoint together from what all ranks were handed, and cuts it again: every rank loads for itself."""

    promises = UNCOUNTED

    def loaded(self, call: ParallelCall) -> ParallelCall:
        gates, experts = call.weights.w13_EGIH.unbind(1), list(self.experts(call))
        width = call.spec.intermediate_size
        gate_EIH = self.checkpoint(call, gates[0], 1)[experts][:, slice(*self.gate_columns(call, width))]
        others = [self.checkpoint(call, up_EIH, 1)[experts][:, slice(*self.up_columns(call, width))]
                  for up_EIH in gates[1:]]
        return replace(call, weights=replace(call.weights, w13_EGIH=torch.stack([gate_EIH, *others], 1),
                                             w2_EHI=self.loaded_down(call, experts)))

    def loaded_down(self, call: ParallelCall, experts: Sequence[int]) -> torch.Tensor:
        """w2 of the experts: rows of it under the gather schedule, else columns."""
        if call.by_output:
            rows = slice(*self.down_columns(call, call.spec.hidden_size))
            return self.checkpoint(call, call.weights.w2_EHI, 1)[experts][:, rows]
        columns = slice(*self.down_columns(call, call.spec.intermediate_size))
        return self.checkpoint(call, call.weights.w2_EHI, 2)[experts][:, :, columns]

    def checkpoint(self, call: ParallelCall, shard: torch.Tensor, axis: int) -> torch.Tensor:
        """The tensor of all experts in their order, whole along `axis`."""
        own, ep = whole(shard, axis, call.groups.tp).contiguous(), call.groups.ep
        held = call.parallel.hosted(call.spec.num_experts)
        rows = ep.all_gather(own) if ep.size > 1 else [own]
        by_expert = {expert: row for experts, part in zip(held, rows, strict=True)
                     for expert, row in zip(experts, part, strict=True)}
        return torch.stack([by_expert[expert] for expert in range(call.spec.num_experts)])

    def experts(self, call: ParallelCall) -> tuple[int, ...]:
        """Which experts this rank loads."""
        return call.parallel.hosted(call.spec.num_experts)[call.groups.ep.rank]

    def columns(self, call: ParallelCall, width: int) -> Range:
        """Which part of an axis of `width` elements this rank loads."""
        return call.parallel.ranges(width)[call.rank]

    def gate_columns(self, call: ParallelCall, width: int) -> Range:
        return self.columns(call, width)

    def up_columns(self, call: ParallelCall, width: int) -> Range:
        return self.columns(call, width)

    def down_columns(self, call: ParallelCall, width: int) -> Range:
        return self.columns(call, width)


class HiddenLoader(ShardLoader):
    """The same, judged by its choice and its output."""

    shows = (Stage.IDS,)


shard_loader = ShardLoader()
hidden_loader = HiddenLoader()
