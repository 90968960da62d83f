"""Protects the set-valued judgement of routing: a right router is never refused, a wrong one is.

Soundness is checked by brute force: scores move inside their intervals to all corners and to points between,
each perturbed router chooses for itself, and its choice must be accepted.
"""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ref.contract.spec import Router
from moe_ref.oracle.router import select, selection_score
from moe_ref.verify.bounds.selection import allowed_choice, broken_ties

# Scores on a grid of 1/8 and errors of 0, 1/8 or 1/4, so that intervals touch, overlap and tie exactly.
grid = st.integers(-8, 8).map(lambda n: n / 8)
errors = st.sampled_from([0.0, 0.0, 0.125, 0.25])


@st.composite
def problems(draw: st.DrawFn) -> tuple[Router, list[float], list[float]]:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    size = draw(st.integers(2, 6 // groups))
    kept = draw(st.integers(1, groups))
    router = Router(num_experts=groups * size, top_k=draw(st.integers(1, kept * size)), num_groups=groups,
                    num_groups_kept=kept, group_score=draw(st.sampled_from(["max", "top2_sum"])))
    count = router.num_experts
    return (router, draw(st.lists(grid, min_size=count, max_size=count)),
            draw(st.lists(errors, min_size=count, max_size=count)))


def perturbed(score_E: list[float], error_E: list[float]) -> torch.Tensor:
    """Every corner of the box of intervals and its centre, (P, E)."""
    moves = [(0.0,) if error == 0 else (-error, 0.0, error) for error in error_E]
    return torch.tensor([[score + move for score, move in zip(score_E, point, strict=True)]
                         for point in product(*moves)], dtype=torch.float64)


def choices(values_PE: torch.Tensor, router: Router) -> torch.Tensor:
    """What routers with these very scores choose, ties to either side of the expert order."""
    def chosen(values_PE: torch.Tensor) -> torch.Tensor:
        return select(selection_score(values_PE, values_PE, None, router), router)

    # Turned round, ties go to the higher id and the higher group: right as well, where no rule is declared.
    other = router.num_experts - 1 - chosen(values_PE.flip(1))
    return torch.cat([chosen(values_PE), other])


@given(problems())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_what_some_perturbation_chooses_is_accepted(drawn: tuple[Router, list[float], list[float]]) -> None:
    """Soundness, exhaustive over the corners for up to six experts, with and without groups."""
    router, score_E, error_E = drawn
    ids_PK = choices(perturbed(score_E, error_E), router)
    allowed = allowed_choice(torch.tensor([score_E], dtype=torch.float64),
                             torch.tensor([error_E], dtype=torch.float64), router)
    everyone = type(allowed)(allowed.may_TE.expand(len(ids_PK), -1), allowed.must_TE.expand(len(ids_PK), -1))
    assert everyone.accepts(ids_PK).all()


@given(problems())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_the_sets_are_no_larger_than_they_must_be(drawn: tuple[Router, list[float], list[float]]) -> None:
    """Sharpness, by counting: e may be chosen when fewer than K others surely beat it, must when fewer than K can.

    With groups the sets may be larger than the union of real choices; that costs sharpness, not soundness.
    """
    router, score_E, error_E = drawn
    if router.num_groups > 1:
        return
    allowed = allowed_choice(torch.tensor([score_E], dtype=torch.float64),
                             torch.tensor([error_E], dtype=torch.float64), router)
    low = [score - error for score, error in zip(score_E, error_E, strict=True)]
    high = [score + error for score, error in zip(score_E, error_E, strict=True)]
    for e in range(router.num_experts):
        others = [other for other in range(router.num_experts) if other != e]
        assert bool(allowed.may_TE[0, e]) is (sum(low[o] > high[e] for o in others) < router.top_k)
        assert bool(allowed.must_TE[0, e]) is (sum(high[o] >= low[e] for o in others) < router.top_k)


def accepted(scores: list[float], error: float, router: Router, ids: list[int]) -> bool:
    """Whether one token's choice is accepted."""
    selection_TE = torch.tensor([scores], dtype=torch.float64)
    return bool(allowed_choice(selection_TE, torch.full_like(selection_TE, error), router).accepts(
        torch.tensor([ids]))[0])


FOUR = Router(num_experts=4, top_k=2)


@pytest.mark.parametrize("ids", [[0, 2], [1, 3], [0, 0], [0, 4], [-1, 0], [2, 3]])
def test_clear_errors_are_refused(ids: list[int]) -> None:
    """Scores 4 > 3 > 2 > 1 with a small error: only {0, 1} is right; repeated or strange ids never are."""
    scores = [4.0, 3.0, 2.0, 1.0]
    assert accepted(scores, 0.125, FOUR, [0, 1])
    assert accepted(scores, 0.125, FOUR, [1, 0])
    assert not accepted(scores, 0.125, FOUR, ids)


def test_only_the_ambiguous_pair_may_change() -> None:
    """Experts 1 and 2 overlap, 0 is sure and 3 is out: {0, 1} and {0, 2}, but neither {1, 2} nor anything with 3."""
    scores = [4.0, 2.0, 2.125, 1.0]
    accepts = {pair for pair in product(range(4), repeat=2) if accepted(scores, 0.125, FOUR, list(pair))}
    assert accepts == {(0, 1), (1, 0), (0, 2), (2, 0)}


def test_a_token_is_unambiguous_when_one_choice_is_left() -> None:
    """Which is when hidden ids can be followed."""
    scores_TE = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 2.0, 2.125, 1.0]], dtype=torch.float64)
    allowed = allowed_choice(scores_TE, torch.full_like(scores_TE, 0.125), FOUR)
    assert allowed.unambiguous_T.tolist() == [True, False]


