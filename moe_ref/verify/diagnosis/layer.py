"""A whole layer with all its ranks in fp64, every step a method: a fault is a subclass that replaces one."""

from functools import cached_property

import torch

from moe_ref.contract.shares import RankShare
from moe_ref.contract.spec import MLP
from moe_ref.contract.vocabulary import Schedule, SharedPlacement, Stage
from moe_ref.oracle import expert as formula
from moe_ref.oracle import router as routing
from moe_ref.verify.diagnosis.expert_steps import ExpertSteps
from moe_ref.verify.measure.placing import servers


class Layer(ExpertSteps):
    """The right layer: shared expert, merge and reduction beside what its bases have; a fault says what it changes."""

    # Shared expert and merge: (P, T, H).

    def shared(self) -> torch.Tensor:
        rows = torch.zeros(self.parallel.size, *self.x_TH.shape, dtype=torch.float64)
        shared, expert = self.spec.shared, self.known.shared
        if shared is None or expert is None:
            return rows
        gate_up = formula.gate_up(self.x_TH, expert.w13_GIH, expert.w13_bias_GI)
        act_TI, gate_TS = formula.activate(gate_up, self.shared_mlp(shared.mlp)), self.gates()
        if shared.gate == "router" and gate_TS is not None:
            act_TI = act_TI * gate_TS.repeat_interleave(shared.intermediate_size // shared.num_experts, 1)
        for share in self.shares:
            cut = self.by_output and not self.whole_shared
            inner = slice(*((0, shared.intermediate_size) if self.by_output else share.shared_columns))
            tokens = slice(*(share.tokens if self.whole_shared else share.merged_tokens))
            outputs = slice(*share.outputs) if cut else slice(None)
            part_TH = act_TI[tokens, inner] @ expert.w2_HI[outputs, inner].T
            first = share.tp_rank == 0 and (share.ep_rank == 0 or self.parallel.tokens.over_ep)
            if expert.w2_bias_H is not None and (first or self.by_output or self.whole_shared):
                part_TH = part_TH + expert.w2_bias_H[outputs]
            if shared.gate == "sigmoid" and gate_TS is not None:
                part_TH = part_TH * gate_TS[tokens]
            rows[share.rank, tokens, outputs] = part_TH
        return rows

    def shared_mlp(self, mlp: MLP) -> MLP:
        return mlp

    def gates(self) -> torch.Tensor | None:
        if self.spec.shared is not None and self.spec.shared.gate == "sigmoid":
            return routing.shared_gates(self.x_TH, self.inputs.weights, self.spec)
        return self.routed[2]

    @property
    def whole_shared(self) -> bool:
        return self.parallel.shared is SharedPlacement.REPLICATED

    @property
    def by_slot(self) -> bool:
        return self.parallel.schedule is Schedule.ALL_REDUCE_ROWS

    @cached_property
    def home_R(self) -> torch.Tensor:
        """The ep rank in whose sum a row ends."""
        ids_TK = self.stage(Stage.IDS)
        if not self.parallel.tokens.over_ep:
            return servers(ids_TK, self.case, self.shares).flatten().clamp(min=0)
        ends = torch.tensor([share.merged_tokens[1] for share in self.shares[::self.parallel.tp]])
        return torch.searchsorted(ends, torch.arange(len(self.x_TH)), right=True).repeat_interleave(ids_TK.shape[1])

    def merged(self) -> torch.Tensor:
        rows_PRH, (num_tokens, hidden), tp = self.stage(Stage.DOWN), self.x_TH.shape, self.parallel.tp
        rows_PRH = self.slots((rows_PRH * self.row_weight_R1 if self.weighs_at("merge") else rows_PRH).unflatten(
            1, (num_tokens, self.spec.top_k))).flatten(1, 2)
        token_R = torch.arange(rows_PRH.shape[1]) // self.spec.top_k
        sums = torch.zeros(self.parallel.size * num_tokens, hidden, dtype=torch.float64)
        for tp_rank in range(tp):
            sums.index_add_(0, (self.home_R * tp + tp_rank) * num_tokens + token_R, rows_PRH[tp_rank])
        return self.joined(sums.view(self.parallel.size, num_tokens, hidden))

    def slots(self, rows_PTKH: torch.Tensor) -> torch.Tensor:
        return rows_PTKH

    def joined(self, sums_PTH: torch.Tensor) -> torch.Tensor:
        """Partial sums with what else is in them."""
        if not self.whole_shared:
            sums_PTH = self.averaged(sums_PTH + self.shared_part()) + self.bias_part()
        if not self.by_slot:
            return sums_PTH
        total_TH = sums_PTH.sum(0)
        return total_TH.expand(self.parallel.size, *total_TH.shape)

    def shared_part(self) -> torch.Tensor:
        return self.stage(Stage.SHARED)

    def averaged(self, total: torch.Tensor) -> torch.Tensor:
        return total / 2 if self.spec.shared is not None and self.spec.shared.merge == "mean" else total

    def bias_part(self) -> torch.Tensor:
        """The output bias of each rank's sum, (P, T, H)."""
        parts = torch.zeros(self.parallel.size, *self.x_TH.shape, dtype=torch.float64)
        bias_H = self.inputs.weights.output_bias_H
        for share in self.shares:
            if bias_H is not None and self.adds_output_bias(share):
                at = slice(*share.merged_tokens), slice(*share.outputs)
                parts[share.rank, *at] = bias_H.double()[at[1]]
        return parts

    def adds_output_bias(self, share: RankShare) -> bool:
        return self.by_output or (share.tp_rank == 0 and (share.ep_rank == 0 or self.parallel.tokens.over_ep))

    # Ranks: (P, T, H).

    def reduced(self) -> torch.Tensor:
        merged_PTH, bias_H = self.stage(Stage.MERGED), self.inputs.weights.output_bias_H
        total_PTH = merged_PTH if self.by_slot else self.summed(merged_PTH)
        if self.whole_shared:
            total_PTH = self.averaged(total_PTH + self.late_shared())
            total_PTH = total_PTH if bias_H is None else total_PTH + bias_H.double()
        residual_TH = self.inputs.residual_TH
        return total_PTH if residual_TH is None else total_PTH + self.residuals * residual_TH.double()

    def summed(self, merged_PTH: torch.Tensor) -> torch.Tensor:
        """What each rank has after the reduction; sums of ranks with other tokens are zero in these."""
        total_TH = merged_PTH.sum(0)
        return total_TH.expand(self.parallel.size, *total_TH.shape)

    def late_shared(self) -> torch.Tensor:
        """The whole shared expert that every rank adds to the complete sum."""
        return self.stage(Stage.SHARED)

    @property
    def residuals(self) -> float:
        """How often the residual is in the result."""
        return 1.0
