"""Experts of stacked weights as tensors of their own, for autograd."""

import torch

from moe_ref.contract.weights import EXPERT_PARAMETERS, ExpertWeights, MoEWeights, WeightSource


def unbound(weights: WeightSource) -> WeightSource:
    """The same source; where a gradient of stacked experts is wanted, one that was cut into experts once.

    The gradient of one slice of a stack is a stack of zeros around it, so slicing E times costs E^2; cut at once,
    the gradients are put together once.
    """
    if not isinstance(weights, MoEWeights) or not torch.is_grad_enabled():
        return weights
    stacks = [getattr(weights, name) for name in EXPERT_PARAMETERS]
    return _Unbound(weights, stacks) if any(s is not None and s.requires_grad for s in stacks) else weights


class _Unbound:
    def __init__(self, weights: MoEWeights, stacks: list[torch.Tensor | None]) -> None:
        self.router_EH, self.router_bias_E = weights.router_EH, weights.router_bias_E
        self.selection_bias_E, self.weight_scale_E = weights.selection_bias_E, weights.weight_scale_E
        self.shared_gate_SH, self.output_bias_H = weights.shared_gate_SH, weights.output_bias_H
        self.shared_expert = weights.shared_expert
        self._experts = list(zip(*(stack.unbind(0) if stack is not None else [None] * len(weights.w2_EHI)
                                   for stack in stacks), strict=True))

    def expert(self, e: int) -> ExpertWeights:
        return ExpertWeights(*self._experts[e])
