"""Vectors small enough for paper for the options that are easy to get wrong, against the oracle and the double.

Exact in binary like those: sigmoid(0) = 1/2, tanh(32) = 1, and sqrt(softplus(n^2)) = n for n > 10, because
e^-100 is lost beside 100.
"""

import math

import numpy as np
import pytest

from moe_ref import MLP, Capacity, MoESpec, Parallel, Router, SharedExpert
from tests.double.border import Layer, double_moe, oracle_moe
from tests.double.bound import layer_difference, whole_difference
from tests.double.paper import neuron_arrays, scaling_arrays, scaling_mlp, scaling_spec, token
from tests.double.router import Choice

ONE = np.ones((1, 1))


@pytest.fixture(params=[oracle_moe, double_moe], ids=["oracle", "double"])
def moe(request: pytest.FixtureRequest) -> Layer:
    """The implementation under test."""
    return request.param


@pytest.mark.parametrize(("gate", "up", "options", "expected"), [
    # 4^2 * -8
    (4.0, -8.0, {"activation": "relu_squared"}, -128.0),
    # min(4, 2)^2 * max(-8, -2)
    (4.0, -8.0, {"activation": "relu_squared", "limit": 2.0}, -8.0),
    # min(4^2, 2) * max(-8, -2)
    (4.0, -8.0, {"activation": "relu_squared", "limit": 2.0, "limit_at": "after"}, -4.0),
    # min(4, 2) * (min(8, 2) + 1): the offset is not clamped
    (4.0, 8.0, {"activation": "relu", "limit": 2.0, "up_offset": 1.0}, 6.0),
    # 2 tanh(64 / 2) sigmoid(64) * 4 tanh(-128 / 4): the sigmoid sees the gate without its cap
    (64.0, -128.0, {"gate_softcap": 2.0, "up_softcap": 4.0}, -8.0),
    # 3^2, no up projection
    (3.0, None, {"activation": "relu_squared", "gated": False}, 9.0),
    # min(3^2, 2): an expert without a gate has its activation clamped all the same
    (3.0, None, {"activation": "relu_squared", "gated": False, "limit": 2.0, "limit_at": "after"}, 2.0),
])
def test_mlp_options(moe: Layer, gate: float, up: float | None, options: dict, expected: float) -> None:
    """Clamp before or after the activation, offset, caps: one neuron."""
    spec = MoESpec(hidden_size=1, intermediate_size=1, experts=MLP(**options))
    assert moe(ONE, neuron_arrays(gate, up), spec).tolist() == [[expected]]


@pytest.mark.parametrize(("gate", "options", "expected"), [
    # sigmoid(2 ln 3) = 1 / (1 + 1/9) = 9/10
    (math.log(3.0), {"sigmoid_scale": 2.0}, 0.9 * math.log(3.0)),
    # neither gate nor activation is clamped from below: sigmoid(-ln 3) = 1/4, silu(-ln 3) = -0.27
    (-math.log(3.0), {"limit": 0.5}, -0.25 * math.log(3.0)),
    (-math.log(3.0), {"limit": 0.125, "limit_at": "after"}, -0.25 * math.log(3.0)),
    # silu(min(2 ln 3, ln 3)) = 3/4 ln 3, but min(silu(2 ln 3), ln 3) = ln 3, as silu(2 ln 3) = 9/10 * 2 ln 3
    (2.0 * math.log(3.0), {"limit": math.log(3.0)}, 0.75 * math.log(3.0)),
    (2.0 * math.log(3.0), {"limit": math.log(3.0), "limit_at": "after"}, math.log(3.0)),
])
def test_silu_options(moe: Layer, gate: float, options: dict, expected: float) -> None:
    """gpt-oss' scale inside the sigmoid, and where a limit stands; up is 1/16, under every limit here."""
    spec, arrays = MoESpec(hidden_size=1, intermediate_size=1, experts=MLP(**options)), neuron_arrays(gate, 0.0625)
    difference_TH = layer_difference(ONE, [Choice([0], [0], [1.0], [])], arrays, spec)
    assert abs(moe(ONE, arrays, spec)[0, 0] - expected / 16.0) <= difference_TH[0, 0]


