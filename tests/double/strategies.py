"""Hypothesis strategies for every layer that a spec can describe, and data for them."""

import numpy as np
from hypothesis import strategies as st

from moe_ref import MLP, Capacity, MoESpec, Parallel, Router, SharedExpert
from moe_ref.contract.weights import parameter_shapes
from tests.double.layer import Arrays

SCORES = ("softmax", "sigmoid", "sqrt_softplus")
PRIORITIES = ("token", "choice", "weight")
SIZES = st.integers(1, 6)
SEEDS = st.integers(0, 2**32 - 1)


def draw_arrays(spec: MoESpec, num_tokens: int, seed: int) -> tuple[np.ndarray, Arrays]:
    """Tokens and unsharded parameters of standard normal numbers."""
    generator = np.random.default_rng(seed)
    arrays = {name: generator.standard_normal(shape) for name, shape in parameter_shapes(spec).items()}
    return generator.standard_normal((num_tokens, spec.hidden_size)), arrays


@st.composite
def capacities(draw: st.DrawFn, renormalize: bool, priorities: tuple[str, ...] = PRIORITIES) -> Capacity:
    """Limits low enough to be reached by a handful of tokens."""
    limit = draw(st.sampled_from([{"tokens": 1}, {"tokens": 2}, {"factor": 0.5}, {"factor": 1.25}]))
    return Capacity(**limit, priority=draw(st.sampled_from(priorities)),
                    sequence_length=draw(st.sampled_from([None, 1, 2, 3, 4])),
                    renormalize_after=renormalize and draw(st.booleans()))


@st.composite
def choices_of_experts(draw: st.DrawFn) -> dict[str, object]:
    """How many experts, in which groups, what selection goes by."""
    if draw(st.booleans()):
        num_zero, num_experts = draw(st.sampled_from([0, 0, 1, 3])), draw(st.integers(1, 8))
        return {"num_experts": num_experts, "num_zero_experts": num_zero,
                "top_k": draw(st.integers(1, num_experts + num_zero)),
                "selection_bias": draw(st.sampled_from([None, "score", "logit"]))}
    num_groups, group_size = draw(st.integers(2, 4)), draw(st.integers(1, 4))
    kept, fill = draw(st.integers(1, num_groups)), draw(st.sampled_from(["minus_inf", "zero"]))
    most = (kept if fill == "minus_inf" else num_groups) * group_size
    return {"num_experts": num_groups * group_size, "top_k": draw(st.integers(1, most)),
            "num_groups": num_groups, "num_groups_kept": kept, "group_fill": fill,
            "group_score": draw(st.sampled_from(["max"] if group_size == 1 else ["max", "top2_sum"])),
            "selection_bias": draw(st.sampled_from([None, "score"]))}


@st.composite
def routers(draw: st.DrawFn, scores: tuple[str, ...] = SCORES,
            priorities: tuple[str, ...] = PRIORITIES) -> Router:
    """Any valid router of up to 16 experts; without `priorities` none has a capacity."""
    options, renormalize = draw(choices_of_experts()), draw(st.booleans())
    epsilon = draw(st.sampled_from([0.0, 1e-20, 0.5, 1.5]))
    scales = [None, None, "layer"] if options.get("num_zero_experts") else [None, None, "layer", "expert"]
    limited = priorities and draw(st.booleans())
    return Router(**options, score=draw(st.sampled_from(scores)), logit_bias=draw(st.booleans()),
                  logit_scale=draw(st.sampled_from([1.0, 1.0, 0.25])),
                  logit_softcap=draw(st.sampled_from([0.0, 0.0, 2.0, 30.0])),
                  renormalize=renormalize, renormalize_epsilon=epsilon,
                  epsilon_rule=draw(st.sampled_from(["add", "clamp"])) if renormalize and epsilon else "add",
                  scaling_factor=draw(st.sampled_from([1.0, 2.5, 0.3])),
                  learned_scale=draw(st.sampled_from(scales)),
                  capacity=draw(capacities(renormalize, priorities)) if limited else None)


@st.composite
def mlps(draw: st.DrawFn, bias: bool = True) -> MLP:
    """Any valid MLP; limits and caps low enough to be reached."""
    activation = draw(st.sampled_from(["silu", "silu", "gelu", "gelu_tanh", "relu", "relu_squared"]))
    gated, limited = draw(st.booleans()), draw(st.booleans())
    options: dict[str, object] = {"activation": activation, "gated": gated, "bias": bias and draw(st.booleans())}
    caps = st.sampled_from([0.0, 0.0, 1.5])
    if activation == "silu":
        options["sigmoid_scale"] = draw(st.sampled_from([1.0, 1.702]))
        options["gate_softcap"] = 0.0 if limited else draw(caps)
    if gated:
        options["up_offset"] = draw(st.sampled_from([0.0, 1.0, -0.5]))
        options["up_softcap"] = 0.0 if limited else draw(caps)
    if limited:
        options["limit"] = draw(st.sampled_from([0.125, 1.0]))
        options["limit_at"] = draw(st.sampled_from(["before", "after"]))
    return MLP(**options)


@st.composite
def shared_experts(draw: st.DrawFn, router_gate: bool) -> SharedExpert:
    """Any valid shared expert."""
    gate = draw(st.sampled_from(["none", "sigmoid", "router"] if router_gate else ["none", "sigmoid"]))
    blocks = draw(st.integers(1, 3)) if gate == "router" else 1
    return SharedExpert(intermediate_size=blocks * draw(st.integers(1, 4)), mlp=draw(mlps(bias=gate != "router")),
                        gate=gate, num_experts=blocks, merge=draw(st.sampled_from(["sum", "mean"])))


@st.composite
def specs(draw: st.DrawFn, priorities: tuple[str, ...] = PRIORITIES, routed: bool = False,
          weight_on: tuple[str, ...] = ("output", "input")) -> MoESpec:
    """Any valid small layer; `routed` ones have a router, and `priorities` bounds their capacities."""
    router = draw(routers(priorities=priorities)) if routed else draw(st.none() | routers(priorities=priorities))
    where = draw(st.sampled_from(weight_on)) if router and not router.num_zero_experts else "output"
    columns = router is not None and router.score != "softmax"
    return MoESpec(hidden_size=draw(SIZES), intermediate_size=draw(SIZES), router=router,
                   experts=draw(mlps(bias=where == "output")), shared=draw(st.none() | shared_experts(columns)),
                   weight_on=where, output_bias=draw(st.booleans()))


@st.composite
def parallels(draw: st.DrawFn) -> Parallel:
    """One to five ranks with even or uneven shares, more ranks than neurons included."""
    tp = draw(st.sampled_from([1, 2, 3, 5]))
    return Parallel(tp=tp, splits=draw(st.none() | st.tuples(*[st.integers(1, 9)] * tp)))
