"""Vectors small enough for paper, against the oracle and the double alike.

Most are exact in binary: silu(64) = 64 to the last bit, because 1 + e^-64 rounds to 1, sigmoid(0) = 1/2, and
everything else is a small multiple of a power of two. Those compare bit by bit. The rest compares within the
derived bound of tests/double/bound.py.
"""

import math

import numpy as np
import pytest
import torch

from moe_ref import MLP, MoESpec, Parallel, Router, Routing, SharedExpert
from tests.double.border import Layer, double_moe, oracle_moe
from tests.double.bound import layer_difference, whole_difference
from tests.double.paper import scaling_arrays, scaling_mlp, scaling_spec, token
from tests.double.router import Choice


@pytest.fixture(params=[oracle_moe, double_moe], ids=["oracle", "double"])
def moe(request: pytest.FixtureRequest) -> Layer:
    """The implementation under test."""
    return request.param


def test_dense_mlp(moe: Layer) -> None:
    """One expert without a router: gate 2 * 32 = 64, up 2 * 3 = 6, act 64 * 6 = 384, down 384 / 2 = 192."""
    arrays = {"w13_EGIH": np.array([[[[32.0]], [[3.0]]]]), "w2_EHI": np.array([[[0.5]]])}
    assert moe(np.array([[2.0]]), arrays, MoESpec(hidden_size=1, intermediate_size=1)).tolist() == [[192.0]]


def test_gate_and_up_are_not_interchangeable(moe: Layer) -> None:
    """silu(64) * -64 = -4096; with the halves swapped the gate is shut: silu(-64) * 64 is about -7e-25."""
    arrays = {"w13_EGIH": np.array([[[[64.0]], [[-64.0]]]]), "w2_EHI": np.array([[[1.0]]])}
    assert moe(np.ones((1, 1)), arrays, MoESpec(hidden_size=1, intermediate_size=1)).tolist() == [[-4096.0]]


@pytest.mark.parametrize(("activation", "gate", "expected"), [
    # sigmoid(ln 3) = 1 / (1 + 1/3) = 3/4
    ("silu", math.log(3.0), 0.75 * math.log(3.0)),
    # Phi(1) = 0.841344746068542948585..., the normal distribution's table value
    ("gelu", 1.0, 0.8413447460685429),
    # (1 + tanh(0.7978845608 * 1.044715)) / 2 = (1 + tanh(0.8335620...)) / 2
    ("gelu_tanh", 1.0, 0.8411919906082768),
])
def test_activations(moe: Layer, activation: str, gate: float, expected: float) -> None:
    """One neuron, x = up = w2 = 1, so the layer's result is the activation itself."""
    spec = MoESpec(hidden_size=1, intermediate_size=1, experts=MLP(activation=activation))
    arrays = {"w13_EGIH": np.array([[[[gate]], [[1.0]]]]), "w2_EHI": np.array([[[1.0]]])}
    one = np.ones((1, 1))
    difference_TH = layer_difference(one, [Choice([0], [0], [1.0], [])], arrays, spec)
    assert abs(moe(one, arrays, spec)[0, 0] - expected) <= difference_TH[0, 0]


def test_identical_experts_with_weights_that_sum_to_one(moe: Layer) -> None:
    """Four experts that return v, each with weight 1/4 of a softmax over equal logits: 4 * v / 4."""
    arrays = scaling_arrays((0.0,) * 4, (1.0,) * 4)
    assert moe(token(3.0), arrays, scaling_spec(top_k=4)).tolist() == [[3.0, 0.0]]


def test_two_experts_three_quarters_and_one_quarter(moe: Layer) -> None:
    """softmax(ln 3, 0) = (3, 1) / 4, so 3/4 * 4 v + 1/4 * 8 v = 5 v; v = 2."""
    arrays, spec = scaling_arrays((math.log(3.0), 0.0), (4.0, 8.0)), scaling_spec(num_experts=2, top_k=2)
    difference_TH = whole_difference(token(2.0), [Choice([0, 1], [0, 1], [0.75, 0.25], [])], arrays, spec)
    assert (np.abs(moe(token(2.0), arrays, spec) - [[10.0, 0.0]]) <= difference_TH).all()


def test_only_the_best_experts_count(moe: Layer) -> None:
    """sigmoid(0) = 1/2 for expert 2, the others far below: top-1 gives 1/2 * 4 v, not a sum of four."""
    arrays, spec = scaling_arrays((-9.0, -9.0, 0.0, -9.0)), scaling_spec(top_k=1, score="sigmoid")
    assert moe(token(3.0), arrays, spec).tolist() == [[6.0, 0.0]]


