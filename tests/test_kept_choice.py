"""Protects the set-valued judgement of capacities: what some right router keeps is accepted, clear errors are not.

Soundness by brute force: scores of a few tokens move to corners and centres of their intervals, each router drops
what its own capacity drops, and the result must be accepted.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ref.contract.spec import Capacity, Router
from moe_ref.oracle.router import top_ids, weigh
from moe_ref.verify.bounds.kept_choice import KeptChoice, kept_choice
from moe_ref.verify.bounds.selection import allowed_choice

PRIORITIES = ("token", "choice", "weight")


def router_of(num_experts: int, top_k: int, capacity: Capacity) -> Router:
    """Weights are the scores themselves, so that intervals of scores are intervals of weights."""
    return Router(num_experts=num_experts, top_k=top_k, score="sigmoid", capacity=capacity)


def allowed_of(score_TE: torch.Tensor, error_TE: torch.Tensor, router: Router) -> KeptChoice:
    """The sets as the harness makes them; the order of an ambiguous token is unknown."""
    chosen = allowed_choice(score_TE, error_TE, router)
    low_TE, high_TE = score_TE - error_TE, score_TE + error_TE
    if router.capacity.priority == "weight":
        unknown_T1 = ~chosen.unambiguous_T[:, None]
        low_TE, high_TE = low_TE.masked_fill(unknown_T1, -torch.inf), high_TE.masked_fill(unknown_T1, torch.inf)
    return kept_choice(chosen, low_TE, high_TE, router)


def routed(score_TE: torch.Tensor, router: Router) -> torch.Tensor:
    """What a router with these very scores shows, -1 where an expert was full."""
    return weigh(score_TE, top_ids(score_TE, router.top_k), router)[0]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Router, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Five tokens, three or four experts; distinct scores, some of which overlap, and twelve ways to move them."""
    num_experts = draw(st.sampled_from([3, 4]))
    capacity = Capacity(tokens=draw(st.integers(1, 3)), priority=draw(st.sampled_from(PRIORITIES)),
                        sequence_length=draw(st.sampled_from([None, None, 2, 3])))
    router = router_of(num_experts, draw(st.integers(1, 2)), capacity)
    count = 5 * num_experts
    order = draw(st.permutations(range(count)))
    error = draw(st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.04, 0.1]), min_size=count, max_size=count))
    moves = [draw(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 1.0]), min_size=count, max_size=count))
             for _ in range(12)]
    shape = (5, num_experts)
    score_TE = torch.tensor([0.1 + n / 20 for n in order], dtype=torch.float64).reshape(shape)
    return router, score_TE, torch.tensor(error, dtype=torch.float64).reshape(shape), [
        torch.tensor(move, dtype=torch.float64).reshape(shape) for move in moves]


@given(problems())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_what_some_perturbation_keeps_is_accepted(
        drawn: tuple[Router, torch.Tensor, torch.Tensor, list[torch.Tensor]]) -> None:
    """Soundness, for every priority, in sequences and in the whole batch."""
    router, score_TE, error_TE, moves = drawn
    allowed = allowed_of(score_TE, error_TE, router)
    for move in moves:
        assert allowed.accepts(routed(score_TE + move * error_TE, router)).all()


@given(problems())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_certain_scores_leave_a_single_answer(
        drawn: tuple[Router, torch.Tensor, torch.Tensor, list[torch.Tensor]]) -> None:
    """Sharpness: without errors what is kept is known, and any other set of experts is refused."""
    router, score_TE, error_TE, _ = drawn
    allowed = allowed_of(score_TE, torch.zeros_like(error_TE), router)
    right_TK = routed(score_TE, router)
    assert allowed.unambiguous_T.all()
    for t in range(5):
        for slot in range(router.top_k):
            for other in range(-1, router.num_experts):
                wrong_TK = right_TK.clone()
                wrong_TK[t, slot] = other
                same = sorted(wrong_TK[t].tolist()) == sorted(right_TK[t].tolist())
                assert bool(allowed.accepts(wrong_TK)[t]) is same


@given(problems())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_choice_before_dropping_is_found_again(
        drawn: tuple[Router, torch.Tensor, torch.Tensor, list[torch.Tensor]]) -> None:
    """Weights are divided by a sum that may hold dropped experts; ids of -1 do not name them."""
    router, score_TE, error_TE, _ = drawn
    allowed = allowed_of(score_TE, torch.zeros_like(error_TE), router)
    whole_TK = allowed.whole(routed(score_TE, router))
    assert torch.equal(whole_TK.sort(-1).values, top_ids(score_TE, router.top_k).sort(-1).values)


@pytest.mark.parametrize(("priority", "kept"), [("token", [0, 1]), ("choice", [0, 2]), ("weight", [1, 2])])
def test_who_stays(priority: str, kept: list[int]) -> None:
    """Three tokens want expert 0, which takes two: token 1 as its second choice, token 0 with the least weight."""
    score_TE = torch.tensor([[0.30, 0.20, 0.10], [0.60, 0.70, 0.10], [0.50, 0.10, 0.20]], dtype=torch.float64)
    router = router_of(3, 2, Capacity(tokens=2, priority=priority))  # pyrefly: ignore
    allowed = allowed_of(score_TE, torch.full_like(score_TE, 0.01), router)
    assert (allowed.kept.must_TE[:, 0]).nonzero().flatten().tolist() == kept
    assert torch.equal(allowed.kept.must_TE, allowed.kept.may_TE)


def test_equal_weights_are_left_open() -> None:
    """Two tokens with the very same weight and room for one: either may stay, but not both and not none."""
    score_TE = torch.tensor([[0.5, 0.1], [0.5, 0.1]], dtype=torch.float64)
    router = router_of(2, 1, Capacity(tokens=1, priority="weight"))
    allowed = allowed_of(score_TE, torch.zeros_like(score_TE), router)
    assert allowed.accepts(torch.tensor([[0], [-1]])).all()
    assert allowed.accepts(torch.tensor([[-1], [0]])).all()
    assert not allowed.unambiguous_T.any()
    for ids in ([[0], [0]], [[-1], [-1]], [[1], [1]]):
        assert not allowed.accepts(torch.tensor(ids)).any()