@pytest.mark.parametrize("parallel", [Parallel(), Parallel(tp=2), Parallel(tp=3, splits=(1, 2, 5))])
def test_biases_are_added_once(moe: Layer, parallel: Parallel) -> None:
    """Gate 0 v + 64, up (v + 2) / 64, so act = v + 2 in both neurons, w2 = (1/2, 1/2), bias 10; weight 1/2.

    (3 + 2 + 10) / 2, and the bias of the output stands outside: + 100. Added on every rank they would grow.
    """
    arrays = {"w13_EGIH": np.array([[[[0.0]] * 2, [[1.0 / 64.0]] * 2]]), "w2_EHI": np.array([[[0.5, 0.5]]]),
              "w13_bias_EGI": np.array([[[64.0] * 2, [1.0 / 32.0] * 2]]), "w2_bias_EH": np.array([[10.0]]),
              "router_EH": np.zeros((1, 1)), "output_bias_H": np.array([100.0])}
    spec = MoESpec(hidden_size=1, intermediate_size=2, router=Router(num_experts=1, top_k=1, score="sigmoid"),
                   experts=MLP(bias=True), output_bias=True)
    assert moe(np.array([[3.0]]), arrays, spec, parallel).tolist() == [[107.5]]


@pytest.mark.parametrize(("options", "expected"), [
    # weights sqrt(144) = 12 and sqrt(400) = 20 on 1 v and 2 v
    ({}, 52.0),
    # 12/32 + 20/32 * 2
    ({"renormalize": True}, 1.625),
    # logits 576 and 1600: 24 + 40 * 2
    ({"logit_scale": 4.0}, 104.0),
    # 2 tanh(1000 / 2) = 2 for both: they tie at 2, and sqrt(softplus(2)) cancels in 1/2 + 1/2 * 2
    ({"logit_scale": 1000.0, "logit_softcap": 2.0, "renormalize": True}, 1.5),
])
def test_square_root_of_softplus(moe: Layer, options: dict, expected: float) -> None:
    """DeepSeek-V4's score, scaled and capped logits."""
    spec = scaling_spec(num_experts=2, top_k=2, score="sqrt_softplus", **options)
    assert moe(token(1.0), scaling_arrays((144.0, 400.0), (1.0, 2.0)), spec).tolist() == [[expected, 0.0]]


def test_square_root_of_softplus_at_zero(moe: Layer) -> None:
    """softplus(0) = ln 2; one expert of factor 1, so the result is the weight."""
    spec, arrays = scaling_spec(num_experts=1, top_k=1, score="sqrt_softplus"), scaling_arrays((0.0,), (1.0,))
    difference_TH = whole_difference(token(1.0), [Choice([0], [0], [0.0], [])], arrays, spec)
    assert abs(moe(token(1.0), arrays, spec)[0, 0] - math.sqrt(math.log(2.0))) <= difference_TH[0, 0]


def test_groups_filled_with_zero_let_a_masked_expert_in(moe: Layer) -> None:
    """Biased scores 1, -3/2 | 1/4, 1/4; group 0 is kept, group 1 competes with 0, which beats -3/2.

    The tie of two zeros goes to expert 2, whose weight is its own score: 1/2 * (1 + 4) v. With -inf: expert 1.
    """
    arrays = scaling_arrays((0.0,) * 4)
    arrays["selection_bias_E"] = np.array([0.5, -2.0, -0.25, -0.25])
    spec = scaling_spec(top_k=2, score="sigmoid", selection_bias="score", num_groups=2, num_groups_kept=1,
                        group_fill="zero")
    assert moe(token(1.0), arrays, spec).tolist() == [[2.5, 0.0]]


