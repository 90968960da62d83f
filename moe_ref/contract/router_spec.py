"""The mathematics of routing: from logits to expert ids and weights.

What no option is needed for, because the numbers are the same either way:
- softmax over the selected experts only (gpt-oss, Granite): exp(l_i) / sum_S exp(l_j) is softmax over all
  experts followed by renormalisation, so `Router(score="softmax", renormalize=True)`;
- sigmoid before or after the selection: it is monotone. Without selection bias and groups the selection is made
  on the logits, so that scores which saturate (sigmoid(40) and sigmoid(50) are both 1 in fp64) do not tie;
- a factor on the weights or on the routed sum: `scaling_factor`.
Noise on logits or tokens (jitter) is off by contract: it belongs to training and has no expected result.
"""

import math
from dataclasses import dataclass
from typing import Literal

from moe_ref.contract.errors import (
    flag_faults,
    is_number,
    kind_faults,
    number_faults,
    one_of_faults,
    positive_faults,
    raise_faults,
    shown,
    size_faults,
)

Score = Literal["softmax", "sigmoid", "sqrt_softplus"]
SelectionBias = Literal["score", "logit"]
GroupScore = Literal["max", "top2_sum"]
GroupFill = Literal["minus_inf", "zero"]
EpsilonRule = Literal["add", "clamp"]
LearnedScale = Literal["layer", "expert"]
Priority = Literal["token", "choice", "weight"]


def store_floats(spec: object, *names: str) -> None:
    """Make checked numbers of a frozen `spec` plain floats, so that equal specs print alike; -0.0 becomes 0.0."""
    for name in names:
        if (value := getattr(spec, name)) is not None:
            object.__setattr__(spec, name, float(value) + 0.0)


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """How many tokens an expert takes; what exceeds it is dropped: id -1, weight 0.

    tokens or factor:   the limit itself, or ceil(factor * tokens * top_k / num_experts) in double precision, as
                        released code computes it; exactly one is given
    priority:           who stays. "token": lower tokens first (Switch); "choice": all first choices, then all
                        second ones, lower tokens first (GShard, NLLB); "weight": larger scores first, after any
                        renormalisation and before any scale, ties to the lower token (Megatron-LM's "probs")
    sequence_length:    the limit holds in every run of so many consecutive tokens; None: in the whole batch
    renormalize_after:  weights are renormalised over what is left, not over what was selected
    """

    tokens: int | None = None
    factor: float | None = None
    priority: Priority = "token"
    sequence_length: int | None = None
    renormalize_after: bool = False

    def __post_init__(self) -> None:
        faults = one_of_faults("priority", self.priority, Priority)
        faults += flag_faults(renormalize_after=self.renormalize_after)
        if (self.tokens is None) == (self.factor is None):
            faults.append(f"tokens={shown(self.tokens)}, factor={shown(self.factor)}, but exactly one of them "
                          "should be given")
        given = {"tokens": self.tokens, "sequence_length": self.sequence_length}
        faults += positive_faults(**{name: value for name, value in given.items() if value is not None})
        if self.factor is not None:
            faults += number_faults("factor", self.factor, above=0.0)
        raise_faults("Capacity", faults)
        store_floats(self, "factor")

    def limit(self, num_tokens: int, top_k: int, num_experts: int) -> int:
        """Tokens that one expert takes out of `num_tokens`; by a factor at most their num_tokens * top_k slots."""
        if self.tokens is not None:
            return self.tokens
        assert self.factor is not None
        # The product may be infinite, which has no integer above it: then nothing is dropped.
        return math.ceil(min(self.factor * num_tokens * top_k / num_experts, num_tokens * top_k))


