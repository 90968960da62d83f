"""Right implementations unlike moe_fast: another rounding contract, another order, another algorithm."""

import torch
import torch.nn.functional as F

from moe_ref.contract.vocabulary import Format, Stage
from tests.subjects.base import ALL_STAGES, MODEL, ROUND_EACH_STAGE, Call, TorchMoE

NO_PROMISES: dict[str, object] = {}


class GateUpStored(TorchMoE):
    """gate_up rounded to the model's dtype before the activation, as two unfused kernels do."""

    stored = {**ROUND_EACH_STAGE, Stage.GATE_UP: MODEL}
    shows = (*ALL_STAGES, Stage.GATE_UP)


class FP32Partials(TorchMoE):
    """Nothing rounded on the way: fp32 rows, fp32 partial sums, fp32 all-reduce, one rounding at the end."""

    stored = {**dict.fromkeys(ROUND_EACH_STAGE, Format.FP32), Stage.REDUCED: MODEL}
    reduce_in = Format.FP32


class BF16Weights(TorchMoE):
    """Routing weights stored in bf16, whatever the dtype of the model, as several routers do."""

    stored = {**ROUND_EACH_STAGE, Stage.WEIGHTS: Format.BF16}


class HiddenBF16Weights(BF16Weights):
    """The same, observed only at its output."""

    shows = (Stage.IDS, Stage.REDUCED)


class BF16Router(TorchMoE):
    """Router logits rounded to bf16, so that choices near the cut differ from the fp64 oracle's."""

    stored = {**ROUND_EACH_STAGE, Stage.LOGITS: Format.BF16}


class BlackBox(TorchMoE):
    """Shows nothing but its output; ids near the cut cannot be followed."""

    stored = {Stage.ACT: MODEL, Stage.MERGED: MODEL, Stage.REDUCED: MODEL}
    shows = ()
    promises = NO_PROMISES


