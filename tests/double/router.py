"""Routing one token at a time with Python's own sort, sum and exponential."""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from moe_ref.contract.spec import Router

Slot = tuple[int, int]


@dataclass(frozen=True)
class Choice:
    """One token's routing.

    selected: the experts it wants, best first; ids: the same after experts refused it (-1); weights: 0 where it
    was refused; shared: one weight per gate of the shared expert.
    """

    selected: list[int]
    ids: list[int]
    weights: list[float]
    shared: list[float]


def dot(left: np.ndarray, right: np.ndarray) -> float:
    """Sum of products, each product rounded once, the sum exact until its last rounding."""
    return math.fsum(float(a) * float(b) for a, b in zip(left, right, strict=True))


def sigmoid(value: float) -> float:
    """1 / (1 + e^-v), without overflow for large negative v."""
    if value >= 0:
        return 1.0 / (1.0 + math.exp(-value))
    return math.exp(value) / (1.0 + math.exp(value))


def softcap(value: float, cap: float) -> float:
    """cap * tanh(v / cap), no cap at 0."""
    return cap * math.tanh(value / cap) if cap else value


def scores(logits: list[float], router: Router) -> list[float]:
    """Score of every column for one token, from logits that are scaled and capped already."""
    if router.score == "sigmoid":
        return [sigmoid(logit) for logit in logits]
    if router.score == "sqrt_softplus":
        return [math.sqrt(max(logit, 0.0) + math.log1p(math.exp(-abs(logit)))) for logit in logits]
    exponentials = [math.exp(logit - max(logits)) for logit in logits]
    return [value / math.fsum(exponentials) for value in exponentials]


def ranked(values: dict[int, float]) -> list[int]:
    """Keys by falling value, equal values by rising key."""
    return sorted(values, key=lambda key: (-values[key], key))


def select(logits: list[float], score: list[float], bias: list[float] | None, router: Router) -> list[int]:
    """The ids one token wants, best first."""
    base = logits if router.selection_bias == "logit" else score
    contest = {e: value + (bias[e] if bias else 0.0) for e, value in enumerate(base)}
    if router.num_groups > 1:
        kept = ranked(_groups(contest, router))[:router.num_groups_kept]
        size = router.num_experts // router.num_groups
        fill = 0.0 if router.group_fill == "zero" else -math.inf
        contest = {e: value if e // size in kept else fill for e, value in contest.items()}
    return ranked(contest)[:router.top_k]


def _groups(contest: dict[int, float], router: Router) -> dict[int, float]:
    """Score of every group: its best member, or the sum of its two best."""
    size = router.num_experts // router.num_groups
    best = {g: sorted((contest[e] for e in range(g * size, (g + 1) * size)), reverse=True)
            for g in range(router.num_groups)}
    counted = 1 if router.group_score == "max" else 2
    return {g: math.fsum(values[:counted]) for g, values in best.items()}


def divisor(routed: list[float], shared: list[float], router: Router) -> float:
    """What one token's scores are divided by."""
    if not router.renormalize:
        return 1.0
    total = math.fsum(routed + shared)
    if router.epsilon_rule == "clamp":
        return max(total, router.renormalize_epsilon)
    return total + router.renormalize_epsilon


def admitted(selected: list[list[int]], ranks: list[list[float]], router: Router) -> set[Slot]:
    """The (token, slot) pairs that find a place: all of them knock in order of priority, and doors close.

    ranks: what "weight" goes by. Identity experts take everybody.
    """
    knocking = [(t, slot) for t, wanted in enumerate(selected) for slot in range(len(wanted))]
    capacity = router.capacity
    if capacity is None:
        return set(knocking)
    order = {"token": lambda pair: pair, "choice": lambda pair: (pair[1], pair[0]),
             "weight": lambda pair: (-ranks[pair[0]][pair[1]], pair[0])}[capacity.priority]
    length = capacity.sequence_length or max(1, len(selected))
    places: Counter[tuple[int, int]] = Counter()
    found = set()
    for t, slot in sorted(knocking, key=order):
        e, sequence = selected[t][slot], t // length
        tokens = min(length, len(selected) - sequence * length)
        limit = capacity.limit(tokens, router.top_k, router.num_experts)
        if e < router.num_experts and places[sequence, e] >= limit:
            continue
        places[sequence, e] += 1
        found.add((t, slot))
    return found


def choose(logits_TE: list[list[float]], shared_TS: list[list[float]], bias: list[float] | None,
           scale: list[float] | None, router: Router) -> list[Choice]:
    """Route a batch; shared_TS are logits of the router's further columns, an empty list each without them."""
    capped = [[softcap(logit * router.logit_scale, router.logit_softcap) for logit in row] for row in logits_TE]
    score = [scores(row, router) for row in capped]
    shared = [scores([softcap(logit * router.logit_scale, router.logit_softcap) for logit in row], router)
              if row else [] for row in shared_TS]
    selected = [select(row, scored, bias, router) for row, scored in zip(capped, score, strict=True)]
    routed = [[row[e] for e in wanted] for row, wanted in zip(score, selected, strict=True)]
    after = router.capacity is not None and router.capacity.renormalize_after
    ranks = [row if after else [value / divisor(row, further, router) for value in row]
             for row, further in zip(routed, shared, strict=True)]
    places = admitted(selected, ranks, router)
    choices = []
    for t, wanted in enumerate(selected):
        stays = [(t, slot) in places for slot in range(len(wanted))]
        counted = [value for value, stay in zip(routed[t], stays, strict=True) if stay or not after]
        # Nothing to divide by where every slot was refused and no shared column has a part in the sum.
        total = divisor(counted, shared[t], router) if counted or shared[t] else 1.0
        choices.append(_choice(wanted, stays, routed[t], shared[t], total, scale, router))
    return choices


def _choice(wanted: list[int], stays: list[bool], routed: list[float], shared: list[float], total: float,
            scale: list[float] | None, router: Router) -> Choice:
    """Divide, then multiply by the factor and the learned scale."""
    ids = [e if stay else -1 for e, stay in zip(wanted, stays, strict=True)]
    weights = [value / total * router.scaling_factor if stay else 0.0
               for value, stay in zip(routed, stays, strict=True)]
    shared = [value / total * router.scaling_factor for value in shared]
    if router.learned_scale == "layer":
        weights, shared = [value * scale[0] for value in weights], [value * scale[0] for value in shared]
    if router.learned_scale == "expert":
        weights = [value * scale[e] if e >= 0 else 0.0 for value, e in zip(weights, ids, strict=True)]
    return Choice(wanted, ids, weights, shared)
