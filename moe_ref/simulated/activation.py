"""activation(gate) and its steps, each rounded where the contract rounds inside an activation."""

import math

import torch

from moe_ref.contract.spec import MLP
from moe_ref.contract.vocabulary import Format
from moe_ref.numerics.formats import round_to


def activated_gate(gate_RI: torch.Tensor, mlp: MLP, inner: Format | None) -> torch.Tensor:
    """silu, gelu or gelu_tanh of the gate, (R, I) fp64; every step rounded to `inner`, or none.

    A sigmoid, tanh or erf is one step. Formulas: moe_ref.contract.spec.MLP.
    """
    def step(value: torch.Tensor) -> torch.Tensor:
        return value if inner is None else round_to(value, inner)

    if mlp.activation == "silu":
        return step(gate_RI * step(torch.sigmoid(gate_RI)))
    if inner is None:  # 1 + erf and 1 + tanh would cancel for negative gates
        if mlp.activation == "gelu":
            return 0.5 * gate_RI * torch.erfc(-gate_RI / math.sqrt(2))
        return gate_RI * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (gate_RI + 0.044715 * gate_RI**3))
    if mlp.activation == "gelu":
        inside = torch.erf(step(gate_RI * math.sqrt(0.5)))
    else:
        cube = step(gate_RI * step(gate_RI * gate_RI))
        inside = torch.tanh(step(math.sqrt(2 / math.pi) * step(gate_RI + step(0.044715 * cube))))
    return step(step(0.5 * gate_RI) * step(1 + step(inside)))
