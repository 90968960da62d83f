"""The routed experts backward: rows of one expert after the other, identity experts, and what they add up to."""

import torch

from moe_ref.contract.comm import Comm
from moe_ref.contract.gradients import ExpertGradients, OnExpert
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.weights import WeightSource, check_expert, parameter_shapes
from moe_ref.oracle import expert as formula
from moe_ref.oracle.backward.mlp import projections_backward

EXPERT_FIELDS = ("w13_EGIH", "w2_EHI", "w13_bias_EGI", "w2_bias_EH")
"""Parameters of the routed experts in the order of ExpertGradients."""


class RoutedBackward:
    """Sums over the routed experts; partial_*: this rank's part, whole_*: complete on every rank already.

    grad_TH: of the routed sum (T, H), complete; x_TH (T, H); both fp64. Slots whose id is no expert stay 0.
    """

    def __init__(self, grad_TH: torch.Tensor, x_TH: torch.Tensor, routing: Routing, weights: WeightSource,
                 spec: MoESpec, parallel: Parallel, tp: Comm) -> None:
        self.grad_TH, self.x_TH, self.routing = grad_TH, x_TH, routing
        self.weights, self.spec, self.parallel, self.rank = weights, spec, parallel, tp.rank
        self.weights_TK = routing.weights_TK.double()
        self.partial_x_TH, self.whole_x_TH = torch.zeros_like(x_TH), torch.zeros_like(x_TH)
        self.partial_weights_TK = torch.zeros_like(self.weights_TK)
        self.whole_weights_TK = torch.zeros_like(self.weights_TK)
        shapes = parameter_shapes(spec, parallel, tp.rank)
        self.shapes = {name: shapes[name] for name in EXPERT_FIELDS if name in shapes}

    def run(self, on_expert: OnExpert | None) -> dict[str, torch.Tensor]:
        """Every expert; the gradients of parameters by field name, or none where on_expert takes them."""
        held = {} if on_expert else {name: self._zeros(shape) for name, shape in self.shapes.items()}

        def hold(e: int, gradients: ExpertGradients) -> None:
            for name, gradient in zip(EXPERT_FIELDS, gradients, strict=True):
                if gradient is not None:
                    held[name][e] = gradient

        for e in range(self.spec.num_choices):
            token_R, slot_R = (self.routing.ids_TK == e).nonzero(as_tuple=True)
            if e >= self.spec.num_experts:
                self._identity(token_R, slot_R)
            elif len(token_R):
                (on_expert or hold)(e, self._expert(e, token_R, slot_R))
            elif on_expert:
                on_expert(e, self._no_rows())
        return held

    def _identity(self, token_R: torch.Tensor, slot_R: torch.Tensor) -> None:
        """y = w * x. Rank 0 alone adds it forward; its gradient needs no shard."""
        grad_RH = self.grad_TH[token_R]
        self.whole_x_TH.index_add_(0, token_R, self.weights_TK[token_R, slot_R, None] * grad_RH)
        self.whole_weights_TK[token_R, slot_R] = (grad_RH * self.x_TH[token_R]).sum(-1)

    def _expert(self, e: int, token_R: torch.Tensor, slot_R: torch.Tensor) -> ExpertGradients:
        """Adds the rows' gradients of x and weights; returns those of the parameters."""
        expert = check_expert(self.weights.expert(e), self.spec, self.parallel, self.rank, e)
        on_input, mlp = self.spec.weight_on == "input", self.spec.experts
        w_R1, x_RH, grad_RH = self.weights_TK[token_R, slot_R, None], self.x_TH[token_R], self.grad_TH[token_R]
        in_RH, grad_down_RH = (w_R1 * x_RH, grad_RH) if on_input else (x_RH, w_R1 * grad_RH)
        gate_up_RGI = formula.gate_up(in_RH, expert.w13_GIH, expert.w13_bias_GI)
        act_RI = formula.activate(gate_up_RGI, mlp)
        grad_act_RI = grad_down_RH @ formula.packed(expert.w2_HI)
        grad_in_RH, gradients = projections_backward(grad_down_RH, grad_act_RI, in_RH, gate_up_RGI, act_RI, expert,
                                                     mlp)
        if on_input:
            grad_w_R, grad_in_RH = (grad_in_RH * x_RH).sum(-1), w_R1 * grad_in_RH
        else:
            grad_w_R = (grad_RH * formula.down(act_RI, expert.w2_HI)).sum(-1)
            if expert.w2_bias_H is not None:
                self.whole_weights_TK[token_R, slot_R] = grad_RH @ expert.w2_bias_H.double()
        self.partial_x_TH.index_add_(0, token_R, grad_in_RH)
        self.partial_weights_TK[token_R, slot_R] = grad_w_R
        return gradients

    def _no_rows(self) -> ExpertGradients:
        zeros = {name: self._zeros(shape[1:]) for name, shape in self.shapes.items()}
        return ExpertGradients(zeros["w13_EGIH"], zeros["w2_EHI"], zeros.get("w13_bias_EGI"),
                               zeros.get("w2_bias_EH"))

    def _zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.x_TH.device)