def test_selection_bias_changes_the_choice_but_not_the_weight(moe: Layer) -> None:
    """Scores 3/4, 1/2; with bias 0, 1/2 they compete as 3/4 < 1. Expert 1 wins with weight 1/2: 1/2 * 2 v."""
    arrays = scaling_arrays((math.log(3.0), 0.0), (1.0, 2.0))
    arrays["selection_bias_E"] = np.array([0.0, 0.5])
    spec = scaling_spec(num_experts=2, top_k=1, score="sigmoid", selection_bias="score")
    assert moe(token(5.0), arrays, spec).tolist() == [[5.0, 0.0]]


@pytest.mark.parametrize(("group_score", "expected"), [
    # best members 7/8 and 3/4: group 0, expert 0
    ("max", 0.5 * 1.0),
    # sums of two 7/8 + 0 and 3/4 + 3/4: group 1, where experts 2 and 3 tie and the lower one wins
    ("top2_sum", 0.5 * 4.0),
])
def test_best_expert_in_a_dropped_group(moe: Layer, group_score: str, expected: float) -> None:
    """All scores are 1/2; biases 3/8, -1/2 | 1/4, 1/4 make expert 0 the best, its group may be dropped."""
    arrays = scaling_arrays((0.0,) * 4)
    arrays["selection_bias_E"] = np.array([0.375, -0.5, 0.25, 0.25])
    spec = scaling_spec(top_k=1, score="sigmoid", selection_bias="score", num_groups=2, num_groups_kept=1,
                        group_score=group_score)
    assert moe(token(1.0), arrays, spec).tolist() == [[expected, 0.0]]


def test_dropped_groups_lose_even_to_negative_scores(moe: Layer) -> None:
    """Biased scores 1, -3/2 | 1/4, 1/4; group 0 is kept for its maximum, so K = 2 takes expert 1 at -3/2.

    Neither expert 2 nor a masked zero beats it: 1/2 * (1 + 2) v.
    """
    arrays = scaling_arrays((0.0,) * 4)
    arrays["selection_bias_E"] = np.array([0.5, -2.0, -0.25, -0.25])
    spec = scaling_spec(top_k=2, score="sigmoid", selection_bias="score", num_groups=2, num_groups_kept=1)
    assert moe(token(1.0), arrays, spec).tolist() == [[1.5, 0.0]]


@pytest.mark.parametrize(("options", "expected"), [
    # four weights of 1/2 on 1 + 2 + 4 + 8 = 15
    ({}, 7.5),
    # 1/2 / (4 * 1/2) = 1/4
    ({"renormalize": True}, 3.75),
    # 1/2 / (4 * 1/2 + 2) = 1/8: the epsilon is added to the sum
    ({"renormalize": True, "renormalize_epsilon": 2.0}, 1.875),
    # 5/2 of the first case
    ({"scaling_factor": 2.5}, 18.75),
    # 5/2 of the second: the factor comes after renormalisation and is not normalised away
    ({"renormalize": True, "scaling_factor": 2.5}, 9.375),
])
def test_renormalisation_and_scaling(moe: Layer, options: dict, expected: float) -> None:
    """sigmoid(0) = 1/2 for all four experts."""
    spec = scaling_spec(top_k=4, score="sigmoid", **options)
    assert moe(token(1.0), scaling_arrays((0.0,) * 4), spec).tolist() == [[expected, 0.0]]


@pytest.mark.sampled(every=5)
@pytest.mark.parametrize("options", [{"score": "softmax"}, {"score": "sigmoid"}, {"score": "sqrt_softplus"},
                                     {"score": "sigmoid", "logit_softcap": 1.5, "logit_scale": 0.3}],
                         ids=["softmax", "sigmoid", "sqrt_softplus", "softcap"])
@pytest.mark.parametrize("num_experts", [4, 7, 9, 13, 17])
def test_exact_ties_go_to_the_lower_ids(moe: Layer, options: dict, num_experts: int) -> None:
    """Equal logits tie, whatever the logit and the place in memory: only the first two experts return v.

    Equal scores have renormalised weights of exactly 1/2; any other expert would return 1024 v. Three tokens
    and many logits, because a vectorised function may give the elements left over at the end another last
    bit: torch.sigmoid does for the first three, softplus for many (torch 2.13, AVX2, fp64).
    """
    factors = (1.0, 1.0) + (1024.0,) * (num_experts - 2)
    spec = scaling_spec(num_experts=num_experts, top_k=2, renormalize=True, **options)
    logits = [-1.7449851525085551, -1.4952433328548014, -5.868775500811934,
              *(np.random.default_rng(7).standard_normal(50) * 4.0).tolist()]
    for logit in logits:
        y_TH = moe(np.tile(token(3.0), (3, 1)), scaling_arrays((logit,) * num_experts, factors), spec)
        assert y_TH.tolist() == [[3.0, 0.0]] * 3, f"logit {logit!r}"


