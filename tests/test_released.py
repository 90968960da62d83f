"""The layer as released code computes it, with nothing coarser than fp32 to round, is the oracle.

Rounding points are no part of the mathematics, so what differs by more than fp32 explains is a mistake. Choices
and weights are judged by the bounds of moe_ref/verify/bounds/scores.py, outputs by released_bound; docs/bounds.md
has both derivations.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_ref
from moe_ref import MLP, Capacity, MoESpec, MoEWeights, ReleasedNumerics, Router, Routing, SharedExpert
from moe_ref.contract.case import Problem
from moe_ref.contract.errors import UsageTypeError, UsageValueError
from moe_ref.contract.released import check_released
from moe_ref.contract.vocabulary import Dtype, Format
from moe_ref.contract.weights import WHOLE_PARAMETERS
from moe_ref.inputs.build import Inputs
from moe_ref.models.registry import models
from moe_ref.oracle.released import moe_as_released, route_as_released
from moe_ref.oracle.router import router_gated, router_logits
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.bounds.released import released_bound
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.bounds.rows import Rows
from moe_ref.verify.bounds.scores import Scores
from tests.double.strategies import SEEDS, draw_arrays, specs
from tests.nightly import examples

MODEL = RoundingModel(load_tolerances(), "cpu", Format.FP32)
FP32 = ReleasedNumerics(logits="fp32", rows="fp32", activation="fp32", merge="fp32")
AFTER = replace(FP32, score_after_selection=True)
EXAMPLES = settings(max_examples=examples(300), deadline=None, derandomize=True)
Layer = tuple[MoESpec, ReleasedNumerics]
SIGMOID = {"num_experts": 4, "top_k": 2, "score": "sigmoid", "renormalize": True}


def draw(spec: MoESpec, num_tokens: int, seed: int) -> tuple[torch.Tensor, MoEWeights]:
    """Tokens and weights of standard normal numbers in fp32; a learned scale is positive, as its bound has it."""
    x_TH, arrays = draw_arrays(spec, num_tokens, seed)
    tensors = {name: torch.tensor(array, dtype=torch.float32) for name, array in arrays.items()}
    if "weight_scale_E" in tensors:
        tensors["weight_scale_E"] = tensors["weight_scale_E"].abs()
    return torch.tensor(x_TH, dtype=torch.float32), MoEWeights(**tensors)


def draw_routing(spec: MoESpec, num_tokens: int, seed: int) -> Routing:
    """Ids from -1 to E + Z - 1, repeated ones included, weights of both signs; no weights of a sigmoid gate."""
    generator, shape = torch.Generator().manual_seed(seed), (num_tokens, spec.top_k)
    ids_TK = torch.randint(-1, spec.num_choices, shape, generator=generator)
    weights_TK = torch.randn(shape, generator=generator)
    gates = spec.shared.num_gates if spec.shared is not None and router_gated(spec) else 0
    return Routing(ids_TK, weights_TK,
                   shared_TS=torch.rand(num_tokens, gates, generator=generator) if gates else None)


def true_scores(x_TH: torch.Tensor, weights: MoEWeights, spec: MoESpec) -> Scores:
    """The oracle's scores from logits that are off by one rounding to fp32, half a unit in the last place."""
    def once_rounded(logits: torch.Tensor) -> Rows:
        return Rows(logits, MODEL.rounded(logits.abs(), Format.FP32))

    shared_logits = None
    if router_gated(spec):
        assert weights.shared_gate_SH is not None
        shared_logits = once_rounded(x_TH.double() @ weights.shared_gate_SH.double().T)
    problem: Any = Inputs(Problem(spec=spec, num_tokens=len(x_TH), dtype=Dtype.FP32), x_TH, None, None, weights)
    return Scores(once_rounded(router_logits(x_TH, weights)), shared_logits, problem, MODEL)


def within(got: torch.Tensor, want: Rows) -> bool:
    """Every element lies inside its bound."""
    return bool(((got.double() - want.value).abs() <= want.bound).all())


def unscaled(spec: MoESpec, released: ReleasedNumerics) -> float:
    """The factor that released weights lack."""
    return spec.router.scaling_factor if spec.router is not None and released.scale_on == "output" else 1.0


