"""How far two correct evaluations of a routing may lie apart, and where they may choose differently."""

from dataclasses import dataclass

import numpy as np

from moe_ref.contract.spec import MoESpec, Router
from tests.double.layer import Arrays
from tests.double.rounded import FUNCTION, UNIT_ROUNDOFF, Rounded, contraction, exact, gamma, relative
from tests.double.router import Choice

SIGMOID = 2 * FUNCTION + 4
"""Operations of 1 / (1 + e^-v) or e^v / (1 + e^v): two functions, an addition, a division, and two to spare. Of
sqrt(log1p(e^v)) or sqrt(max(v, 0) + log1p(e^-|v|)) too: log1p's relative condition number is at most 1."""


@dataclass(frozen=True)
class Competition:
    """score_TE, and selection_TE before groups are masked; shared_TS: scores or sigmoids of further gates."""

    score_TE: Rounded
    selection_TE: Rounded
    shared_TS: Rounded | None


def compete(x_TH: np.ndarray, arrays: Arrays, spec: MoESpec, logits_TE: np.ndarray | None = None) -> Competition:
    """What experts compete with; a logit is a sum of H products and a bias, an injected one is exact."""
    router, shared_TS = spec.router, None
    if logits_TE is None:
        logits = contraction("th,eh->te", exact(x_TH), arrays["router_EH"], spec.hidden_size)
        logits = logits + arrays["router_bias_E"] if router.logit_bias else logits
    else:
        logits = exact(logits_TE)
    capped = _capped(logits, router)
    score_TE = _score(capped, router)
    if spec.shared is not None and spec.shared.gate == "router":
        shared_TS = _score(_capped(_gate_logits(x_TH, arrays), router), router)
    base_TE = capped if router.selection_bias == "logit" else score_TE
    selection_TE = base_TE + arrays["selection_bias_E"] if router.selection_bias else base_TE
    return Competition(score_TE, selection_TE, shared_TS)


def sigmoid_gates(x_TH: np.ndarray, arrays: Arrays) -> Rounded:
    """sigmoid(x @ shared_gate^T), (T, 1)."""
    return sigmoid(_gate_logits(x_TH, arrays))


def _gate_logits(x_TH: np.ndarray, arrays: Arrays) -> Rounded:
    return contraction("th,sh->ts", exact(x_TH), arrays["shared_gate_SH"], x_TH.shape[1])


def sigmoid(logits: Rounded) -> Rounded:
    """The slope of its logarithm is at most 1."""
    return logits.growing(lambda value: 1.0 / (1.0 + np.exp(-value)), SIGMOID)


def _capped(logits: Rounded, router: Router) -> Rounded:
    logits, cap = logits * router.logit_scale, router.logit_softcap
    return (logits / cap).function(np.tanh, 1.0) * cap if cap else logits


def _score(logits: Rounded, router: Router) -> Rounded:
    """The logarithms of sigmoid and of sqrt(softplus) have no slope above 1.

    softmax: every exponent moves by its logit's error, and subtracting the maximum rounds a number of at most
    twice the largest logit; numerator and denominator may move apart. Then exp, a sum of N, a division.
    """
    if router.score == "sigmoid":
        return sigmoid(logits)
    if router.score == "sqrt_softplus":
        return logits.growing(lambda value: np.sqrt(np.logaddexp(0.0, value)), SIGMOID)
    largest = logits.size.max(1, keepdims=True, initial=0.0)
    moved = logits.error.max(1, keepdims=True, initial=0.0) + gamma(2) * largest
    exponentials = np.exp(logits.value - logits.value.max(1, keepdims=True, initial=-np.inf))
    rounding = gamma(2 * FUNCTION + logits.value.shape[1] + 2)
    return relative(exponentials / exponentials.sum(1, keepdims=True),
                    np.expm1(2.0 * moved) + np.exp(2.0 * moved) * rounding)


def could_differ(choices: list[Choice], competition: Competition, router: Router) -> np.ndarray:
    """Tokens (T,) for which two correct evaluations may choose differently.

    A decision compares two numbers, and an evaluation may have both wrong: it may go either way if the exact ones
    are 2 errors apart, those at hand 4. One slot more or less at an expert of limited capacity may push out any
    other token.
    """
    close_T = _close_selection(competition.selection_TE, router)
    if router.capacity is not None and (close_T.any() or _close_capacity(choices, competition, router)):
        return np.ones_like(close_T)
    return close_T


