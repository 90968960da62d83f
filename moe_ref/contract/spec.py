"""The mathematics of a layer, and nothing else: no dtype, no layout, no parallelism.

A shared expert has an MLP description of its own: released models clamp routed and shared experts
differently (Hunyuan V4 clamps the routed ones alone). Limits that change from layer to layer make one spec
per layer.
"""

from dataclasses import dataclass, field
from typing import Literal

from moe_ref.contract.errors import (
    flag_faults,
    kind_faults,
    number_faults,
    one_of_faults,
    positive_faults,
    raise_faults,
)
from moe_ref.contract.router_spec import Capacity, Router, store_floats

__all__ = ["MLP", "Capacity", "MoESpec", "Router", "SharedExpert"]

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu_squared"]
LimitAt = Literal["before", "after"]
SharedGate = Literal["none", "sigmoid", "router"]
SharedMerge = Literal["sum", "mean"]
WeightOn = Literal["output", "input"]


@dataclass(frozen=True, kw_only=True)
class MLP:
    """w2 @ (activation(w1 @ x) * (w3 @ x)), or w2 @ activation(w1 @ x) where it is not gated.

    activation:     gelu is the erf form, gelu_tanh the tanh form, relu_squared relu(g)^2
    gated:          w13 holds gate and up (G = 2); False: one projection (G = 1)
    bias:           w13 and w2 have biases
    limit:          gate = min(gate, limit) "before" the activation, or min(activation, limit) "after" it; and in
    limit_at        both cases up = clamp(up, -limit, limit). None: no limit
    sigmoid_scale:  silu becomes g * sigmoid(sigmoid_scale * g); 1.702 in gpt-oss
    up_offset:      up + up_offset is what the activation is multiplied with; 1 in gpt-oss
    gate_softcap    softcap * tanh(. / softcap) of the gate outside the sigmoid, and of up (Inkling 2); 0 is none:
    up_softcap      gate_softcap * tanh(g / gate_softcap) * sigmoid(g)
    """

    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False
    limit: float | None = None
    limit_at: LimitAt = "before"
    sigmoid_scale: float = 1.0
    up_offset: float = 0.0
    gate_softcap: float = 0.0
    up_softcap: float = 0.0

    @property
    def num_projections(self) -> int:
        """G: gate and up, or one."""
        return 2 if self.gated else 1

    def __post_init__(self) -> None:
        faults = one_of_faults("activation", self.activation, Activation)
        faults += one_of_faults("limit_at", self.limit_at, LimitAt)
        faults += flag_faults(gated=self.gated, bias=self.bias)
        if self.limit is not None:
            faults += number_faults("limit", self.limit, above=0.0)
        faults += number_faults("sigmoid_scale", self.sigmoid_scale, above=0.0)
        faults += number_faults("up_offset", self.up_offset)
        faults += number_faults("gate_softcap", self.gate_softcap, least=0.0)
        faults += number_faults("up_softcap", self.up_softcap, least=0.0)
        raise_faults("MLP", faults or self._combination_faults())
        store_floats(self, "limit", "sigmoid_scale", "up_offset", "gate_softcap", "up_softcap")

    def _combination_faults(self) -> list[str]:
        faults = []
        if self.activation != "silu" and (self.sigmoid_scale != 1.0 or self.gate_softcap):
            faults.append(f"activation={self.activation!r}, but sigmoid_scale and gate_softcap belong to silu")
        if not self.gated and (self.up_offset or self.up_softcap):
            faults.append("gated=False, but up_offset and up_softcap need an up projection")
        if self.limit is None and self.limit_at != "before":
            faults.append("limit_at='after', but there is no limit")
        if self.limit is not None and (self.gate_softcap or self.up_softcap):
            faults.append("limit and softcaps are not defined together")
        return faults


@dataclass(frozen=True, kw_only=True)
class SharedExpert:
    """An expert that every token passes; several ones fused are one of their total width.

    gate:    "sigmoid" multiplies it by sigmoid(shared_gate_SH @ x); "router": num_experts equal blocks of its
             width are weighted by further columns of the router, whose scores take part in the
             renormalisation and in every scale (Inkling)
    merge:   "mean": the layer's result is (routed + shared) / 2 (Cohere 2)
    """

    intermediate_size: int
    mlp: MLP = field(default_factory=MLP)
    gate: SharedGate = "none"
    num_experts: int = 1
    merge: SharedMerge = "sum"

    def __post_init__(self) -> None:
        faults = positive_faults(intermediate_size=self.intermediate_size, num_experts=self.num_experts)
        faults += one_of_faults("gate", self.gate, SharedGate) + one_of_faults("merge", self.merge, SharedMerge)
        faults += kind_faults("mlp", self.mlp, MLP, "an MLP")
        if not faults:
            if self.num_experts > 1 and self.gate != "router":
                faults.append(f"num_experts={self.num_experts}, but only gate='router' tells shared experts apart")
            if self.intermediate_size % self.num_experts:
                faults.append(f"intermediate_size={self.intermediate_size}, but should be a multiple of "
                              f"num_experts={self.num_experts}")
            if self.gate == "router" and self.mlp.bias:
                faults.append("gate='router' and mlp.bias are not defined together")
        raise_faults("SharedExpert", faults)

    @property
    def num_gates(self) -> int:
        """S: factors per token; 0 without a gate."""
        return {"none": 0, "sigmoid": 1, "router": self.num_experts}[self.gate]


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    """One mixture-of-experts layer; router None is a dense MLP (E = 1, K = 1, weight 1).

    weight_on:    the routing weight multiplies the expert's "output", or its "input" (Llama 4)
    output_bias:  one bias (H,) is added after the merge (JetMoE)
    """

    hidden_size: int
    intermediate_size: int
    router: Router | None = None
    experts: MLP = field(default_factory=MLP)
    shared: SharedExpert | None = None
    weight_on: WeightOn = "output"
    output_bias: bool = False

    def __post_init__(self) -> None:
        sizes = positive_faults(hidden_size=self.hidden_size, intermediate_size=self.intermediate_size)
        kinds = one_of_faults("weight_on", self.weight_on, WeightOn) + flag_faults(output_bias=self.output_bias)
        kinds += kind_faults("router", self.router, Router | None, "a Router or None")
        kinds += kind_faults("experts", self.experts, MLP, "an MLP")
        kinds += kind_faults("shared", self.shared, SharedExpert | None, "a SharedExpert or None")
        raise_faults("MoESpec", sizes + (kinds or self._combination_faults()))

    def _combination_faults(self) -> list[str]:
        faults = []
        if self.weight_on == "input":
            if self.experts.bias:
                # Implementations disagree: some weight before the bias is added, some after.
                faults.append("weight_on='input' and experts.bias are not defined together")
            if self.router is None or self.router.num_zero_experts:
                faults.append("weight_on='input' needs a router without zero experts")
        if self.shared is not None and self.shared.gate == "router":
            if self.router is None:
                faults.append("shared.gate='router', but there is no router")
            elif self.router.score == "softmax":
                faults.append("shared.gate='router' and score='softmax' are not defined together")
        return faults

    @property
    def num_experts(self) -> int:
        """E, without identity experts; 1 without a router."""
        return self.router.num_experts if self.router else 1

    @property
    def num_choices(self) -> int:
        """E + Z: what an id may be; 1 without a router."""
        return self.router.num_choices if self.router else 1

    @property
    def top_k(self) -> int:
        """K; 1 without a router."""
        return self.router.top_k if self.router else 1
