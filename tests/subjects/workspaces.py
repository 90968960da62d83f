"""A right layer that handles memory as kernels do: chunks of rows, flat workspaces, tiles, any layout of the result."""

from itertools import pairwise

import torch

from moe_ref.contract.spec import MLP
from moe_ref.contract.vocabulary import Stage
from tests.subjects.base import Call, TorchMoE

WORKSPACE = 4096
"""Elements of the activation's workspace: what its offsets can count, as 2^31 is on a GPU."""
BLOCK = 64


class Workspaces(TorchMoE):
    """Rows of a chunk are sorted by expert; their activation stands in a workspace from which the down product reads.

    An offset past the workspace wraps, as one of 32 bits does.
    """

    def routed_rows(self, call: Call, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        w13_EGIH, w2_EHI = call.weights.w13_EGIH, call.weights.w2_EHI
        ids_R, weights_R = ids_TK.flatten(), weights_TK.flatten()
        (num_experts, _, intermediate), top_k = w2_EHI.shape, ids_TK.shape[1]
        act_RI, down_RH = torch.zeros(len(ids_R), intermediate), self.result(len(ids_R), w2_EHI[0])
        step = self.chunk_rows(intermediate)
        for start in range(0, len(ids_R), step):
            chunk_R = ids_R[start:start + step]
            row_R = start + chunk_R.sort(stable=True).indices
            counts_E = chunk_R.bincount(minlength=num_experts)
            position_R, space = torch.arange(len(chunk_R)), torch.empty(WORKSPACE)
            groups = [slice(*ends) for ends in pairwise([0, *counts_E.cumsum(0).tolist()])]
            for expert, group in enumerate(groups):
                gate_up = self.gate_up(call, call.x_TH[row_R[group] // top_k], w13_EGIH[expert], expert)
                act = call.round(Stage.ACT, self.activated(call.round(Stage.GATE_UP, gate_up), call.spec.experts))
                space[offsets(position_R[group], torch.arange(intermediate), intermediate)] = act.float()
            for expert, group in enumerate(groups):
                down = self.down_by_tiles(space, position_R[group], w2_EHI[expert].float())
                self.write(down_RH, row_R[group], down * weights_R[row_R[group], None])
            act_RI[row_R] = space[offsets(position_R, torch.arange(intermediate), intermediate)]
        call.store(Stage.ACT, act_RI)
        return call.store(Stage.DOWN, down_RH)

    def chunk_rows(self, intermediate: int) -> int:
        """How many rows the workspace holds."""
        return max(1, WORKSPACE // max(1, intermediate))

    def activated(self, gate_up_RGI: torch.Tensor, mlp: MLP) -> torch.Tensor:
        """Block by block; the last one is shifted back to end with the row, and does some columns again."""
        gate_RI, up_RI = gate_up_RGI.float().unbind(1)
        act_RI = torch.empty_like(gate_RI)
        for start in range(0, gate_RI.shape[1], BLOCK):
            first = max(0, min(start, gate_RI.shape[1] - BLOCK))
            block = slice(first, first + BLOCK)
            act_RI[:, block] = self.activate(gate_RI[:, block], up_RI[:, block], mlp)
        return act_RI

    def down_by_tiles(self, space: torch.Tensor, position_R: torch.Tensor, w2_HI: torch.Tensor) -> torch.Tensor:
        """act @ w2^T of rows at positions, over I in tiles; addresses past an end are read and masked."""
        (hidden, intermediate), flat = w2_HI.shape, w2_HI.flatten()
        total_RH = torch.zeros(len(position_R), hidden)
        for start in range(0, intermediate, BLOCK):
            i = start + torch.arange(BLOCK)
            inside = i < intermediate
            act = space[offsets(position_R, i, intermediate)].where(inside, 0.0)
            w2 = flat[(torch.arange(hidden)[:, None] * intermediate + i).clamp(max=flat.numel() - 1)].where(inside, 0.0)
            total_RH += act @ w2.T
        return total_RH

    def result(self, num_rows: int, w2_HI: torch.Tensor) -> torch.Tensor:
        """(R, H), its memory in the order of w2's: by column where a column of w2 is contiguous."""
        hidden = len(w2_HI)
        return torch.empty(hidden, num_rows).T if w2_HI.stride(0) == 1 else torch.empty(num_rows, hidden)

    def write(self, result_RH: torch.Tensor, row_R: torch.Tensor, down_RH: torch.Tensor) -> None:
        """Rows into the result, by addresses."""
        stride_R, stride_H = result_RH.stride()
        at = row_R[:, None] * stride_R + torch.arange(result_RH.shape[1]) * stride_H
        result_RH.as_strided((result_RH.numel(),), (1,))[at] = down_RH


def offsets(position_R: torch.Tensor, i: torch.Tensor, intermediate: int) -> torch.Tensor:
    """Where elements of rows stand in the workspace, (R, len(i))."""
    return (position_R[:, None] * intermediate + i) % WORKSPACE


workspaces = Workspaces()