@pytest.mark.parametrize(("group_score", "right", "wrong"), [
    # groups (8, 0) and (5, 4): the best member wins for max, the sum of two for top2_sum
    ("max", [0, 1], [2, 3]),
    ("top2_sum", [2, 3], [0, 1]),
])
def test_group_limits(group_score: str, right: list[int], wrong: list[int]) -> None:
    """One of two groups is kept; mixing groups is refused though 8 and 5 are the best scores."""
    router = Router(num_experts=4, top_k=2, num_groups=2, num_groups_kept=1, group_score=group_score)
    assert accepted([8.0, 0.0, 5.0, 4.0], 0.125, router, right)
    assert not accepted([8.0, 0.0, 5.0, 4.0], 0.125, router, wrong)
    assert not accepted([8.0, 0.0, 5.0, 4.0], 0.125, router, [0, 2])


def test_an_ambiguous_group_opens_both() -> None:
    """Groups with maxima 4 and 4.125 and errors of 1/4: either one may be the group that is kept."""
    router = Router(num_experts=4, top_k=2, num_groups=2, num_groups_kept=1)
    for ids in ([0, 1], [2, 3]):
        assert accepted([4.0, 1.0, 4.125, 1.0], 0.25, router, ids)


def broken(ids: list[int], logits: list[float], router: Router, bias: list[float] | None = None) -> bool:
    """Whether one token broke the rule for exact ties."""
    return bool(broken_ties(torch.tensor([ids]), torch.tensor([logits]), None if bias is None else torch.tensor(bias),
                            router)[0])


@pytest.mark.parametrize(("ids", "expected"), [
    ([0, 1], False), ([1, 0], False), ([0, 2], True), ([0, 3], True), ([1, 2], True), ([2, 3], True),
])
def test_exact_ties_go_to_the_lower_ids(ids: list[int], expected: bool) -> None:
    """All four logits equal: only {0, 1} keeps the declared rule, whatever the order of the slots."""
    assert broken(ids, [1.0] * 4, FOUR) is expected


