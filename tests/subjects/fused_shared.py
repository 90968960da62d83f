"""A right layer whose shared expert is one expert more, in one slot more of every token: a fused kernel's way."""

import torch
import torch.nn.functional as F

from moe_ref.contract.vocabulary import Stage
from tests.subjects.base import Call, TorchMoE


class FusedShared(TorchMoE):
    """One pass over routed experts and the shared one; the narrower of them is padded with columns of zeros."""

    def merge(self, call: Call, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        shared = call.spec.shared
        if shared is None or shared.mlp != call.spec.experts:
            return super().merge(call, ids_TK, weights_TK)
        w13_EGIH, w2_EHI = self.with_appended(call)
        appended_T1 = torch.full((len(ids_TK), 1), self.appended_id(call))
        ids_TN = torch.cat([ids_TK, appended_T1], 1)
        weights_TN = torch.cat([weights_TK.float(), self.appended_weight(call)], 1)
        act_RI = torch.zeros(ids_TN.numel(), w2_EHI.shape[2])
        down_RH = torch.zeros(ids_TN.numel(), call.spec.hidden_size)
        for expert in range(self.num_aligned(call, w2_EHI)):
            token_R, slot_R = (ids_TN == expert).nonzero(as_tuple=True)
            row_R = token_R * ids_TN.shape[1] + slot_R
            gate_up = self.gate_up(call, call.x_TH[token_R], w13_EGIH[expert], expert)
            gate_up = call.round(Stage.GATE_UP, gate_up).float()
            act_RI[row_R] = call.round(Stage.ACT, self.activate(*gate_up.unbind(1), call.spec.experts)).float()
            down_RH[row_R] = self.down(call, act_RI[row_R], w2_EHI[expert], expert) * weights_TN[token_R, slot_R, None]
        act_TNI, down_TNH = act_RI.unflatten(0, ids_TN.shape), down_RH.unflatten(0, ids_TN.shape)
        call.store(Stage.ACT, act_TNI[:, :-1, :call.weights.w2_EHI.shape[2]].flatten(0, 1))
        routed_RH = call.store(Stage.DOWN, down_TNH[:, :-1].flatten(0, 1)).float()
        shared_TH = call.store(Stage.SHARED, down_TNH[:, -1]).float()
        return call.store(Stage.MERGED, self.sum_of_slots(routed_RH.unflatten(0, ids_TK.shape)) + shared_TH)

    def with_appended(self, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """w13_EGIH and w2_EHI with the shared expert behind the others, all of one width."""
        w13_GIH, w2_HI, _, _ = call.weights.shared_expert()
        width = max(w2_HI.shape[1], call.weights.w2_EHI.shape[2])
        w13_parts, w2_parts = (call.weights.w13_EGIH, w13_GIH[None]), (call.weights.w2_EHI, w2_HI[None])
        return (torch.cat([F.pad(part, (0, 0, 0, width - part.shape[2])) for part in w13_parts]),
                torch.cat([F.pad(part, (0, width - part.shape[2])) for part in w2_parts]))

    def appended_id(self, call: Call) -> int:
        return call.spec.num_experts

    def num_aligned(self, call: Call, w2_EHI: torch.Tensor) -> int:
        """Experts that rows are grouped by."""
        return len(w2_EHI)

    def appended_weight(self, call: Call) -> torch.Tensor:
        """The gate of the shared expert, or 1, (T, 1)."""
        if call.weights.shared_gate_SH is None:
            return torch.ones(len(call.x_TH), 1)
        logits_T1 = call.round(Stage.LOGITS, call.x_TH.float() @ call.weights.shared_gate_SH.float().T)
        return call.round(Stage.WEIGHTS, 1 / (1 + torch.exp(-logits_T1.float()))).float()


fused_shared = FusedShared()
