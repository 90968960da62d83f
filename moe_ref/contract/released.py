"""In which dtype released code computes each step: rounding points, which are no part of the mathematics."""

from dataclasses import dataclass
from typing import Literal

from moe_ref.contract.errors import one_of_faults, raise_faults

At = Literal["model", "fp32"]
ScaleOn = Literal["weights", "output"]
WeightAt = Literal["down", "act"]


@dataclass(frozen=True, kw_only=True)
class ReleasedNumerics:
    """Rounding points of a family's published implementation; "model" is the dtype of tokens and weights.

    logits:       x @ router^T; fp32: tokens and router are converted first
    score:        softmax, sigmoid, and the renormalisation of weights; every step is rounded
    weight:       the routing weights as the experts receive them
    score_after_selection: scores are computed from the selected logits only
    scale_on:     scaling_factor multiplies the "weights", or the "output" of the routed experts
    rows:         what the routed experts' matrix products are stored in; biases are added to the stored product
    activation:   model: every elementwise step of the activation is rounded; fp32: one rounding at its end
    weight_at:    the routing weight multiplies the expert's output ("down") or its activation ("act")
    merge:        the running sum over experts is kept in this dtype
    """

    logits: At = "model"
    score: At = "fp32"
    weight: At = "fp32"
    score_after_selection: bool = False
    scale_on: ScaleOn = "weights"
    rows: At = "model"
    activation: At = "model"
    weight_at: WeightAt = "down"
    merge: At = "model"

    def __post_init__(self) -> None:
        faults = []
        for name in ("logits", "score", "weight", "rows", "activation", "merge"):
            faults += one_of_faults(name, getattr(self, name), At)
        faults += one_of_faults("scale_on", self.scale_on, ScaleOn)
        faults += one_of_faults("weight_at", self.weight_at, WeightAt)
        raise_faults("ReleasedNumerics", faults)