@pytest.mark.parametrize("tp", [1, 2])
def test_residual_is_added_once(moe: Layer, tp: int) -> None:
    """1/2 * 8 v + 100 with v = 3; added by each of two ranks it would be 212."""
    arrays, spec = scaling_arrays((-9.0, -9.0, -9.0, 0.0)), scaling_spec(top_k=1, score="sigmoid")
    residual_TH = np.array([[100.0, -7.0]])
    assert moe(token(3.0), arrays, spec, Parallel(tp=tp), residual_TH=residual_TH).tolist() == [[112.0, -7.0]]


@pytest.mark.parametrize("outside", [-1, 4, 1000])
def test_id_out_of_range_contributes_nothing(moe: Layer, outside: int) -> None:
    """Token 0 keeps 1/4 * 8 v, token 1 keeps nothing, whatever weight stands beside the stray id."""
    routing = Routing(torch.tensor([[3, outside], [outside, outside]]),
                      torch.tensor([[0.25, 1.0], [1.0, 1.0]], dtype=torch.float64))
    x_TH = np.array([[2.0, 1.0], [2.0, 1.0]])
    y_TH = moe(x_TH, scaling_arrays((0.0,) * 4), scaling_spec(top_k=2), routing=routing)
    assert y_TH.tolist() == [[4.0, 0.0], [0.0, 0.0]]


def test_an_expert_named_twice_counts_twice(moe: Layer) -> None:
    """An injected routing may repeat an id: (1/4 + 1/2) * 8 v."""
    routing = Routing(torch.tensor([[3, 3]]), torch.tensor([[0.25, 0.5]], dtype=torch.float64))
    y_TH = moe(token(2.0), scaling_arrays((0.0,) * 4), scaling_spec(top_k=2), routing=routing)
    assert y_TH.tolist() == [[12.0, 0.0]]


@pytest.mark.parametrize("tp", [1, 2])
def test_zero_tokens(moe: Layer, tp: int) -> None:
    """No tokens in, no tokens out, with the width kept."""
    spec = scaling_spec(top_k=2, renormalize=True)
    assert moe(np.zeros((0, 2)), scaling_arrays((0.0,) * 4), spec, Parallel(tp=tp)).shape == (0, 2)


@pytest.mark.parametrize(("gate", "expected"), [
    # 1/2 * 1 v + 16 v
    ("none", 16.5),
    # 1/2 * 1 v + sigmoid(0) * 16 v
    ("sigmoid", 8.5),
])
@pytest.mark.parametrize("tp", [1, 2])
def test_shared_expert(moe: Layer, gate: str, expected: float, tp: int) -> None:
    """Every token passes the shared expert, weight 1 or sigmoid(shared_gate @ x), whatever its routing."""
    arrays = scaling_arrays((0.0, -9.0, -9.0, -9.0))
    arrays["shared_w13_GIH"], arrays["shared_w2_HI"] = scaling_mlp(16.0)
    if gate == "sigmoid":
        arrays["shared_gate_SH"] = np.zeros((1, 2))
    spec = MoESpec(hidden_size=2, intermediate_size=2, router=Router(num_experts=4, top_k=1, score="sigmoid"),
                   shared=SharedExpert(intermediate_size=2, gate=gate))
    assert moe(token(1.0), arrays, spec, Parallel(tp=tp)).tolist() == [[expected, 0.0]]


@pytest.mark.parametrize("parallel", [Parallel(tp=2), Parallel(tp=2, splits=(1, 3)), Parallel(tp=4)],
                         ids=["even", "uneven", "more_ranks_than_neurons"])
def test_shards_add_up(moe: Layer, parallel: Parallel) -> None:
    """Two neurons of half the result each, spread as 1, 1 (also by 1 : 3, cut at ceil(2/4)) or 1, 0, 1, 0."""
    arrays, spec = scaling_arrays((-9.0, -9.0, -9.0, 0.0)), scaling_spec(top_k=1, score="sigmoid")
    assert moe(token(3.0), arrays, spec, parallel).tolist() == [[12.0, 0.0]]