@dataclass(frozen=True, kw_only=True)
class Router:
    """From logits to expert ids and weights; ties go to the lower expert id.

    score:                softmax over all experts, sigmoid, or sqrt(softplus) of each logit
    logit_bias:           a learned bias is part of the logits (gpt-oss)
    logit_scale           logits are multiplied by the scale, then become softcap * tanh(logits / softcap);
    logit_softcap         0 is no cap
    selection_bias:       a per-expert bias for SELECTION only, added to the "score" (DeepSeek-V3) or the "logit"
    num_groups:           experts form equal consecutive groups; only the best
    num_groups_kept       groups by group_score (largest member, or sum of the two largest) compete; the others
    group_score           get group_fill: "minus_inf" (never chosen) or "zero" (chosen before a negative score)
    group_fill
    renormalize:          weights / (sum of selected weights + renormalize_epsilon), or with epsilon_rule "clamp"
    renormalize_epsilon   weights / max(sum, epsilon)
    epsilon_rule
    scaling_factor:       multiplies the weights, after renormalisation
    learned_scale:        weight_scale_E multiplies them too: one number for the "layer" or one per "expert"
    num_zero_experts:     ids E to E + Z - 1 are identity experts: they return the token (LongCat)
    capacity:             limit of tokens per expert; None: nothing is dropped
    """

    num_experts: int
    top_k: int
    score: Score = "softmax"
    logit_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    selection_bias: SelectionBias | None = None
    num_groups: int = 1
    num_groups_kept: int = 1
    group_score: GroupScore = "max"
    group_fill: GroupFill = "minus_inf"
    renormalize: bool = False
    renormalize_epsilon: float = 0.0
    epsilon_rule: EpsilonRule = "add"
    scaling_factor: float = 1.0
    learned_scale: LearnedScale | None = None
    num_zero_experts: int = 0
    capacity: Capacity | None = None

    @property
    def num_choices(self) -> int:
        """Columns of the logits: experts and identity experts, E + Z."""
        return self.num_experts + self.num_zero_experts

    def __post_init__(self) -> None:
        kinds, numbers = self._kind_faults(), self._number_faults()
        raise_faults("Router", kinds + numbers + ([] if kinds else self._combination_faults()))
        store_floats(self, "logit_scale", "logit_softcap", "renormalize_epsilon", "scaling_factor")

    def _kind_faults(self) -> list[str]:
        faults = positive_faults(num_experts=self.num_experts, top_k=self.top_k,
                                 num_groups=self.num_groups, num_groups_kept=self.num_groups_kept)
        faults += size_faults(0, num_zero_experts=self.num_zero_experts)
        faults += flag_faults(logit_bias=self.logit_bias, renormalize=self.renormalize)
        faults += kind_faults("capacity", self.capacity, Capacity | None, "a Capacity or None")
        for name, choices in (("score", Score), ("group_score", GroupScore), ("group_fill", GroupFill),
                              ("epsilon_rule", EpsilonRule)):
            faults += one_of_faults(name, getattr(self, name), choices)
        for name, choices in (("selection_bias", SelectionBias), ("learned_scale", LearnedScale)):
            if getattr(self, name) is not None:
                faults += one_of_faults(name, getattr(self, name), choices, "None")
        return faults

    def _number_faults(self) -> list[str]:
        return (number_faults("renormalize_epsilon", self.renormalize_epsilon, least=0.0)
                + number_faults("scaling_factor", self.scaling_factor, above=0.0)
                + number_faults("logit_scale", self.logit_scale, above=0.0)
                + number_faults("logit_softcap", self.logit_softcap, least=0.0))

    def _combination_faults(self) -> list[str]:
        faults, choices = self._group_faults(), self.num_choices
        if self.top_k > choices:
            faults.append(f"top_k={self.top_k}, but should be at most num_experts={choices}")
        # What is no number is reported as such, and may have no truth value (an array).
        has_epsilon = not is_number(self.renormalize_epsilon) or self.renormalize_epsilon != 0
        if self.epsilon_rule == "clamp" and not (self.renormalize and has_epsilon):
            faults.append("epsilon_rule='clamp', but there is no renormalize_epsilon to clamp at")
        if self.learned_scale == "expert" and self.num_zero_experts:
            faults.append("learned_scale='expert' is not defined for zero experts")
        if self.selection_bias == "logit" and self.num_groups > 1:
            faults.append("selection_bias='logit' and expert groups are not defined together")
        if self.capacity and self.capacity.renormalize_after and not self.renormalize:
            faults.append("capacity.renormalize_after=True, but renormalize is False")
        return faults

    def _group_faults(self) -> list[str]:
        faults = []
        if self.num_groups > 1 and self.num_zero_experts:
            faults.append(f"num_groups={self.num_groups}, but zero experts have no group")
        if self.num_experts % self.num_groups:
            faults.append(f"num_groups={self.num_groups}, but should divide num_experts={self.num_experts}")
        size = self.num_experts // self.num_groups
        if self.num_groups_kept > self.num_groups:
            faults.append(f"num_groups_kept={self.num_groups_kept}, but should be at most num_groups={self.num_groups}")
        elif self.num_groups > 1 and self.group_fill == "minus_inf" and self.num_groups_kept * size < self.top_k:
            faults.append(f"top_k={self.top_k}, but the {self.num_groups_kept} groups kept hold only "
                          f"{self.num_groups_kept * size} experts")
        if self.group_score == "top2_sum" and self.num_groups > 1 and size < 2:
            faults.append("group_score='top2_sum', but groups hold a single expert")
        return faults
