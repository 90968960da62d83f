"""Right layers that are unlike the plain one between ranks: another order, another message, another rounding."""

from collections.abc import Sequence

import torch

from moe_ref.contract.comm import Comm
from moe_ref.contract.vocabulary import Format, SharedPlacement, Stage
from tests.subjects.base import ALL_STAGES, MODEL, ROUND_EACH_STAGE
from tests.subjects.parallel import ParallelMoE
from tests.subjects.parallel_call import ParallelCall, Routed, Served

UNCOUNTED: dict[str, object] = {"deterministic": True, "equal_ranks": True, "lower_id_ties": True}
"""Promises of a layer whose volume is not the schedule's."""

FP32_PARTIALS = {**dict.fromkeys(ROUND_EACH_STAGE, Format.FP32), Stage.REDUCED: MODEL}


class GateUpShown(ParallelMoE):
    """gate_up rounded to the model's dtype before the activation, and shown."""

    stored = {**ROUND_EACH_STAGE, Stage.GATE_UP: MODEL}
    shows = (*ALL_STAGES, Stage.GATE_UP)


class FP32Between(ParallelMoE):
    """fp32 rows and partial sums on every way between ranks, one rounding at the end."""

    stored = FP32_PARTIALS
    reduce_in = Format.FP32


class HiddenFP32Between(FP32Between):
    """The same, judged by its choice and its output."""

    shows = (Stage.IDS,)


class NarrowOnlyBetween(ParallelMoE):
    """Rounds to the model's dtype what travels and nothing before; no stage but the output is declared or shown."""

    stored = {Stage.REDUCED: MODEL}
    shows = ()

    def returned(self, call: ParallelCall, down_RH: torch.Tensor, served: Served) -> list[torch.Tensor]:
        return super().returned(call, call.travelling(down_RH), served)


class WideBetween(ParallelMoE):
    """Partial sums stored in the model's dtype and added in fp32."""

    reduce_in = Format.FP32


