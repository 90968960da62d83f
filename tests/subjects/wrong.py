"""Wrong implementations, each one step from right, after defects that shipped elsewhere."""

import torch

from moe_ref.contract.spec import MLP, Router
from moe_ref.contract.vocabulary import Stage
from tests.subjects.base import Call, TorchMoE


class LastBlockOfKDropped(TorchMoE):
    """Expert 3 leaves out the last 32 columns of the hidden axis."""

    def gate_up(self, call: Call, x_RH: torch.Tensor, w13_GIH: torch.Tensor, expert: int) -> torch.Tensor:
        keep = x_RH.shape[1] - 32 if expert == 3 else x_RH.shape[1]
        return super().gate_up(call, x_RH[:, :keep], w13_GIH[..., :keep], expert)


class GateUpSwapped(TorchMoE):
    """w1 and w3 exchanged."""

    def gate_up(self, call: Call, x_RH: torch.Tensor, w13_GIH: torch.Tensor, expert: int) -> torch.Tensor:
        return super().gate_up(call, x_RH, w13_GIH.flip(0), expert)


class SiluForGelu(TorchMoE):
    """Always silu, whatever the layer asks for."""

    def activate(self, gate_RI: torch.Tensor, up_RI: torch.Tensor, mlp: MLP) -> torch.Tensor:
        return super().activate(gate_RI, up_RI, MLP())


