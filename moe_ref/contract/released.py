"""In which dtype released code computes each step: rounding points, which are no part of the mathematics."""

from dataclasses import dataclass
from typing import Literal

from moe_ref.contract.errors import one_of_faults, raise_faults
from moe_ref.contract.router_spec import Router

At = Literal["model", "fp32"]
ScaleOn = Literal["weights", "output"]
WeightAt = Literal["down", "act"]


@dataclass(frozen=True, kw_only=True)
class ReleasedNumerics:
    """Rounding points of a family's published implementation; "model" is the dtype of tokens and weights.

    logits:       x @ router^T; fp32: tokens and router are converted first
    score:        softmax, sigmoid, and the renormalisation of weights; every step is rounded
    weight:       the routing weights as the experts receive them
    score_after_selection: scores are computed from the selected logits only; not defined for every router, see
                  check_released
    scale_on:     scaling_factor multiplies the "weights", or the "output" of the routed experts; the weights of
                  shared experts that the router gates have it in both cases
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


def check_released(released: ReleasedNumerics, router: Router | None, weight_on: str = "output") -> None:
    """Raise UsageValueError where these rounding points would be other mathematics than the layer's.

    A step that is done elsewhere must give the same number in exact arithmetic. Scores of the selected logits
    alone do where the selection goes by logits; softmax, exp(l_i) / sum_S exp(l_j), only where weights are
    renormalised, since it has no epsilon and does not know what is dropped.
    """
    if router is None:
        return
    faults = []
    if released.scale_on == "output" and router.scaling_factor != 1.0 and weight_on == "input":
        faults.append(f"scale_on='output', but with weight_on='input' the scaling_factor={router.scaling_factor} "
                      "should multiply the weights: experts are not linear")
    if released.score_after_selection:
        faults += [f"score_after_selection=True, but {fault}" for fault in _score_after_faults(router)]
    raise_faults("ReleasedNumerics", faults)


def _score_after_faults(router: Router) -> list[str]:
    faults = []
    if router.selection_bias == "score":
        faults.append("selection_bias='score' is added to the scores that decide the selection; should be 'logit'")
    if router.num_groups > 1:
        faults.append(f"num_groups={router.num_groups}, and groups compete by scores; should be 1")
    if router.score == "softmax":
        if not router.renormalize:
            faults.append("renormalize=False: softmax of the selected logits sums to 1; should be True")
        if router.renormalize_epsilon:
            faults.append(f"renormalize_epsilon={router.renormalize_epsilon}: softmax divides by its sum alone; "
                          "should be 0")
        if router.capacity is not None and router.capacity.renormalize_after:
            faults.append("capacity.renormalize_after=True: softmax divides by the sum over what was selected; "
                          "should be False")
    return faults
