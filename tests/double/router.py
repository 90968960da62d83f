"""Routing one token at a time with Python's own sort, sum and exponential."""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moe_ref.contract.spec import Router


@dataclass(frozen=True)
class Choice:
    """One token's routing: expert ids, their weights, and how close any decision was.

    margin: the smallest gap between two selection scores (or group scores) whose order decided something;
    0.0 for an exact tie, inf when nothing had to be decided.
    """

    ids: list[int]
    weights: list[float]
    margin: float


def dot(left: np.ndarray, right: np.ndarray) -> float:
    """Sum of products, each product rounded once, the sum exact until its last rounding."""
    return math.fsum(float(a) * float(b) for a, b in zip(left, right, strict=True))


def sigmoid(value: float) -> float:
    """1 / (1 + e^-v), without overflow for large negative v."""
    if value >= 0:
        return 1.0 / (1.0 + math.exp(-value))
    return math.exp(value) / (1.0 + math.exp(value))


def scores(logits: list[float], router: Router) -> list[float]:
    """Score of every expert for one token."""
    if router.score == "sigmoid":
        return [sigmoid(logit) for logit in logits]
    exponentials = [math.exp(logit - max(logits)) for logit in logits]
    return [value / math.fsum(exponentials) for value in exponentials]


def ranked(values: dict[int, float]) -> list[int]:
    """Keys by falling value, equal values by rising key."""
    return sorted(values, key=lambda key: (-values[key], key))


def gap(values: dict[int, float], count: int) -> float:
    """The smallest difference between neighbours among the first `count` + 1 of the ranking."""
    top = [values[key] for key in ranked(values)[:count + 1]]
    return min((a - b for a, b in pairwise(top)), default=math.inf)


def choose(logits: list[float], bias: list[float] | None, router: Router) -> Choice:
    """Route one token."""
    score = scores(logits, router)
    contest = {e: score[e] + (bias[e] if bias else 0.0) for e in range(router.num_experts)}
    margin = math.inf
    if router.num_groups > 1:
        groups = _groups(contest, router)
        kept = ranked(groups)[:router.num_groups_kept]
        if router.num_groups_kept < router.num_groups:
            order = ranked(groups)
            margin = groups[kept[-1]] - groups[order[router.num_groups_kept]]
        size = router.num_experts // router.num_groups
        contest = {e: value for e, value in contest.items() if e // size in kept}
    ids = ranked(contest)[:router.top_k]
    weights = [score[e] for e in ids]
    if router.renormalize:
        total = math.fsum(weights) + router.renormalize_epsilon
        weights = [weight / total for weight in weights]
    weights = [weight * router.scaling_factor for weight in weights]
    return Choice(ids, weights, min(margin, gap(contest, router.top_k)))


def _groups(contest: dict[int, float], router: Router) -> dict[int, float]:
    """Score of every group: its best member, or the sum of its two best."""
    size = router.num_experts // router.num_groups
    best = {g: sorted((contest[e] for e in range(g * size, (g + 1) * size)), reverse=True)
            for g in range(router.num_groups)}
    counted = 1 if router.group_score == "max" else 2
    return {g: math.fsum(values[:counted]) for g, values in best.items()}