class TopkReversed(TorchMoE):
    """torch.topk (ties as they fall), slots in ascending score, rows summed from the last slot on."""

    promises = NO_PROMISES

    def top(self, values_TN: torch.Tensor, count: int) -> torch.Tensor:
        return values_TN.topk(count, -1).indices.flip(-1)

    def sum_of_slots(self, rows_TKH: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(rows_TKH[:, 0])
        for slot in reversed(range(rows_TKH.shape[1])):
            total = total + rows_TKH[:, slot]
        return total


class SplitK(TorchMoE):
    """Long sums in pieces of 32 columns, added from the last piece on: another order of the same terms."""

    def down(self, call: Call, act_RI: torch.Tensor, w2_HI: torch.Tensor, expert: int) -> torch.Tensor:
        pieces = list(zip(act_RI.float().split(32, 1), w2_HI.float().split(32, 1), strict=True))
        total = torch.zeros(len(act_RI), len(w2_HI))
        for act, w2 in reversed(pieces):
            total = total + act @ w2.T
        return total

    def gate_up(self, call: Call, x_RH: torch.Tensor, w13_GIH: torch.Tensor, expert: int) -> torch.Tensor:
        parts = [torch.einsum("rh,gih->rgi", x, w) for x, w in zip(
            x_RH.float().split(32, 1), w13_GIH.float().split(32, 2), strict=True)]
        return sum(reversed(parts[:-1]), parts[-1])


class Batched(TorchMoE):
    """Every expert applied to every token by bmm, then the chosen ones picked: no permutation of tokens."""

    stored = {Stage.LOGITS: Format.FP32, Stage.WEIGHTS: Format.FP32, Stage.ACT: MODEL, Stage.MERGED: MODEL,
              Stage.REDUCED: MODEL}
    shows = (Stage.LOGITS, Stage.IDS, Stage.WEIGHTS, Stage.MERGED, Stage.REDUCED)

    def routed_rows(self, call: Call, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        w13_EGIH, w2_EHI = call.weights.w13_EGIH.float(), call.weights.w2_EHI.float()
        gate_ETI, up_ETI = (torch.bmm(call.x_TH.float().expand(len(w13_EGIH), -1, -1), w13_EGIH[:, half].mT)
                            for half in (0, 1))
        act_ETI = call.round(Stage.ACT, self.activate(gate_ETI, up_ETI, call.spec.experts)).float()
        all_ETH = torch.bmm(act_ETI, w2_EHI.mT)
        token_T1 = torch.arange(len(ids_TK))[:, None]
        return (all_ETH[ids_TK, token_T1] * weights_TK[..., None]).flatten(0, 1)


class WeightAtMerge(TorchMoE):
    """Rows of the down projection stored without the routing weight, which joins when they are summed."""

    weight_at = "merge"


class GroupedMM(WeightAtMerge):
    """The down projection by torch's own grouped GEMM, which takes bf16 and widths of 16 bytes."""

    def routed_rows(self, call: Call, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        w13_EGIH, w2_EHI = call.weights.w13_EGIH, call.weights.w2_EHI
        aligned = not any(size % 8 for size in w2_EHI.shape[1:])
        if call.x_TH.dtype is not torch.bfloat16 or not aligned or not ids_TK.numel():
            return super().routed_rows(call, ids_TK, weights_TK)
        expert_R, row_R = ids_TK.flatten().sort(stable=True)
        ends_E = expert_R.bincount(minlength=len(w2_EHI)).cumsum(0).to(torch.int32)
        gate_RI, up_RI = torch.einsum("rh,rgih->gri", call.x_TH[row_R // ids_TK.shape[1]].float(),
                                      w13_EGIH[expert_R].float())
        act_RI = call.round(Stage.ACT, self.activate(gate_RI, up_RI, call.spec.experts))
        down_RH = F.grouped_mm(act_RI, w2_EHI.mT, offs=ends_E)
        call.store(Stage.ACT, torch.zeros_like(act_RI).index_copy(0, row_R, act_RI))
        return call.store(Stage.DOWN, torch.zeros_like(down_RH).index_copy(0, row_R, down_RH))


class HiddenEagerLoop(WeightAtMerge):
    """The usual eager loop: all in the model's dtype, single additions of slots too; shows its output."""

    stored = {**ROUND_EACH_STAGE, Stage.GATE_UP: MODEL, Stage.WEIGHTS: MODEL}
    merges_in_model = True
    shows = (Stage.IDS, Stage.REDUCED)

    def merge(self, call: Call, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        rows_TKH = self.routed_rows(call, ids_TK, weights_TK.float()).unflatten(0, ids_TK.shape)
        total_TH = torch.zeros_like(call.x_TH)
        for slot in range(ids_TK.shape[1]):
            total_TH = total_TH + rows_TKH[:, slot] * weights_TK[:, slot, None].to(call.x_TH.dtype)
        return total_TH if call.spec.shared is None else total_TH + self.shared_rows(call)


class OwnPartFirst(TorchMoE):
    """Partial sums gathered and added from the own one on: ranks differ in bits, and promise nothing."""

    stored = {**ROUND_EACH_STAGE, Stage.MERGED: Format.FP32, Stage.REDUCED: Format.FP32}
    reduce_in = Format.FP32
    promises = NO_PROMISES

    def all_reduce(self, call: Call, merged_TH: torch.Tensor) -> torch.Tensor:
        parts = call.groups.tp.all_gather(merged_TH)
        total = parts[call.rank]
        for step in range(1, call.size):
            total = total + parts[(call.rank + step) % call.size]
        return total


class CollectiveOnlyWhereNeeded(TorchMoE):
    """No collective when there is no token."""

    def all_reduce(self, call: Call, merged_TH: torch.Tensor) -> torch.Tensor:
        return super().all_reduce(call, merged_TH) if len(merged_TH) else merged_TH


class CollectiveAlways(TorchMoE):
    """The all-reduce is called on a single rank too, where it changes nothing."""

    def all_reduce(self, call: Call, merged_TH: torch.Tensor) -> torch.Tensor:
        return call.groups.tp.all_reduce(merged_TH)


class PartialsOnlyInReduce(TorchMoE):
    """Rounds its partial sums to the format that `reduce` names; no stage but the output is declared."""

    stored = {Stage.REDUCED: MODEL}
    shows = ()
    promises = NO_PROMISES

    def all_reduce(self, call: Call, merged_TH: torch.Tensor) -> torch.Tensor:
        return super().all_reduce(call, merged_TH.to(call.x_TH.dtype))


class ResidualOnRankZero(TorchMoE):
    """The residual enters rank 0's fp32 partial sum, so that the all-reduce finishes the layer."""

    stored = {Stage.ACT: MODEL, Stage.DOWN: MODEL, Stage.SHARED: MODEL, Stage.REDUCED: MODEL}
    reduce_in = Format.FP32
    shows = (Stage.IDS, Stage.ACT, Stage.DOWN, Stage.SHARED, Stage.REDUCED)

    def finish(self, call: Call, merged_TH: torch.Tensor, residual_TH: torch.Tensor | None) -> torch.Tensor:
        if residual_TH is not None and call.rank == 0:
            merged_TH = merged_TH + residual_TH.float()
        return call.store(Stage.REDUCED, self.all_reduce(call, merged_TH))


round_each_stage = TorchMoE()
gate_up_stored = GateUpStored()
fp32_partials = FP32Partials()
bf16_weights = BF16Weights()
hidden_bf16_weights = HiddenBF16Weights()
bf16_router = BF16Router()
black_box = BlackBox()
topk_reversed = TopkReversed()
split_k = SplitK()
batched = Batched()
weight_at_merge = WeightAtMerge()
grouped_mm = GroupedMM()
hidden_eager_loop = HiddenEagerLoop()
own_part_first = OwnPartFirst()
collective_only_where_needed = CollectiveOnlyWhereNeeded()
collective_always = CollectiveAlways()
partials_only_in_reduce = PartialsOnlyInReduce()
residual_on_rank_zero = ResidualOnRankZero()
