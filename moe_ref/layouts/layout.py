"""How the matrices of experts are stored: storage order, place of gate and up, experts stacked or in a list.

A stored tensor is described by its axes, one string of axis letters per dimension, outermost letter first:
("E", "GI", "H") is a stacked, merged (E, 2I, H), ("E", "IG", "H") the same size with gate and up interleaved.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from moe_ref.contract.errors import one_of_faults, raise_faults
from moe_ref.contract.spec import MLP

Order = Literal["out_in", "in_out"]
GateUp = Literal["merged", "interleaved", "separate"]
Axes = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One storage layout of an MLP or of all experts; experts without a gate have one plain projection, w1.

    order:       "out_in" stores (out, in) as torch.nn.Linear does, "in_out" stores (in, out)
    gate_up:     "merged": one w13 of 2I outputs, one half after the other; "interleaved": gate, up, gate, up, ...;
                 "separate": two tensors, w1 (gate) and w3 (up)
    gate_first:  False: up comes before gate
    stacked:     one tensor for all experts, E outermost; False: a list with one tensor per expert
    w2_order:    the storage order of w2 where it is another one (DBRX); None: as `order`
    folded:      E is folded into the next axis: (E * I, H) (DBRX)
    """

    order: Order
    gate_up: GateUp
    gate_first: bool = True
    stacked: bool = True
    w2_order: Order | None = None
    folded: bool = False

    def __post_init__(self) -> None:
        faults = one_of_faults("order", self.order, Order) + one_of_faults("gate_up", self.gate_up, GateUp)
        if self.w2_order is not None:
            faults += one_of_faults("w2_order", self.w2_order, Order, "None")
        if self.gate_up == "separate" and not self.gate_first:
            faults.append("gate_first=False, but separate tensors have no first one")
        if self.folded and not self.stacked:
            faults.append("folded=True, but a list of experts has no axis E")
        raise_faults("Layout", faults)

    def is_view(self, mlp: MLP) -> bool:
        """Whether all experts together can be read as strided views of what is stored."""
        return self.stacked and (not mlp.gated or (self.gate_up != "separate" and self.gate_first))


def mlp_axes(layout: Layout, mlp: MLP) -> dict[str, Axes]:
    """Axes of one MLP's stored tensors by name, without E: w13, or w1 and w3; w2; their biases if it has them."""
    outputs = {"w1": "I", "w3": "I"} if mlp.gated else {"w1": "I"}
    if mlp.gated and layout.gate_up != "separate":
        outputs = {"w13": "GI" if layout.gate_up == "merged" else "IG"}
    axes = {name: _matrix(output, "H", layout.order) for name, output in outputs.items()}
    axes["w2"] = _matrix("H", "I", layout.w2_order or layout.order)
    if mlp.bias:
        axes |= {f"{name}_bias": (output,) for name, output in outputs.items()} | {"w2_bias": ("H",)}
    return axes


def _matrix(output: str, inputs: str, order: Order) -> Axes:
    return (output, inputs) if order == "out_in" else (inputs, output)


def with_experts(axes: Axes, layout: Layout) -> Axes:
    """The same axes for all experts; unchanged in a list, whose tensors hold one expert each."""
    if not layout.stacked:
        return axes
    return ("E" + axes[0], *axes[1:]) if layout.folded else ("E", *axes)


def stored_shape(axes: Axes, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a tensor with these axes."""
    return tuple(prod(sizes[letter] for letter in group) for group in axes)
