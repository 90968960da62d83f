"""Everything that is compared of one family, with its verdict."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from moe_ref.contract.weights import MoEWeights
from tests.third_party.blocks import Run, build, replaceable, run, weights_of
from tests.third_party.compare import Forward, Rounded, compare_forward, compare_rounded
from tests.third_party.data import tokens
from tests.third_party.families import FAMILIES
from tests.third_party.family import Experts, Family
from tests.third_party.gradients import Gradients, compare_gradients


@dataclass(frozen=True)
class Result:
    """The three comparisons of a family."""

    family: Family
    forward: Forward
    rounded: Rounded
    gradients: Gradients

    def refusals(self) -> list[str]:
        """What is outside its bound, with both numbers; empty if all is well."""
        found = []
        for what, ratio in (("fp32 weights", self.forward.weights), ("fp32 experts", self.forward.experts),
                            ("bf16 experts", self.rounded.experts)):
            if ratio is not None and not ratio <= 1:
                found.append(f"{what}: error / bound {ratio:.2g}, but should be at most 1")
        for what, choice in (("fp64", self.forward.choice), ("rounded scores", self.rounded.choice)):
            if choice is not None and choice.unexplained:
                found.append(f"tokens {choice.unexplained}: other experts than by {what}, without a tie")
        if not self.gradients.worst <= self.gradients.allowed:
            found.append(f"gradient of {self.gradients.name}: off by {self.gradients.worst:.2g} of its largest "
                         f"element, but should be by at most {self.gradients.allowed:.2g}")
        return found


@cache
def ran(title: str, dtype: torch.dtype,
        experts: Experts = "eager") -> tuple[nn.Module, MoEWeights, torch.Tensor, Run]:
    """Block, its weights as ours, tokens (T, H) and one call; built once."""
    family = FAMILIES[title]
    x_BSH = tokens().to(dtype)
    with torch.no_grad():
        block = build(family, dtype, experts)
        return block, weights_of(block, family), x_BSH.flatten(0, 1), run(block, family, x_BSH)


@cache
def evaluate(title: str, experts: Experts = "eager") -> Result:
    """All comparisons of one family with eager experts, or with the default ones of transformers, grouped_mm."""
    block, weights, x_TH, called = ran(title, torch.float32, experts)
    family = FAMILIES[title].as_run(experts, replaceable(block))
    forward = compare_forward(x_TH, called, weights, family)
    gradients = compare_gradients(block, family, tokens())
    _, weights, x_TH, called = ran(title, torch.bfloat16, experts)
    return Result(family, forward, compare_rounded(x_TH, called, weights, family), gradients)