def test_a_selection_bias_on_logits(moe: Layer) -> None:
    """Logits 0, 2, -9 compete as 3, 2, -5.25: expert 0 wins, with the weight of its own logit, 1/2 * 1 v.

    Without the bias expert 1 would win; with the bias on scores 1/2, 0.88, 0.0001 expert 2, at 3.7501 against 3.5.
    """
    arrays = scaling_arrays((0.0, 2.0, -9.0), (1.0, 2.0, 4.0))
    arrays["selection_bias_E"] = np.array([3.0, 0.0, 3.75])
    spec = scaling_spec(num_experts=3, top_k=1, score="sigmoid", selection_bias="logit")
    assert moe(token(1.0), arrays, spec).tolist() == [[0.5, 0.0]]


@pytest.mark.parametrize(("options", "expected"), [
    # 1/2 / max(1/2, 2)
    ({"renormalize": True, "renormalize_epsilon": 2.0, "epsilon_rule": "clamp"}, 0.25 * 8.0),
    # 1/2 / max(1/2, 1/4)
    ({"renormalize": True, "renormalize_epsilon": 0.25, "epsilon_rule": "clamp"}, 8.0),
    # 1/2 * 16, for every expert alike
    ({"learned_scale": "layer"}, 0.5 * 8.0 * 16.0),
    # 1/2 / 1/2 * 3 * 128: after renormalisation, beside the factor
    ({"learned_scale": "expert", "renormalize": True, "scaling_factor": 3.0}, 3.0 * 8.0 * 128.0),
])
def test_weight_options(moe: Layer, options: dict, expected: float) -> None:
    """Expert 3 alone, score 1/2, factor 8."""
    arrays = scaling_arrays((-9.0, -9.0, -9.0, 0.0))
    if "learned_scale" in options:
        scales = {"layer": [16.0], "expert": [16.0, 32.0, 64.0, 128.0]}
        arrays["weight_scale_E"] = np.array(scales[options["learned_scale"]])
    assert moe(token(1.0), arrays, scaling_spec(top_k=1, score="sigmoid", **options)).tolist() == [[expected, 0.0]]


@pytest.mark.parametrize("tp", [1, 2])
def test_identity_expert(moe: Layer, tp: int) -> None:
    """Ids 2 and 3 are identity experts; 3 wins with weight 1/2, the token itself comes back once: (3, 1) / 2."""
    arrays = scaling_arrays((-9.0, -9.0), (1.0, 2.0))
    arrays["router_EH"] = np.array([[0.0, logit] for logit in (-9.0, -9.0, -8.0, 0.0)])
    spec = scaling_spec(num_experts=2, num_zero_experts=2, top_k=1, score="sigmoid")
    assert moe(token(3.0), arrays, spec, Parallel(tp=tp)).tolist() == [[1.5, 0.5]]


SQUARES = np.array([[12.0, 20.0], [16.0, 14.0], [20.0, 18.0]]) ** 2


@pytest.mark.parametrize(("capacity", "expected"), [
    # token 0 is first at both doors: 12 * 1 + 20 * 2
    (Capacity(tokens=1), [52.0, 0.0, 0.0]),
    # first choices are 1, 0, 0: token 0 at expert 1, token 1 at expert 0, and no place is left for second ones
    (Capacity(tokens=1, priority="choice"), [40.0, 16.0, 0.0]),
    # expert 0 prefers 20 of (12, 16, 20), expert 1 prefers 20 of (20, 14, 18)
    (Capacity(tokens=1, priority="weight"), [40.0, 0.0, 20.0]),
    # ceil(1/2 * 3 * 2 / 2) = 2 places: tokens 0 and 1; 16 * 1 + 14 * 2
    (Capacity(factor=0.5), [52.0, 44.0, 0.0]),
    # first choices of 1 and 2 fill expert 0; at expert 1, behind token 0's first, token 1's second is the earlier
    (Capacity(tokens=2, priority="choice"), [40.0, 44.0, 20.0]),
    # tokens 0 and 1, then token 2 alone: 20 * 1 + 18 * 2
    (Capacity(tokens=1, sequence_length=2), [52.0, 0.0, 56.0]),
    # the same by weight: expert 0 prefers 16 to 12, expert 1 prefers 20 to 14
    (Capacity(tokens=1, sequence_length=2, priority="weight"), [40.0, 16.0, 56.0]),
])
def test_capacity(moe: Layer, capacity: Capacity, expected: list[float]) -> None:
    """Three tokens want both experts, of factors 1 and 2, with weights 12, 20 | 16, 14 | 20, 18."""
    spec = scaling_spec(num_experts=2, top_k=2, score="sqrt_softplus", capacity=capacity)
    y_TH = moe(np.repeat(token(1.0), 3, 0), scaling_arrays((0.0, 0.0), (1.0, 2.0)), spec, logits_TE=SQUARES)
    assert y_TH[:, 0].tolist() == expected