def check_routing(x_TH: torch.Tensor, weights: MoEWeights, spec: MoESpec, released: ReleasedNumerics) -> Routing:
    """The same experts where no two scores are close; weights within the error of fp32 scores and a quotient.

    In units of 2^-24 of each weight: 8 + |l| for a score (8 + E + twice the spread of logits for softmax) and what
    half a unit of the logits does to it, twice where it is divided by a sum and K + S + 4 more, then 2 or 4.
    """
    got, want = (route_as_released(x_TH, weights, spec, released), moe_ref.route(x_TH, weights, spec))
    if spec.router is None:
        assert torch.equal(got.ids_TK, want.ids_TK)
        assert torch.equal(got.weights_TK.double(), want.weights_TK)
        return got
    assert got.logits_TE is not None
    assert torch.equal(got.logits_TE, router_logits(x_TH, weights).float().double())
    scores = true_scores(x_TH, weights, spec)
    known_T = scores.choice.unambiguous_T
    assert torch.equal(got.ids_TK[known_T].sort(-1).values, want.ids_TK[known_T].sort(-1).values)
    assert bool(scores.choice.accepts(got.ids_TK).all())
    judged = scores.weights(got.ids_TK)
    assert within(got.weights_TK.double() * unscaled(spec, released), judged.routed)
    if judged.shared is not None:
        assert got.shared_TS is not None
        assert within(got.shared_TS, judged.shared)
    return got


def check_output(x_TH: torch.Tensor, weights: MoEWeights, spec: MoESpec, released: ReleasedNumerics,
                 routing: Routing) -> None:
    """The layer for a given routing lies within the bound of its rounding points, and the bound is one."""
    _, bound_TH = released_bound(x_TH, routing, weights, spec, released, Format.FP32, MODEL)
    scaled = replace(routing, weights_TK=routing.weights_TK.double() * unscaled(spec, released))
    got_TH = moe_as_released(x_TH, weights, spec, released, routing=routing)
    assert got_TH.dtype == x_TH.dtype
    assert bool(bound_TH.isfinite().all())
    assert within(got_TH, Rows(moe_ref.moe(x_TH, weights, spec, routing=scaled), bound_TH))


