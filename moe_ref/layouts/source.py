"""Experts read one at a time from stored tensors of any layout, in memory or in a file."""

from collections.abc import Mapping

import torch

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.weights import ExpertWeights
from moe_ref.layouts.stored import StoredMLP


class LayoutSource:
    """A WeightSource over stored tensors: nothing holds more than one expert beyond what is stored already."""

    def __init__(self, experts: StoredMLP, shared: StoredMLP | None, others: Mapping[str, torch.Tensor]) -> None:
        self._experts, self._shared = experts, shared
        self.router_EH = others.get("router_EH")
        self.router_bias_E = others.get("router_bias_E")
        self.selection_bias_E = others.get("selection_bias_E")
        self.weight_scale_E = others.get("weight_scale_E")
        self.shared_gate_SH = others.get("shared_gate_SH")
        self.output_bias_H = others.get("output_bias_H")

    @property
    def num_experts(self) -> int:
        """How many experts this rank hosts; E where one rank has them all."""
        return len(self._experts.experts)

    def expert(self, e: int) -> ExpertWeights:
        """This rank's part of the e-th expert that it hosts, read now.

        Raises UsageValueError for an e outside [0, num_experts).
        """
        if not 0 <= e < self.num_experts:
            raise UsageValueError(f"expert {e}, but should be in [0, {self.num_experts})")
        return self._experts.expert(e)

    def shared_expert(self) -> ExpertWeights | None:
        """This rank's part of the shared expert, read now, or None."""
        return None if self._shared is None else self._shared.shared_expert()
