"""The mathematics of a layer, and nothing else: no dtype, no layout, no parallelism.

Softmax over the selected experts only (gpt-oss, Granite) is softmax over all experts followed by
renormalisation: exp(l_i) / sum_S exp(l_j) is the same number either way. It is therefore no
option of its own: `Router(score="softmax", renormalize=True)`.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

from moe_ref.contract.errors import is_integer, raise_faults

Score = Literal["softmax", "sigmoid"]
GroupScore = Literal["max", "top2_sum"]
Activation = Literal["silu", "gelu", "gelu_tanh"]
SharedGate = Literal["none", "sigmoid"]


def _positive(**sizes: int) -> list[str]:
    return [f"{name}={value!r}, but should be an integer of at least 1"
            for name, value in sizes.items()
            if not is_integer(value) or value < 1]


def _one_of(name: str, value: object, choices: object) -> list[str]:
    allowed = get_args(choices)
    return [] if value in allowed else [f"{name}={value!r}, but should be one of {', '.join(allowed)}"]


@dataclass(frozen=True, kw_only=True)
class Router:
    """From logits to expert ids and weights.

    score:                softmax over all experts, or sigmoid of each logit
    selection_bias:       a per-expert bias is added to the score for SELECTION only (DeepSeek-V3)
    num_groups:           experts form equal consecutive groups; only the best
    num_groups_kept       groups by group_score (largest member, or sum of the two largest) compete
    renormalize:          weights / (sum of selected weights + renormalize_epsilon)
    scaling_factor:       multiplies the weights, after renormalisation
    Ties go to the lower expert id.
    """

    num_experts: int
    top_k: int
    score: Score = "softmax"
    selection_bias: bool = False
    num_groups: int = 1
    num_groups_kept: int = 1
    group_score: GroupScore = "max"
    renormalize: bool = False
    renormalize_epsilon: float = 0.0
    scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        faults = _positive(num_experts=self.num_experts, top_k=self.top_k,
                           num_groups=self.num_groups, num_groups_kept=self.num_groups_kept)
        faults += _one_of("score", self.score, Score) + _one_of("group_score", self.group_score, GroupScore)
        if not faults:
            faults += self._combination_faults()
        raise_faults("Router", faults)

    def _combination_faults(self) -> list[str]:
        faults = []
        if self.top_k > self.num_experts:
            faults.append(f"top_k={self.top_k}, but should be at most num_experts={self.num_experts}")
        if self.num_experts % self.num_groups:
            faults.append(f"num_groups={self.num_groups}, but should divide num_experts={self.num_experts}")
        if self.num_groups_kept > self.num_groups:
            faults.append(f"num_groups_kept={self.num_groups_kept}, but should be at most num_groups={self.num_groups}")
        elif self.num_groups_kept * (self.num_experts // self.num_groups) < self.top_k:
            faults.append(f"top_k={self.top_k}, but the {self.num_groups_kept} groups kept hold only "
                          f"{self.num_groups_kept * (self.num_experts // self.num_groups)} experts")
        if self.group_score == "top2_sum" and self.num_groups > 1 and self.num_experts // self.num_groups < 2:
            faults.append("group_score='top2_sum', but groups hold a single expert")
        if not 0.0 <= self.renormalize_epsilon < float("inf"):
            faults.append(f"renormalize_epsilon={self.renormalize_epsilon}, but should be finite and at least 0")
        if not 0.0 < self.scaling_factor < float("inf"):
            faults.append(f"scaling_factor={self.scaling_factor}, but should be positive and finite")
        return faults


@dataclass(frozen=True, kw_only=True)
class MLP:
    """A gated MLP: w2 @ (activation(w1 @ x) * (w3 @ x)); gelu is the erf form."""

    activation: Activation = "silu"

    def __post_init__(self) -> None:
        raise_faults("MLP", _one_of("activation", self.activation, Activation))


@dataclass(frozen=True, kw_only=True)
class SharedExpert:
    """An expert that every token passes; gate "sigmoid" multiplies it by sigmoid(shared_gate_SH @ x)."""

    intermediate_size: int
    mlp: MLP = field(default_factory=MLP)
    gate: SharedGate = "none"

    def __post_init__(self) -> None:
        raise_faults("SharedExpert", _positive(intermediate_size=self.intermediate_size)
                     + _one_of("gate", self.gate, SharedGate))


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    """One mixture-of-experts layer; router None is a dense gated MLP (E = 1, K = 1, weight 1)."""

    hidden_size: int
    intermediate_size: int
    router: Router | None = None
    experts: MLP = field(default_factory=MLP)
    shared: SharedExpert | None = None

    def __post_init__(self) -> None:
        raise_faults("MoESpec", _positive(hidden_size=self.hidden_size, intermediate_size=self.intermediate_size))

    @property
    def num_experts(self) -> int:
        """E; 1 without a router."""
        return self.router.num_experts if self.router else 1

    @property
    def top_k(self) -> int:
        """K; 1 without a router."""
        return self.router.top_k if self.router else 1
