"""Which declared rounding points the block itself confirms: every other choice reproduces fewer of its bits."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import torch

from moe_ref.contract.released import At, ScaleOn
from moe_ref.contract.weights import MoEWeights
from moe_ref.oracle.released import moe_as_released, route_as_released
from tests.third_party.blocks import Run
from tests.third_party.compare import equal_weights
from tests.third_party.family import Family

ROUTING: dict[str, Any] = {"logits": At, "score": At, "weight": At}
EXPERTS: dict[str, Any] = {"scale_on": ScaleOn, "rows": At, "activation": At, "merge": At}


class Agreement(NamedTuple):
    """Share of the block's weights with equal bits, on tokens with the same experts, and of its output's elements.

    1 where there is nothing to compare.
    """

    weights: float
    output: float


@torch.no_grad()
def agreement(x_TH: torch.Tensor, run: Run, weights: MoEWeights, family: Family) -> Agreement:
    """Of the block with the mimic under the family's rounding points."""
    return Agreement(_weights(x_TH, run, weights, family), _output(x_TH, run, weights, family))


@torch.no_grad()
def alternatives(x_TH: torch.Tensor, run: Run, weights: MoEWeights,
                 family: Family) -> Iterator[tuple[str, Agreement]]:
    """Field by field, the agreement with that field's other value; what the field has no part in is left at 1."""
    for field, choices in (ROUTING | EXPERTS).items():
        for choice in get_args(choices):
            if choice != getattr(family.released, field):
                other = replace(family, released=replace(family.released, **{field: choice}))
                yield field, (Agreement(_weights(x_TH, run, weights, other), 1.0) if field in ROUTING
                              else Agreement(1.0, _output(x_TH, run, weights, other)))


def declared_is_best(field: str, declared: Agreement, other: Agreement) -> bool:
    """Whether the other value of `field` agrees no better."""
    return other.weights <= declared.weights if field in ROUTING else other.output <= declared.output


def is_visible(field: str, declared: Agreement, other: Agreement) -> bool:
    """Whether the other value of `field` agrees worse."""
    return other.weights < declared.weights if field in ROUTING else other.output < declared.output


def _weights(x_TH: torch.Tensor, run: Run, weights: MoEWeights, family: Family) -> float:
    if family.fit == "routing":
        return 1.0
    mimic = route_as_released(x_TH, weights, family.spec, family.released, logits_TE=run.logits_TE)
    return equal_weights(mimic, run.routing, family.spec)


def _output(x_TH: torch.Tensor, run: Run, weights: MoEWeights, family: Family) -> float:
    if family.fit == "router":
        return 1.0
    mimic_TH = moe_as_released(x_TH, weights, family.spec, family.released, routing=run.routing)
    return float((run.output_TH == mimic_TH).double().mean())

