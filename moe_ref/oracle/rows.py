"""Routed rows of every expert, put in (token, slot) order for a trace."""

import torch

from moe_ref.contract.rank import Rank
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Stage


class RoutedRows:
    """gate_up, act and down rows of one call; costs nothing without a trace.

    Where one rank hosts every expert there is a row for each slot, zero for those without an expert; else only for
    the slots that this rank serves, those whose local_TK is at least 0.
    """

    def __init__(self, trace: Trace | None, local_TK: torch.Tensor, spec: MoESpec, rank: Rank) -> None:
        self.trace = trace
        if trace is None:
            return
        self.has_row_TK = torch.ones_like(local_TK, dtype=torch.bool) if rank.ep.size == 1 else local_TK >= 0
        self.index_TK = (self.has_row_TK.flatten().cumsum(0) - 1).view_as(local_TK)
        (first, last), (start, stop) = rank.columns(spec.intermediate_size), rank.outputs(spec.hidden_size)
        widths = {Stage.GATE_UP: (spec.experts.num_projections, last - first), Stage.ACT: (last - first,),
                  Stage.DOWN: (stop - start,)}
        self.rows = {stage: torch.zeros(int(self.has_row_TK.sum()), *width, dtype=torch.float64, device=local_TK.device)
                     for stage, width in widths.items()}

    def keep(self, token_R: torch.Tensor, slot_R: torch.Tensor, **stages: torch.Tensor) -> None:
        """Rows of these slots, by stage."""
        if self.trace is None:
            return
        kept_R, index_R = self.has_row_TK[token_R, slot_R], self.index_TK[token_R, slot_R]
        for stage, tensor in stages.items():
            self.rows[Stage(stage)][index_R[kept_R]] = tensor.detach()[kept_R]

    def record(self) -> None:
        """All of them, once every expert is through."""
        if self.trace is not None:
            for stage, tensor in self.rows.items():
                self.trace.record(stage, tensor)
