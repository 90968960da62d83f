"""A right layer that groups rows by expert with a counting sort over blocks of rows, as kernels do it."""

import torch

from moe_ref.contract.vocabulary import Stage
from tests.subjects.base import Call, TorchMoE

BLOCK = 256
"""Rows that are counted together."""


class CountingSort(TorchMoE):
    """Rows of one expert stand together in the order of their tokens; a place that nobody filled is padding."""

    def routed_rows(self, call: Call, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        num_rows, top_k = ids_TK.numel(), ids_TK.shape[1]
        counts_BE = torch.stack([block_R.bincount(minlength=call.spec.num_experts)
                                 for block_R in ids_TK.flatten().long().split(BLOCK)])
        ends_E = counts_BE.sum(0).cumsum(0)
        starts_E = ends_E - counts_BE.sum(0)
        sorted_R = self.scattered(ids_TK.flatten(), self.bases(counts_BE, starts_E))
        act_RI = torch.zeros(num_rows, call.weights.w2_EHI.shape[2])
        down_RH = torch.zeros(num_rows, call.spec.hidden_size)
        for expert, (start, end) in enumerate(zip(starts_E.tolist(), ends_E.tolist(), strict=True)):
            row_R = sorted_R[start:end]
            row_R = row_R[row_R < num_rows]
            w13_GIH, w2_HI, _, _ = call.weights.expert(expert)
            gate_up = call.round(Stage.GATE_UP, self.gate_up(call, call.x_TH[row_R // top_k], w13_GIH, expert)).float()
            act_RI[row_R] = call.round(Stage.ACT, self.activate(*gate_up.unbind(1), call.spec.experts)).float()
            down_RH[row_R] = self.down(call, act_RI[row_R], w2_HI, expert) * weights_TK.flatten()[row_R, None]
        call.store(Stage.ACT, act_RI)
        return call.store(Stage.DOWN, down_RH)

    def bases(self, counts_BE: torch.Tensor, starts_E: torch.Tensor) -> torch.Tensor:
        """Where the rows of each block begin among those of an expert."""
        return starts_E + counts_BE.cumsum(0) - counts_BE

    def scattered(self, ids_R: torch.Tensor, bases_BE: torch.Tensor) -> torch.Tensor:
        """The row at each sorted place; one past the last row is padding."""
        sorted_R = torch.full_like(ids_R, len(ids_R), dtype=torch.int64)
        for block, ids in enumerate(ids_R.split(BLOCK)):
            cursor_E = bases_BE[block].tolist()
            for lane, expert in enumerate(ids.tolist()):
                sorted_R[cursor_E[expert]] = block * BLOCK + lane
                cursor_E[expert] += 1
        return sorted_R


counting_sort = CountingSort()