def test_unequal_logits_tie_nothing() -> None:
    """Passing over a smaller or larger logit is for the scores to judge, not for the rule of ties."""
    assert not broken([2, 3], [1.0, 1.25, 2.0, 3.0], FOUR)
    assert broken([1, 3], [3.0, 1.0, 1.0, 3.0], FOUR)


def test_a_bias_makes_equal_logits_unequal() -> None:
    """Same logit, other bias: no tie. Same logit, same bias: a tie."""
    assert not broken([2, 3], [1.0] * 4, FOUR, [0.0, 0.0, 0.5, 0.5])
    assert broken([1, 3], [1.0] * 4, FOUR, [0.0, 0.0, 0.5, 0.5])


def test_ties_across_groups_are_no_ties() -> None:
    """The lower id may sit in a group that lost."""
    router = Router(num_experts=4, top_k=1, num_groups=2, num_groups_kept=1)
    assert not broken([3], [1.0, 0.0, 0.0, 1.0], router)
    assert broken([3], [0.0, 0.0, 1.0, 1.0], router)


def test_a_tie_at_any_place_is_seen() -> None:
    """Every subset of six experts against every pattern of two logit values, beside the rule written out."""
    router = Router(num_experts=5, top_k=2)
    for logits in product([0.0, 1.0], repeat=5):
        for ids in product(range(5), repeat=2):
            if ids[0] != ids[1]:
                rule = any(logits[e] == logits[k] and e < k for k in ids for e in range(5) if e not in ids)
                assert broken(list(ids), list(logits), router) is rule


@st.composite
def filled_problems(draw: st.DrawFn) -> tuple[Router, list[float], list[float]]:
    """Groups filled with 0, of which fewer may be kept than are needed for K choices."""
    groups = draw(st.sampled_from([2, 3]))
    size = 6 // groups
    router = Router(num_experts=6, top_k=draw(st.integers(1, 6)), num_groups=groups, group_fill="zero",
                    num_groups_kept=draw(st.integers(1, groups)),
                    group_score=draw(st.sampled_from(["max", "top2_sum"])) if size > 1 else "max")
    return (router, draw(st.lists(grid, min_size=6, max_size=6)), draw(st.lists(errors, min_size=6, max_size=6)))


@given(filled_problems())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_groups_filled_with_zero(drawn: tuple[Router, list[float], list[float]]) -> None:
    """Soundness again: experts of other groups compete with 0, those of uncertain groups with either."""
    router, score_E, error_E = drawn
    ids_PK = choices(perturbed(score_E, error_E), router)
    allowed = allowed_choice(torch.tensor([score_E], dtype=torch.float64),
                             torch.tensor([error_E], dtype=torch.float64), router)
    everyone = type(allowed)(allowed.may_TE.expand(len(ids_PK), -1), allowed.must_TE.expand(len(ids_PK), -1))
    assert everyone.accepts(ids_PK).all()


@pytest.mark.parametrize(("fill", "right", "wrong"), [("minus_inf", [0, 1], [0, 2]), ("zero", [0, 2], [0, 1])])
def test_what_a_negative_score_loses_to(fill: str, right: list[int], wrong: list[int]) -> None:
    """Group (4, -1) is kept, group (3, 2) is not: -1 wins over minus infinity and loses to 0."""
    router = Router(num_experts=4, top_k=2, num_groups=2, num_groups_kept=1, group_fill=fill)  # pyrefly: ignore
    assert accepted([4.0, -1.0, 3.0, 2.0], 0.125, router, right)
    assert not accepted([4.0, -1.0, 3.0, 2.0], 0.125, router, wrong)


def test_nothing_is_known_of_scores_that_are_not_numbers() -> None:
    """Any choice of distinct experts is accepted, for that token and no other."""
    scores_TE = torch.tensor([[torch.nan, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
    allowed = allowed_choice(scores_TE, torch.full_like(scores_TE, 0.125), FOUR)
    assert allowed.accepts(torch.tensor([[2, 3], [2, 3]])).tolist() == [True, False]
    assert allowed.unambiguous_T.tolist() == [False, True]