def _close_selection(selection_TE: Rounded, router: Router) -> np.ndarray:
    """Among groups at the border of those kept, then between neighbours of the first K + 1 of the ranking."""
    error_T = selection_TE.error.max(1, initial=0.0)
    contest_TE, masked_TE = selection_TE.value, np.zeros(selection_TE.value.shape, dtype=bool)
    close_T = np.zeros(len(contest_TE), dtype=bool)
    if router.num_groups > 1:
        counted = 1 if router.group_score == "max" else 2
        group_size = router.num_experts // router.num_groups
        member_TGE = contest_TE.reshape(len(contest_TE), router.num_groups, group_size)
        group_TG = np.sort(member_TGE, axis=2)[:, :, -counted:].sum(2)
        # The sum of the two largest of wrong numbers is off by two errors, and rounded.
        group_error_T = counted * (error_T + UNIT_ROUNDOFF * selection_TE.size.max(1, initial=0.0))
        order_TG = np.argsort(-group_TG, axis=1, kind="stable")
        falling_TG = np.take_along_axis(group_TG, order_TG, 1)
        kept = router.num_groups_kept
        if kept < router.num_groups:
            close_T |= falling_TG[:, kept - 1] - falling_TG[:, kept] <= 4.0 * group_error_T
        place_TG = np.argsort(order_TG, axis=1)
        masked_TE = np.repeat(place_TG >= kept, group_size, axis=1)
        contest_TE = np.where(masked_TE, 0.0 if router.group_fill == "zero" else -np.inf, contest_TE)
    order_TE = np.argsort(-contest_TE, axis=1, kind="stable")[:, :router.top_k + 1]
    gap_TE = -np.diff(np.take_along_axis(contest_TE, order_TE, 1), axis=1)
    # Two masked experts tie exactly, in every evaluation.
    masked_TE = np.take_along_axis(masked_TE, order_TE, 1)
    doubt_TE = (gap_TE <= 4.0 * error_T[:, None]) & ~(masked_TE[:, 1:] & masked_TE[:, :-1])
    return close_T | doubt_TE.any(1)


def _close_capacity(choices: list[Choice], competition: Competition, router: Router) -> bool:
    """Whether an admitted slot and a refused one of the same expert and window were closer than both errors.

    Priority by token or by choice compares integers only.
    """
    if router.capacity.priority != "weight":
        return False
    selected_TK, kept_TK = _slots(choices, router)
    ranks_TK = _gather(competition.score_TE, selected_TK)
    if not router.capacity.renormalize_after:
        ranks_TK = ranks_TK / _divisor(ranks_TK, competition.shared_TS, router)
    length = router.capacity.sequence_length or max(1, len(choices))
    window_T1 = np.arange(len(choices))[:, None] // length
    place_TK = window_T1 * router.num_choices + selected_TK
    for place in np.unique(place_TK):
        inside, outside = ranks_TK[(place_TK == place) & kept_TK], ranks_TK[(place_TK == place) & ~kept_TK]
        gap = inside.value[:, None] - outside.value
        if (gap <= 2.0 * (inside.error[:, None] + outside.error)).any():
            return True
    return False


def _slots(choices: list[Choice], router: Router) -> tuple[np.ndarray, np.ndarray]:
    """Ids as selected and which of them were kept, both (T, K)."""
    selected_TK = np.array([choice.selected for choice in choices], dtype=int).reshape(-1, router.top_k)
    return selected_TK, np.array([choice.ids for choice in choices]).reshape(-1, router.top_k) >= 0


def _gather(score_TE: Rounded, ids_TK: np.ndarray) -> Rounded:
    return Rounded(np.take_along_axis(score_TE.value, ids_TK, 1), np.take_along_axis(score_TE.error, ids_TK, 1))


def _divisor(routed_TK: Rounded, shared_TS: Rounded | None, router: Router) -> Rounded:
    """A sum of K + S scores, the epsilon added or clamped at."""
    if not router.renormalize:
        return exact(np.ones_like(routed_TK.value[:, :1]))
    if shared_TS is not None:
        routed_TK = Rounded(np.hstack([routed_TK.value, shared_TS.value]),
                            np.hstack([routed_TK.error, shared_TS.error]))
    total_T1 = routed_TK.total(1)
    if router.epsilon_rule == "clamp":
        return total_T1.clamp(router.renormalize_epsilon, np.inf)
    return total_T1 + router.renormalize_epsilon


def weights_bound(choices: list[Choice], competition: Competition, arrays: Arrays,
                  router: Router) -> tuple[Rounded, Rounded | None]:
    """Routing weights (T, K) and the weights of router-gated shared experts (T, S), for the choices made."""
    selected_TK, kept_TK = _slots(choices, router)
    score_TK, shared_TS = _gather(competition.score_TE, selected_TK), competition.shared_TS
    counted_TK = score_TK
    if router.capacity is not None and router.capacity.renormalize_after:
        counted_TK = Rounded(score_TK.value * kept_TK, score_TK.error * kept_TK)
    total_T1 = _divisor(counted_TK, shared_TS, router)
    if shared_TS is None:  # nothing to divide by where every slot was refused
        some_T1 = kept_TK.any(1, keepdims=True)
        total_T1 = Rounded(np.where(some_T1, total_T1.value, 1.0), total_T1.error * some_T1)
    weights_TK = score_TK / total_T1 * router.scaling_factor
    shared_TS = None if shared_TS is None else shared_TS / total_T1 * router.scaling_factor
    if router.learned_scale == "layer":
        weights_TK = weights_TK * arrays["weight_scale_E"]
        shared_TS = None if shared_TS is None else shared_TS * arrays["weight_scale_E"]
    elif router.learned_scale == "expert":
        weights_TK = weights_TK * arrays["weight_scale_E"][selected_TK]
    return Rounded(weights_TK.value * kept_TK, weights_TK.error * kept_TK), shared_TS