class OwnOrder(ParallelMoE):
    """Sums parts that it gathers, in an order of its own; the volume is not the schedule's, so it promises none."""

    promises = UNCOUNTED

    def sum_of_parts(self, parts: list[torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError

    def sum_over(self, call: ParallelCall, comm: Comm, tensor: torch.Tensor) -> torch.Tensor:
        return self.sum_of_parts(comm.all_gather(tensor)) if comm.size > 1 else tensor

    def scatter(self, call: ParallelCall, merged_TH: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        rank = call.groups.tp.rank
        return self.sum_over(call, call.groups.tp, merged_TH)[sum(rows[:rank]):sum(rows[:rank + 1])]


class Reversed(OwnOrder):
    """From the last rank on."""

    def sum_of_parts(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return sum(reversed(parts[:-1]), parts[-1])


class Tree(OwnOrder):
    """Neighbours first, then pairs of neighbours."""

    def sum_of_parts(self, parts: list[torch.Tensor]) -> torch.Tensor:
        while len(parts) > 1:
            parts = [sum(parts[i + 1:i + 2], parts[i]) for i in range(0, len(parts), 2)]
        return parts[0]


class Ring(OwnOrder):
    """A piece of every tensor starts at each rank and goes once around."""

    def sum_of_parts(self, parts: list[torch.Tensor]) -> torch.Tensor:
        pieces = [part.tensor_split(len(parts)) for part in parts]
        orders = [[*range(first, len(parts)), *range(first)] for first in range(len(parts))]
        return torch.cat([sum((pieces[rank][piece] for rank in order[1:]), pieces[order[0]][piece])
                          for piece, order in enumerate(orders)])


class PackedDescription(ParallelMoE):
    """Ids and weights in one message of twice the width, in both directions in which they travel."""

    def described(self, call: ParallelCall, index_parts: list[torch.Tensor], weight_parts: list[torch.Tensor]
                  ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        packed = call.groups.ep.all_to_all([torch.cat([index[:, None].double(), weight.double()], 1)
                                            for index, weight in zip(index_parts, weight_parts, strict=True)])
        return [part[:, 0].long() for part in packed], [part[:, 1:].to(weight_parts[0].dtype) for part in packed]

    def gathered_routing(self, call: ParallelCall, own: Routed) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.cat(call.groups.tp.all_gather(torch.cat([own.ids_TK.double(), own.weights_TK.double()], 1)))
        ids_TK, weights_TK = both.tensor_split(2, 1)
        return ids_TK.long(), weights_TK.to(own.weights_TK.dtype)


class CountsFirst(ParallelMoE):
    """Tells how many rows come before it sends them, and nothing at all where there is none."""

    def dispatched(self, call: ParallelCall, group: Routed) -> Served:
        if call.travels:
            rank_TK, _ = self.places(call, group.ids_TK)
            call.groups.ep.all_to_all([(rank_TK == rank).sum().reshape(1) for rank in range(call.groups.ep.size)])
        return super().dispatched(call, group)


class ExpertsBeforeTensors(ParallelMoE):
    """Where both sum, over ep first and then over tp."""

    def all_reduced(self, call: ParallelCall, tensor: torch.Tensor) -> torch.Tensor:
        if not call.parallel.tokens.over_ep:
            tensor = self.sum_over(call, call.groups.ep, tensor)
        return self.sum_over(call, call.groups.tp, tensor)


class BlackBox(ParallelMoE):
    """Shows nothing but its output."""

    stored = {Stage.ACT: MODEL, Stage.DOWN: MODEL, Stage.MERGED: MODEL, Stage.REDUCED: MODEL}
    shows = ()


class FewerStages(ParallelMoE):
    """Shows its choice and its partial sums."""

    shows = (Stage.IDS, Stage.MERGED)


class RowsOnly(ParallelMoE):
    """Shows its rows and no sums; partial sums stay in fp32."""

    stored = {Stage.ACT: MODEL, Stage.DOWN: MODEL, Stage.SHARED: MODEL, Stage.REDUCED: MODEL}
    reduce_in = Format.FP32
    shows = (Stage.IDS, Stage.ACT, Stage.DOWN, Stage.SHARED)


class ResidualInSum(RowsOnly):
    """The residual enters one rank's sum wherever that rank has all tokens of the sum."""

    def joins(self, call: ParallelCall) -> bool:
        parallel = call.parallel
        late = parallel.shared is SharedPlacement.REPLICATED and call.spec.shared is not None
        return not (call.by_output or parallel.tokens.over_tp or late or parallel.schedule == "all_reduce_rows")

    def last_addend(self, call: ParallelCall, merged_TH: torch.Tensor,
                    residual_TH: torch.Tensor | None) -> torch.Tensor:
        if residual_TH is None or not self.joins(call) or not call.adds_uncut:
            return merged_TH
        return merged_TH + residual_TH.float()

    def with_residual(self, call: ParallelCall, total_TH: torch.Tensor, residual_TH: torch.Tensor) -> torch.Tensor:
        return total_TH if self.joins(call) else super().with_residual(call, total_TH, residual_TH)


class LateBias(BlackBox):
    """Every rank adds the output bias to the complete sum, wherever the schedule has it."""

    def with_output_bias(self, call: ParallelCall, merged_TH: torch.Tensor) -> torch.Tensor:
        return merged_TH

    def with_whole(self, call: ParallelCall, own: Routed, total_TH: torch.Tensor) -> torch.Tensor:
        bias_H, parallel = call.weights.output_bias_H, call.parallel
        total_TH, joined = super().with_whole(call, own, total_TH), parallel.schedule == "all_reduce_rows"
        late = parallel.shared is SharedPlacement.SHARDED and not joined
        return total_TH.float() + bias_H.float() if late and bias_H is not None else total_TH


class WeightAtHome(ParallelMoE):
    """Rows are weighted where they are summed: by the rank that sent their tokens."""

    weight_at = "merge"


class HiddenWeightAtHome(NarrowOnlyBetween):
    """The same with every row in fp32 until it travels, judged by its output alone."""

    weight_at = "merge"


RIGHT = {one.__name__: one for one in (
    ParallelMoE, GateUpShown, FP32Between, NarrowOnlyBetween, WideBetween, Reversed, Tree, Ring, PackedDescription,
    CountsFirst, ExpertsBeforeTensors, BlackBox, FewerStages, RowsOnly, ResidualInSum, LateBias, WeightAtHome,
    HiddenWeightAtHome)}

parallel_reversed, parallel_tree, parallel_ring = Reversed(), Tree(), Ring()
parallel_fp32_between, parallel_wide_between = FP32Between(), WideBetween()
parallel_rows_only, parallel_residual_in_sum, parallel_weight_at_home = RowsOnly(), ResidualInSum(), WeightAtHome()
parallel_packed_description, parallel_late_bias = PackedDescription(), LateBias()
hidden_fp32_between, hidden_weight_at_home = HiddenFP32Between(), HiddenWeightAtHome()
