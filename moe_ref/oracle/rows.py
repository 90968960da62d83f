"""Routed rows of every expert, put in (token, slot) order for a trace."""

import torch

from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Stage


class RoutedRows:
    """gate_up, act and down rows of one call; costs nothing without a trace. Slots without an expert are zero."""

    def __init__(self, x_TH: torch.Tensor, spec: MoESpec, intermediate: int) -> None:
        self.num_rows, self.options = len(x_TH) * spec.top_k, {"dtype": torch.float64, "device": x_TH.device}
        self.widths = {Stage.GATE_UP: (spec.experts.num_projections, intermediate), Stage.ACT: (intermediate,),
                       Stage.DOWN: (spec.hidden_size,)}
        self.rows: dict[Stage, torch.Tensor] = {}

    def keep(self, trace: Trace | None, index_R: torch.Tensor, *tensors: torch.Tensor | None) -> None:
        """One expert's rows, in the order of the stages; None where it has no such stage."""
        if trace is None:
            return
        self._fill()
        for stage, tensor in zip(self.widths, tensors, strict=True):
            if tensor is not None:
                self.rows[stage][index_R] = tensor.detach()

    def _fill(self) -> None:
        for stage, width in self.widths.items():
            if stage not in self.rows:
                self.rows[stage] = torch.zeros(self.num_rows, *width, **self.options)

    def record(self, trace: Trace | None, routing: Routing, merged_TH: torch.Tensor) -> None:
        """Everything up to the merged rows."""
        if trace is None:
            return
        self._fill()
        if routing.logits_TE is not None:
            trace.record(Stage.LOGITS, routing.logits_TE)
        trace.record(Stage.IDS, routing.ids_TK)
        trace.record(Stage.WEIGHTS, routing.weights_TK)
        for stage, tensor in self.rows.items():
            trace.record(stage, tensor)
        trace.record(Stage.MERGED, merged_TH)
