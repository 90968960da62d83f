"""Right implementations that differ from moe_fast: another rounding contract, another order, another algorithm."""

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

    stored = {**dict.fromkeys((Stage.LOGITS, Stage.WEIGHTS, Stage.ACT, Stage.DOWN, Stage.SHARED, Stage.MERGED),
                              Format.FP32), Stage.REDUCED: MODEL}
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
    """Every expert applied to every token by bmm, then masked: no gather, no permutation. Natural order of slots."""

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


class GroupedMM(TorchMoE):
    """Rows sorted by expert and torch's own grouped GEMM; it wants bf16 and sizes of 16 bytes, else plain products."""

    def routed_rows(self, call: Call, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        inner = call.weights.w2_EHI.shape[2]
        if call.x_TH.dtype is not torch.bfloat16 or inner % 8 or call.spec.hidden_size % 8 or not ids_TK.numel():
            return super().routed_rows(call, ids_TK, weights_TK)
        row_R = ids_TK.flatten().sort(stable=True).indices
        counts = ids_TK.flatten().bincount(minlength=call.spec.num_experts)
        offsets = counts.cumsum(0).to(torch.int32)
        x_RH = call.x_TH[row_R // ids_TK.shape[1]]
        # grouped_mm returns bf16 only, so the gate and up rows are rounded once more than the contract says here:
        # the act is therefore computed from fp32 products, and only the down projection is a grouped GEMM.
        gate, up = torch.einsum("rh,rgih->gri", x_RH.float(),
                                call.weights.w13_EGIH[ids_TK.flatten()[row_R]].float())
        act = call.round(Stage.ACT, self.activate(gate, up, call.spec.experts))
        down = F.grouped_mm(act, call.weights.w2_EHI.mT, offs=offsets)
        ordered = torch.zeros_like(act).index_copy(0, row_R, act)
        call.store(Stage.ACT, ordered)
        weighted = down.float() * weights_TK.flatten()[row_R, None]
        return torch.zeros(weighted.shape).index_copy(0, row_R, weighted)


class ResidualOnRankZero(TorchMoE):
    """The residual enters rank 0's partial sum, so that the all-reduce finishes the layer; partial sums in fp32."""

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
grouped_mm = GroupedMM()
residual_on_rank_zero = ResidualOnRankZero()
