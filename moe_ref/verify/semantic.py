"""Check B: does a subject differ from simulated siblings of its declared contract as they differ from each other?

It attributes and reports; it never decides. One flipped rounding touches a whole row of what follows, so the shares
have heavy tails, and a right layer may exceed the siblings' by a large factor.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch

from moe_ref.contract.capabilities import Numerics
from moe_ref.contract.case import Case
from moe_ref.contract.routing import Routing
from moe_ref.contract.vocabulary import Format, Stage
from moe_ref.inputs.build import Inputs
from moe_ref.numerics.summation import Order, matmul
from moe_ref.simulated.layer import SimulatedLayer
from moe_ref.simulated.reduction import Reduction
from moe_ref.verify.measure.placing import RankTensors

SIBLINGS: tuple[tuple[Order, Reduction], ...] = (("sequential", "rank_order"), ("pairwise", "ring"))

LARGEST_CASE = 2**26
"""Products of one projection of a case that siblings are made for after a mismatch."""

COMPARED = (Stage.GATE_UP, Stage.ACT, Stage.DOWN, Stage.MERGED, Stage.REDUCED)


@dataclass(frozen=True)
class SemanticStage:
    """One stage of all ranks: shares of elements that differ, and mean squares of the differences.

    subject_share: of the subject from the siblings, on average; sibling_share: of these from each other. ratio: the
    same quotient of mean squares, over finite elements; infinite where siblings agree and the subject does not, 1 where
    nobody differs.
    """

    stage: Stage
    subject_share: float
    sibling_share: float
    ratio: float


@dataclass(frozen=True)
class Semantic:
    """The stages that the subject shows and siblings have; of what is not simulated none, and the reason in words."""

    stages: tuple[SemanticStage, ...]
    reason: str = ""


def small_enough(case: Case) -> bool:
    """Whether siblings, whose additions are rounded one by one, take seconds and not minutes."""
    spec = case.problem.spec
    return case.problem.num_tokens * spec.top_k * spec.hidden_size * spec.intermediate_size <= LARGEST_CASE


def semantic(case: Case, inputs: Inputs, ranks: list[RankTensors], numerics: Numerics) -> Semantic:
    """Compare what every rank showed, of the right shapes, with two layers of the same contract in different orders.

    Siblings take the subject's ids and weights where both are shown, so that another choice of experts is no
    difference; otherwise a flipped choice counts.
    """
    if numerics.accumulate not in (Format.FP32, Format.FP16, Format.BF16):
        return Semantic((), f"accumulation in {numerics.accumulate} is not simulated")
    layers = [SimulatedLayer(numerics, partial(matmul, order=order, fmt=numerics.accumulate), reduction)
              for order, reduction in SIBLINGS]
    if refused := layers[0].refusal(case):
        return Semantic((), refused)
    routing = None
    if {Stage.IDS, Stage.WEIGHTS} <= ranks[0].keys():
        routing = Routing(ranks[0][Stage.IDS].long(), ranks[0][Stage.WEIGHTS])
    first, second = (layer.run(case, inputs, routing) for layer in layers)
    stages = [stage for stage in COMPARED if stage in ranks[0] and (routing is not None or stage is Stage.REDUCED)]
    return Semantic(tuple(_compared(stage, *(_joined(one, stage) for one in (ranks, first, second)))
                          for stage in stages))


def _joined(ranks: list[RankTensors], stage: Stage) -> torch.Tensor:
    return torch.cat([tensors[stage].double().flatten() for tensors in ranks])


def _compared(stage: Stage, subject: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> SemanticStage:
    pairs = [_difference(subject, first), _difference(subject, second)]
    share, square = ((one + other) / 2 for one, other in zip(*pairs, strict=True))
    sibling_share, sibling_square = _difference(first, second)
    ratio = square / sibling_square if sibling_square else math.inf if square else 1.0
    return SemanticStage(stage, share, sibling_share, ratio)


def _difference(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Share of elements that differ, a NaN from a NaN does not, and the mean square over those finite in both."""
    if not one.numel():
        return 0.0, 0.0
    differs = (one != other) & ~(one.isnan() & other.isnan())
    finite = one.isfinite() & other.isfinite()
    square = (one - other)[finite].square().sum() / max(1, int(finite.sum()))
    return float(differs.double().mean()), float(square)
