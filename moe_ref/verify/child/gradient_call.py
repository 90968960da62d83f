"""The same call once more with gradients: of everything that a rank is handed, for a given gradient of its output."""

from collections.abc import Mapping
from types import ModuleType

import torch

from moe_ref.contract.case import Case
from moe_ref.contract.comm import Groups
from moe_ref.contract.vocabulary import Stage, gradient_stage
from moe_ref.contract.weights import MoEWeights

_NO_GRADIENT = "selection_bias_E"
"""It only selects."""

_OF_EXPERTS = ("w13_EGIH", "w2_EHI", "shared_w13_GIH", "shared_w2_HI")
"""What has a gradient on every rank, zeros where no row arrived: without one, states of an optimiser part."""


Found = tuple[dict[Stage, torch.Tensor], list[Stage]]


def call_with_gradients(subject: ModuleType, case: Case, handed: Mapping[str, torch.Tensor | None], weights: MoEWeights,
                        grad_y_TH: torch.Tensor, groups: Groups) -> Found | None:
    """Gradients by stage, zeros where none arrived, and the experts' stages without one.

    None when the output does not depend on anything differentiably. No trace is kept: an implementation may refuse one
    while gradients are recorded.
    """
    # Tensors of their own for this rank: virtual ranks share the memory of what they hold alike.
    leaves = {name: tensor.detach().requires_grad_(name != _NO_GRADIENT)
              for name, tensor in [*handed.items(), *weights.named_tensors()] if tensor is not None}
    held = MoEWeights(**{name: leaves[name] for name, _ in weights.named_tensors()})
    # In this thread: virtual ranks would wait for each other in the one thread that autograd has for a device.
    with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
        output = subject.moe(leaves["x_TH"], held, case.problem.spec, case.parallel, groups,
                             logits_TE=leaves.get("logits_TE"), residual_TH=leaves.get("residual_TH"))
        if not isinstance(output, torch.Tensor) or not output.requires_grad:
            return None
        output.backward(grad_y_TH.to(output.dtype))
    gradients = {gradient_stage(name): torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                 for name, leaf in leaves.items() if leaf.requires_grad}
    return gradients, [gradient_stage(name) for name in _OF_EXPERTS if name in leaves and leaves[name].grad is None]