class WeightTwice(TorchMoE):
    """The routing weight applied once in the product and once more in the merge."""

    def routed_rows(self, call: Call, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        return super().routed_rows(call, ids_TK, weights_TK**2)


class NotRenormalised(TorchMoE):
    """Weights of the chosen experts not divided by their sum."""

    def weigh(self, score_TK: torch.Tensor, selection_TK: torch.Tensor, router: Router) -> torch.Tensor:
        return score_TK * router.scaling_factor


class ScalingDropped(TorchMoE):
    """The factor on the routing weights left out."""

    def weigh(self, score_TK: torch.Tensor, selection_TK: torch.Tensor, router: Router) -> torch.Tensor:
        return super().weigh(score_TK, selection_TK, router) / router.scaling_factor


class BiasInWeights(TorchMoE):
    """Weights taken from the biased scores that are meant for selection only."""

    def weigh(self, score_TK: torch.Tensor, selection_TK: torch.Tensor, router: Router) -> torch.Tensor:
        return super().weigh(selection_TK, selection_TK, router)


class GroupLimitIgnored(TorchMoE):
    """Experts of every group compete."""

    def selection_score(self, score_TE: torch.Tensor, bias_E: torch.Tensor | None,
                        router: Router) -> torch.Tensor:
        return score_TE if bias_E is None else score_TE + bias_E


class TiesToHigherId(TorchMoE):
    """Exact ties given to the higher expert id, against what is declared."""

    def top(self, values_TN: torch.Tensor, count: int) -> torch.Tensor:
        flipped = torch.sort(values_TN.flip(1), dim=-1, descending=True, stable=True).indices[:, :count]
        return values_TN.shape[1] - 1 - flipped


class AllReduceLeftOut(TorchMoE):
    """Each rank returns its own partial sum."""

    def all_reduce(self, call: Call, merged_TH: torch.Tensor) -> torch.Tensor:
        return merged_TH


class AllReduceTwice(TorchMoE):
    """The complete sum is summed over the ranks again."""

    def all_reduce(self, call: Call, merged_TH: torch.Tensor) -> torch.Tensor:
        return super().all_reduce(call, super().all_reduce(call, merged_TH))


class ResidualPerRank(TorchMoE):
    """Every rank adds the residual to its partial sum, so the result holds it tp times."""

    def finish(self, call: Call, merged_TH: torch.Tensor, residual_TH: torch.Tensor | None) -> torch.Tensor:
        if residual_TH is not None:
            merged_TH = (merged_TH.float() + residual_TH.float()).to(merged_TH.dtype)
        return super().finish(call, merged_TH, None)


class SharedPerRank(TorchMoE):
    """The shared expert's rank partials summed once more on every rank, so that it counts tp times."""

    def shared_rows(self, call: Call) -> torch.Tensor:
        shared_TH = super().shared_rows(call)
        return shared_TH * call.size


class NeighbourExpert(TorchMoE):
    """The last row of expert 2 meets expert 3's down projection: a block that ends one row too early."""

    def down(self, call: Call, act_RI: torch.Tensor, w2_HI: torch.Tensor, expert: int) -> torch.Tensor:
        rows = super().down(call, act_RI, w2_HI, expert)
        if expert == 2 and len(rows):
            rows[-1:] = super().down(call, act_RI[-1:], call.weights.expert(3).w2_HI, expert)
        return rows


class ColumnsSwapped(TorchMoE):
    """Columns 0 to 15 and 16 to 31 of the down projection change places on rank 1."""

    def down(self, call: Call, act_RI: torch.Tensor, w2_HI: torch.Tensor, expert: int) -> torch.Tensor:
        rows = super().down(call, act_RI, w2_HI, expert)
        return torch.cat([rows[:, 16:32], rows[:, :16], rows[:, 32:]], 1) if call.rank == 1 else rows


class StrideWraps(TorchMoE):
    """The offset of an expert's weights wraps at 2^16 elements, a small twin of an int32 overflow."""

    def down(self, call: Call, act_RI: torch.Tensor, w2_HI: torch.Tensor, expert: int) -> torch.Tensor:
        if expert >= 0:
            w2_HI = call.weights.expert(expert * w2_HI.numel() % 2**16 // w2_HI.numel()).w2_HI
        return super().down(call, act_RI, w2_HI, expert)


class BF16Accumulation(TorchMoE):
    """Sums of 16 columns added up in bf16, where fp32 is declared."""

    def down(self, call: Call, act_RI: torch.Tensor, w2_HI: torch.Tensor, expert: int) -> torch.Tensor:
        total = torch.zeros(len(act_RI), len(w2_HI), dtype=torch.bfloat16)
        for act, w2 in zip(act_RI.float().split(16, 1), w2_HI.float().split(16, 1), strict=True):
            total = total + (act @ w2.T).to(torch.bfloat16)
        return total.float()


class TruncatingStore(TorchMoE):
    """bf16 stores of act that cut the lower half of an fp32 number off instead of rounding."""

    def activate(self, gate_RI: torch.Tensor, up_RI: torch.Tensor, mlp: MLP) -> torch.Tensor:
        act = super().activate(gate_RI, up_RI, mlp).contiguous()
        return (act.view(torch.int32) & -65536).view(torch.float32)


class EvenSplitAssumed(TorchMoE):
    """Every rank uses I / tp columns, rounded down, so uneven shares lose some."""

    def down(self, call: Call, act_RI: torch.Tensor, w2_HI: torch.Tensor, expert: int) -> torch.Tensor:
        width = call.spec.intermediate_size // call.size
        return super().down(call, act_RI[:, :width], w2_HI[:, :width], expert)


class UninitialisedTail(TorchMoE):
    """The last token's row is never written."""

    def sum_of_slots(self, rows_TKH: torch.Tensor) -> torch.Tensor:
        total = torch.empty(rows_TKH.shape[0], rows_TKH.shape[2])
        total[:-1] = rows_TKH[:-1].sum(1)
        return total


class SecondRunOnly(TorchMoE):
    """Uninitialised memory that a NaN hides and large numbers show; determinism is not promised."""

    promises: dict[str, object] = {}

    def sum_of_slots(self, rows_TKH: torch.Tensor) -> torch.Tensor:
        memory = torch.empty(rows_TKH.shape[0], rows_TKH.shape[2])
        return torch.where(memory > 0, memory, rows_TKH.sum(1))


class Nondeterministic(TorchMoE):
    """Sums slots forwards or backwards from one call to the next, though determinism is promised."""

    calls = 0

    def sum_of_slots(self, rows_TKH: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        order = range(rows_TKH.shape[1])
        total = torch.zeros_like(rows_TKH[:, 0])
        for slot in order if self.calls % 2 else reversed(order):
            total = total + rows_TKH[:, slot]
        return total


class InputChanged(TorchMoE):
    """x is normalised in place after it was used."""

    def finish(self, call: Call, merged_TH: torch.Tensor, residual_TH: torch.Tensor | None) -> torch.Tensor:
        call.x_TH.mul_(0.5)
        return super().finish(call, merged_TH, residual_TH)


class OneStageMissing(TorchMoE):
    """act is declared as shown, but rank 1 does not show it."""

    def moe(self, x_TH, weights, spec, parallel=None, groups=None, *, trace=None, **others):
        output = super().moe(x_TH, weights, spec, parallel, groups, trace=trace, **others)
        if trace is not None and groups is not None and groups.tp.rank == 1:
            del trace.tensors[Stage.ACT]
        return output


last_block_of_k_dropped = LastBlockOfKDropped()
gate_up_swapped = GateUpSwapped()
silu_for_gelu = SiluForGelu()
weight_twice = WeightTwice()
not_renormalised = NotRenormalised()
scaling_dropped = ScalingDropped()
bias_in_weights = BiasInWeights()
group_limit_ignored = GroupLimitIgnored()
ties_to_higher_id = TiesToHigherId()
all_reduce_left_out = AllReduceLeftOut()
all_reduce_twice = AllReduceTwice()
residual_per_rank = ResidualPerRank()
shared_per_rank = SharedPerRank()
neighbour_expert = NeighbourExpert()
columns_swapped = ColumnsSwapped()
stride_wraps = StrideWraps()
bf16_accumulation = BF16Accumulation()
truncating_store = TruncatingStore()
even_split_assumed = EvenSplitAssumed()
uninitialised_tail = UninitialisedTail()
second_run_only = SecondRunOnly()
nondeterministic = Nondeterministic()
input_changed = InputChanged()
one_stage_missing = OneStageMissing()