def test_a_shorter_last_sequence_has_the_limit_of_its_length(moe: Layer) -> None:
    """The same three tokens, and the first two again: ceil(1/2 * 3) = 2 places in the three, 1 in the two."""
    capacity = Capacity(factor=0.5, sequence_length=3)
    spec = scaling_spec(num_experts=2, top_k=2, score="sqrt_softplus", capacity=capacity)
    y_TH = moe(np.repeat(token(1.0), 5, 0), scaling_arrays((0.0, 0.0), (1.0, 2.0)), spec,
               logits_TE=SQUARES[[0, 1, 2, 0, 1]])
    assert y_TH[:, 0].tolist() == [52.0, 44.0, 0.0, 52.0, 0.0]


@pytest.mark.parametrize(("after", "expected"), [
    # 20 / (20 + 12) on 1 and on 2
    (False, [0.625, 1.25, 0.0]),
    # 20 / 20
    (True, [1.0, 2.0, 0.0]),
])
def test_renormalisation_before_or_after_drops(moe: Layer, after: bool, expected: list[float]) -> None:
    """Weights 20, 12 | 12, 20 | 20, 12, one place each: first choices of tokens 0 and 1; token 2 keeps nothing."""
    spec = scaling_spec(num_experts=2, top_k=2, score="sqrt_softplus", renormalize=True,
                        capacity=Capacity(tokens=1, priority="choice", renormalize_after=after))
    logits_TE = np.array([[400.0, 144.0], [144.0, 400.0], [400.0, 144.0]])
    y_TH = moe(np.repeat(token(1.0), 3, 0), scaling_arrays((0.0, 0.0), (1.0, 2.0)), spec, logits_TE=logits_TE)
    assert y_TH[:, 0].tolist() == expected


@pytest.mark.parametrize(("after", "expected"), [
    # 12 / 32 = 3/8 at expert 0 is less than 11 / 22 = 1/2, and 20/32 at expert 1 more than 1/2
    (False, [0.625 * 2.0, 0.5]),
    # 12 and 20 are both more than 11: 12/32 + 20/32 * 2
    (True, [1.625, 0.0]),
])
def test_priority_goes_by_the_weight_as_it_stands(moe: Layer, after: bool, expected: list[float]) -> None:
    """Weights 12, 20 | 11, 11, divided before they compete or after."""
    spec = scaling_spec(num_experts=2, top_k=2, score="sqrt_softplus", renormalize=True,
                        capacity=Capacity(tokens=1, priority="weight", renormalize_after=after))
    logits_TE = np.array([[144.0, 400.0], [121.0, 121.0]])
    y_TH = moe(np.repeat(token(1.0), 2, 0), scaling_arrays((0.0, 0.0), (1.0, 2.0)), spec, logits_TE=logits_TE)
    assert y_TH[:, 0].tolist() == expected


def inkling(**router: object) -> tuple[MoESpec, dict[str, np.ndarray]]:
    """Experts 0 and 1 of four are chosen; two shared ones of factors 16 and 32. All scores are 1/2."""
    spec = MoESpec(hidden_size=2, intermediate_size=2,
                   router=Router(**{"num_experts": 4, "top_k": 2, "score": "sigmoid", **router}),
                   shared=SharedExpert(intermediate_size=4, gate="router", num_experts=2))
    arrays, blocks = scaling_arrays((0.0,) * 4), [scaling_mlp(16.0), scaling_mlp(32.0)]
    arrays["shared_w13_GIH"] = np.concatenate([w13 for w13, _ in blocks], axis=1)
    arrays["shared_w2_HI"] = np.concatenate([w2 for _, w2 in blocks], axis=1)
    arrays["shared_gate_SH"] = np.zeros((2, 2))
    return spec, arrays