def score_may_follow(router: Router) -> bool:
    """Whether scores of the selected logits alone are this router's."""
    after = router.capacity is not None and router.capacity.renormalize_after
    whole = router.score != "softmax" or (router.renormalize and not router.renormalize_epsilon and not after)
    return router.num_groups == 1 and router.selection_bias != "score" and whole


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Any valid layer with every choice of order that is defined for it."""
    spec = draw(specs())
    on_output = spec.weight_on == "output" or spec.router is None or spec.router.scaling_factor == 1.0
    return spec, replace(
        FP32, weight_at=draw(st.sampled_from(["down", "act"])),
        activation=draw(st.sampled_from(["model", "fp32"])),
        scale_on=draw(st.sampled_from(["weights", "output"] if on_output else ["weights"])),
        score_after_selection=spec.router is not None and score_may_follow(spec.router) and draw(st.booleans()))


@EXAMPLES
@given(layer=layers(), num_tokens=st.integers(0, 7), seed=SEEDS)
def test_a_layer_in_fp32_is_the_oracle(layer: Layer, num_tokens: int, seed: int) -> None:
    """Any layer routes and computes as the oracle does, and what it routes for itself is what it can be given."""
    (spec, released), (x_TH, weights) = layer, draw(layer[0], num_tokens, seed)
    routing = check_routing(x_TH, weights, spec, released)
    check_output(x_TH, weights, spec, released, routing)
    alone = routing if router_gated(spec) else replace(routing, shared_TS=None)
    assert torch.equal(moe_as_released(x_TH, weights, spec, released),
                       moe_as_released(x_TH, weights, spec, released, routing=alone))


@EXAMPLES
@given(layer=layers(), num_tokens=st.integers(1, 7), seed=SEEDS)
def test_a_given_routing_may_be_any(layer: Layer, num_tokens: int, seed: int) -> None:
    """Experts named twice, empty slots and negative weights, which no router makes."""
    (spec, released), (x_TH, weights) = layer, draw(layer[0], num_tokens, seed)
    check_output(x_TH, weights, spec, released, draw_routing(spec, num_tokens, seed))


def _layer(options: dict[str, Any], shared: int = 0) -> MoESpec:
    """A sigmoid router with these options, and so many shared experts that it weights."""
    return MoESpec(hidden_size=8, intermediate_size=4, router=Router(**SIGMOID | options),
                   shared=SharedExpert(intermediate_size=2 * shared, gate="router", num_experts=shared)
                   if shared else None)


FULL = {"capacity": Capacity(tokens=1)}
LEFT = {"capacity": Capacity(tokens=1, renormalize_after=True)}
RANKED = {"top_k": 3, "capacity": Capacity(tokens=2, priority="weight")}


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize(("spec", "released"), [
    pytest.param(_layer(RANKED), FP32, id="places go by renormalised weights"),
    pytest.param(_layer(RANKED, shared=2), FP32, id="shared experts take part in what places go by"),
    pytest.param(_layer(FULL, shared=2), FP32, id="a token that lost every slot has its sum left"),
    pytest.param(_layer(LEFT, shared=2), FP32, id="that of its shared experts, if only what is left counts"),
    pytest.param(_layer({"logit_scale": 0.3}, shared=2), FP32, id="shared logits are scaled"),
    pytest.param(_layer({"logit_softcap": 0.5}, shared=2), FP32, id="shared logits are capped"),
    pytest.param(_layer({"learned_scale": "expert"}, shared=2), FP32, id="shared experts have no learned scale"),
    pytest.param(_layer({"learned_scale": "layer"}, shared=2), FP32, id="unless it is the layer's"),
    pytest.param(_layer({"scaling_factor": 2.5}, shared=2), replace(FP32, scale_on="output"),
                 id="shared experts are scaled wherever routed ones are"),
])
def test_routing_in_fp32_is_the_oracle(spec: MoESpec, released: ReleasedNumerics) -> None:
    """What drawn layers meet by chance: options that two parts of the router have to agree on."""
    for seed in range(4):
        x_TH, weights = draw(spec, 6, seed)
        check_output(x_TH, weights, spec, released, check_routing(x_TH, weights, spec, released))


def test_an_expert_named_twice_is_added_twice() -> None:
    """A store that does not accumulate would keep one of both."""
    spec = MoESpec(hidden_size=8, intermediate_size=4, router=Router(num_experts=2, top_k=2))
    x_TH, weights = draw(spec, 1, 0)
    check_output(x_TH, weights, spec, FP32, Routing(torch.tensor([[1, 1]]), torch.tensor([[0.3, 0.6]])))


def test_slots_are_added_one_by_one() -> None:
    """bf16 holds 256 and 258 but not 257: by slots (256 + 1) - 256 is 0, any other order gives 1."""
    spec = MoESpec(hidden_size=1, intermediate_size=1, router=Router(num_experts=1, num_zero_experts=2, top_k=3))
    weights = MoEWeights(**{name: tensor.bfloat16() for name, tensor in draw(spec, 0, 0)[1].named_tensors()})
    routing = Routing(torch.tensor([[1, 1, 1]]), torch.tensor([[256.0, 1.0, -256.0]]))
    one_TH = torch.ones(1, 1, dtype=torch.bfloat16)
    assert moe_as_released(one_TH, weights, spec, ReleasedNumerics(), routing=routing).item() == 0.0
    assert moe_as_released(one_TH, weights, spec, ReleasedNumerics(merge="fp32"), routing=routing).item() == 1.0


def test_a_dropped_score_is_not_part_of_the_sum() -> None:
    """Token 0 fills expert 0; what token 1 wanted there was infinite, and its other weight is the whole sum."""
    spec = _layer({"score": "sqrt_softplus", "capacity": Capacity(tokens=1, renormalize_after=True)})
    x_TH, weights = draw(spec, 2, 0)
    logits_TE = torch.tensor([[3.0, -9.0, 2.0, -9.0], [torch.inf, 1.0, -9.0, -9.0]])
    routing = route_as_released(x_TH, weights, spec, FP32, logits_TE=logits_TE)
    assert routing.ids_TK.tolist() == [[0, 2], [-1, 1]]
    assert routing.weights_TK[1].tolist() == [0.0, 1.0]


def test_released_ties() -> None:
    """Equal scores go to the lower id, also where fp32 made them equal; a selection by logits tells them apart."""
    spec = _layer({"num_experts": 40, "top_k": 3})
    x_TH, weights = draw(spec, 2, 0)
    assert route_as_released(0.0 * x_TH, weights, spec, FP32).ids_TK.tolist() == [[0, 1, 2]] * 2
    logits_TE = torch.arange(50.0, 90.0).repeat(2, 1)
    assert route_as_released(x_TH, weights, spec, FP32, logits_TE=logits_TE).ids_TK.tolist() == [[0, 1, 2]] * 2
    assert route_as_released(x_TH, weights, spec, AFTER, logits_TE=logits_TE).ids_TK.tolist() == [[39, 38, 37]] * 2


SOFTMAX = {"score": "softmax"}


@pytest.mark.parametrize(("options", "fault"), [
    ({"selection_bias": "score"}, "selection_bias='score'"),
    ({"num_groups": 2}, "num_groups=2"),
    (SOFTMAX | {"renormalize": False}, "renormalize=False"),
    (SOFTMAX | {"renormalize_epsilon": 0.5}, "renormalize_epsilon=0.5"),
    (SOFTMAX | {"renormalize_epsilon": 0.5, "epsilon_rule": "clamp"}, "renormalize_epsilon=0.5"),
    (SOFTMAX | {"capacity": Capacity(tokens=1, renormalize_after=True)}, "renormalize_after=True"),
])
def test_scores_that_the_selection_needs_cannot_follow_it(options: dict[str, Any], fault: str) -> None:
    """Scores of the selected logits alone would be another router; without that option each of them is one."""
    spec = _layer(options)
    x_TH, weights = draw(spec, 3, 0)
    for call in (moe_as_released, route_as_released):
        with pytest.raises(UsageValueError, match=f"score_after_selection=True, but .*{fault}"):
            call(x_TH, weights, spec, AFTER)
    check_routing(x_TH, weights, spec, FP32)


def test_weighted_tokens_are_scaled_before_their_expert() -> None:
    """Experts are not linear: a factor of their output is not the same as one of their input."""
    spec = replace(_layer({"scaling_factor": 2.5}), weight_on="input")
    x_TH, weights = draw(spec, 3, 0)
    with pytest.raises(UsageValueError, match=r"scale_on='output'.*scaling_factor=2.5"):
        moe_as_released(x_TH, weights, spec, replace(FP32, scale_on="output"))


def test_every_fault_of_rounding_points_is_named() -> None:
    """One message for all of them."""
    router = Router(num_experts=4, top_k=2, num_groups=2, selection_bias="score", scaling_factor=2.0)
    with pytest.raises(UsageValueError, match=r"scale_on.*selection_bias.*num_groups.*renormalize"):
        check_released(replace(AFTER, scale_on="output"), router, "input")


def test_published_models_can_be_computed_as_released() -> None:
    """The registry pairs every layer with the rounding points of its family."""
    for model in models().values():
        check_released(model.numerics, model.spec.router, model.spec.weight_on)


def source(weights: MoEWeights, **parts: Any) -> Any:
    """The same parameters, expert by expert; `parts` replaces some of it."""
    whole = {name: getattr(weights, name) for name in WHOLE_PARAMETERS}
    return SimpleNamespace(**whole | {"expert": weights.expert, "shared_expert": weights.shared_expert} | parts)


def test_experts_of_a_source_are_checked() -> None:
    """Wider experts fit each other and would compute something else without a word."""
    spec = MoESpec(hidden_size=8, intermediate_size=4, router=Router(**SIGMOID), experts=MLP(bias=True),
                   shared=SharedExpert(intermediate_size=2))
    x_TH, weights = draw(spec, 3, 0)
    wide = draw(replace(spec, intermediate_size=5, shared=SharedExpert(intermediate_size=3)), 3, 0)[1]
    assert torch.equal(moe_as_released(x_TH, source(weights), spec, FP32),
                       moe_as_released(x_TH, weights, spec, FP32))
    for part in ("expert", "shared_expert"):
        with pytest.raises(UsageValueError, match=r"w13.*shape.*should be"):
            moe_as_released(x_TH, source(weights, **{part: getattr(wide, part)}), spec, FP32)


def test_wrong_tokens_and_logits_are_refused() -> None:
    """Each call checks what it reads."""
    spec = _layer({})
    x_TH, weights = draw(spec, 3, 0)
    for call in (moe_as_released, route_as_released):
        with pytest.raises(UsageTypeError, match="float64"):
            call(x_TH.double(), weights, spec, FP32)
    with pytest.raises(UsageValueError, match=r"logits_TE: shape \(2, 4\), but should be \(3, 4\)"):
        route_as_released(x_TH, weights, spec, FP32, logits_TE=torch.zeros(2, 4))
