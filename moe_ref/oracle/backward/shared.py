"""The shared expert backward: an expert that every token passes, and its gates.

    sigmoid gate v:  y = v * (act @ w2^T + b2)       d_v = sum over H of d_y * (act @ w2^T + b2)
    router gates v:  y = (act * v of the block) @ w2^T     d_v = sum over the block of (d_y @ w2) * act
"""

from dataclasses import dataclass, field

import torch

from moe_ref.contract.comm import Comm
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.weights import WeightSource, check_shared
from moe_ref.oracle import expert as formula
from moe_ref.oracle.backward.mlp import projections_backward

SHARED_FIELDS = ("shared_w13_GIH", "shared_w2_HI", "shared_w13_bias_GI", "shared_w2_bias_H")
"""Parameters of the shared expert in the order of ExpertGradients."""


@dataclass(frozen=True)
class SharedGradients:
    """This rank's part of the gradients of tokens (T, H) and gates (T, S), and those of its own shard, by name.

    The part of a gate that meets the bias of w2 is counted on rank 0, as forward.
    """

    partial_x_TH: torch.Tensor
    partial_gates_TS: torch.Tensor | None = None
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)


def shared_backward(grad_TH: torch.Tensor, x_TH: torch.Tensor, gate_TS: torch.Tensor | None, weights: WeightSource,
                    spec: MoESpec, parallel: Parallel, tp: Comm) -> SharedGradients:
    """Gradients through the shared expert from that of its rows in the merge, (T, H), complete; all fp64."""
    expert, shared = check_shared(weights.shared_expert(), spec, parallel, tp.rank), spec.shared
    if shared is None or expert is None:
        return SharedGradients(torch.zeros_like(x_TH))
    gate_up_TGI = formula.gate_up(x_TH, expert.w13_GIH, expert.w13_bias_GI)
    act_TI = formula.activate(gate_up_TGI, shared.mlp)
    taken_TI, grad_down_TH, grad_gate_TS = act_TI, grad_TH, None
    if shared.gate == "sigmoid":
        grad_down_TH = grad_TH * _given(gate_TS)
        down_TH = formula.down(act_TI, expert.w2_HI)
        if expert.w2_bias_H is not None and tp.rank == 0:
            down_TH = down_TH + expert.w2_bias_H.double()
        grad_gate_TS = (grad_TH * down_TH).sum(-1, keepdim=True)
    grad_taken_TI = grad_down_TH @ formula.packed(expert.w2_HI)
    grad_act_TI = grad_taken_TI
    if shared.gate == "router":
        gate_TS = _given(gate_TS)
        start, stop = parallel.ranges(shared.intermediate_size)[tp.rank]
        block_I = torch.arange(start, stop, device=x_TH.device) // (shared.intermediate_size // shared.num_experts)
        taken_TI, grad_act_TI = act_TI * gate_TS[:, block_I], grad_taken_TI * gate_TS[:, block_I]
        grad_gate_TS = torch.zeros_like(gate_TS).index_add(1, block_I, grad_taken_TI * act_TI)
    grad_x_TH, gradients = projections_backward(grad_down_TH, grad_act_TI, x_TH, gate_up_TGI, taken_TI, expert,
                                                shared.mlp)
    parameters = {name: gradient for name, gradient in zip(SHARED_FIELDS, gradients, strict=True)
                  if gradient is not None}
    return SharedGradients(grad_x_TH, grad_gate_TS, parameters)


def _given(gate_TS: torch.Tensor | None) -> torch.Tensor:
    assert gate_TS is not None  # check_routing and shared_gates see to it
    return gate_TS.double()