@pytest.mark.parametrize("parallel", [Parallel(), Parallel(tp=2), Parallel(tp=3)])
@pytest.mark.parametrize(("options", "expected"), [
    # 1/2 each
    ({}, 0.5 * (1.0 + 2.0 + 16.0 + 32.0)),
    # 1/2 / (4 * 1/2): shared experts take part in the sum
    ({"renormalize": True}, 0.25 * (1.0 + 2.0 + 16.0 + 32.0)),
    # and in both scales
    ({"renormalize": True, "scaling_factor": 8.0, "learned_scale": "layer"}, 0.25 * 8.0 * 0.5 * 51.0),
])
def test_shared_columns_of_the_router(moe: Layer, parallel: Parallel, options: dict, expected: float) -> None:
    """Inkling's normaliser; three ranks cut the four shared neurons as 2, 1, 1, through the second block."""
    spec, arrays = inkling(**options)
    if "learned_scale" in options:
        arrays["weight_scale_E"] = np.array([0.5])
    assert moe(token(1.0), arrays, spec, parallel).tolist() == [[expected, 0.0]]


@pytest.mark.parametrize(("after", "expected"), [
    # 1/2 / (4 * 1/2): those dropped still count
    (False, 0.25 * (16.0 + 32.0)),
    # 1/2 / (2 * 1/2)
    (True, 0.5 * (16.0 + 32.0)),
])
def test_shared_columns_of_a_token_that_lost_every_slot(moe: Layer, after: bool, expected: float) -> None:
    """The second of two tokens finds no expert; its shared experts are normalised all the same."""
    spec, arrays = inkling(renormalize=True, capacity=Capacity(tokens=1, renormalize_after=after))
    y_TH = moe(np.repeat(token(1.0), 2, 0), arrays, spec)
    assert y_TH[:, 0].tolist() == [0.25 * 51.0, expected]


@pytest.mark.parametrize(("weight_on", "expected"), [
    # relu(4) * 8 * 1/2
    ("output", 16.0),
    # relu(4 * 1/2) * (8 * 1/2): the weight acts twice
    ("input", 8.0),
])
def test_weight_on_input(moe: Layer, weight_on: str, expected: float) -> None:
    """Llama 4 multiplies the token; an expert is not linear, so that is not the weighted output."""
    spec = MoESpec(hidden_size=1, intermediate_size=1, router=Router(num_experts=1, top_k=1, score="sigmoid"),
                   experts=MLP(activation="relu"), weight_on=weight_on)
    arrays = {**neuron_arrays(4.0, 8.0), "router_EH": np.zeros((1, 1))}
    assert moe(ONE, arrays, spec).tolist() == [[expected]]


@pytest.mark.parametrize("tp", [1, 2])
def test_the_mean_of_routed_and_shared(moe: Layer, tp: int) -> None:
    """(1/2 * 1 v + 16 v) / 2, and neither the output's bias nor the residual is halved: + 100 + 1000."""
    arrays = scaling_arrays((0.0, -9.0, -9.0, -9.0))
    arrays["shared_w13_GIH"], arrays["shared_w2_HI"] = scaling_mlp(16.0)
    arrays["output_bias_H"] = np.array([100.0, -7.0])
    spec = MoESpec(hidden_size=2, intermediate_size=2, router=Router(num_experts=4, top_k=1, score="sigmoid"),
                   shared=SharedExpert(intermediate_size=2, merge="mean"), output_bias=True)
    residual_TH = np.array([[1000.0, 0.0]])
    assert moe(token(1.0), arrays, spec, Parallel(tp=tp), residual_TH=residual_TH).tolist() == [[1108.25, -7.0]]
