"""The oracle against a second implementation that shares no line with it, on drawn layers in fp64.

Both round, so they are compared within the bound that tests/double/bound.py derives from the number of
operations and the sum of absolute values; nothing here is a tolerance somebody chose.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_ref
from moe_ref import MLP, MoESpec, Parallel, Router, Routing, SharedExpert
from moe_ref.contract.weights import parameter_shapes
from tests.double import layer as double
from tests.double.border import oracle_moe, to_weights
from tests.double.bound import could_differ, layer_difference, score_error, weight_error
from tests.double.layer import Arrays

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")

FAMILIES = {
    "dense": MoESpec(hidden_size=6, intermediate_size=9),
    "mixtral": MoESpec(hidden_size=6, intermediate_size=8,
                       router=Router(num_experts=8, top_k=2, renormalize=True)),
    "olmoe": MoESpec(hidden_size=5, intermediate_size=4, router=Router(num_experts=9, top_k=4)),
    "qwen2": MoESpec(hidden_size=6, intermediate_size=4, router=Router(num_experts=6, top_k=3),
                     shared=SharedExpert(intermediate_size=7, gate="sigmoid")),
    "deepseek_v2": MoESpec(
        hidden_size=6, intermediate_size=4, shared=SharedExpert(intermediate_size=8),
        router=Router(num_experts=8, top_k=3, num_groups=4, num_groups_kept=2, scaling_factor=16.0)),
    "deepseek_v3": MoESpec(
        hidden_size=6, intermediate_size=4, shared=SharedExpert(intermediate_size=4),
        router=Router(num_experts=12, top_k=4, score="sigmoid", selection_bias="score", num_groups=4,
                      num_groups_kept=2, group_score="top2_sum", renormalize=True,
                      renormalize_epsilon=1e-20, scaling_factor=2.5)),
    "llama4": MoESpec(hidden_size=6, intermediate_size=8,
                      router=Router(num_experts=4, top_k=1, score="sigmoid"),
                      shared=SharedExpert(intermediate_size=8)),
    "gelu": MoESpec(hidden_size=5, intermediate_size=6, router=Router(num_experts=4, top_k=2),
                    experts=MLP(activation="gelu"),
                    shared=SharedExpert(intermediate_size=3, mlp=MLP(activation="gelu_tanh"))),
}


def draw_arrays(spec: MoESpec, num_tokens: int, seed: int) -> tuple[np.ndarray, Arrays]:
    """Tokens and unsharded parameters of standard normal numbers."""
    generator = np.random.default_rng(seed)
    arrays = {name: generator.standard_normal(shape) for name, shape in parameter_shapes(spec).items()}
    return generator.standard_normal((num_tokens, spec.hidden_size)), arrays


@st.composite
def routers(draw: st.DrawFn) -> Router:
    """Any valid router of up to 16 experts."""
    num_groups, group_size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kept = draw(st.integers(1, num_groups))
    scores = ["max"] if group_size == 1 else ["max", "top2_sum"]
    return Router(num_experts=num_groups * group_size, top_k=draw(st.integers(1, kept * group_size)),
                  score=draw(st.sampled_from(["softmax", "sigmoid"])),
                  selection_bias=draw(st.sampled_from([None, "score"])),
                  num_groups=num_groups, num_groups_kept=kept, group_score=draw(st.sampled_from(scores)),
                  renormalize=draw(st.booleans()),
                  renormalize_epsilon=draw(st.sampled_from([0.0, 1e-20, 0.5])),
                  scaling_factor=draw(st.sampled_from([1.0, 2.5, 0.3])))


@st.composite
def specs(draw: st.DrawFn) -> MoESpec:
    """Any valid small layer."""
    mlps = st.builds(MLP, activation=st.sampled_from(ACTIVATIONS))
    shared = st.builds(SharedExpert, intermediate_size=st.integers(1, 5), mlp=mlps,
                       gate=st.sampled_from(["none", "sigmoid"]))
    return MoESpec(hidden_size=draw(st.integers(1, 6)), intermediate_size=draw(st.integers(1, 6)),
                   router=draw(st.none() | routers()), experts=draw(mlps), shared=draw(st.none() | shared))


def weight_errors(x_TH: np.ndarray, arrays: Arrays, spec: MoESpec,
                  logits_TE: np.ndarray | None = None) -> np.ndarray:
    """Relative error of every token's routing weights, (T,)."""
    injected = [None] * len(x_TH) if logits_TE is None else logits_TE
    return np.array([weight_error(spec.router, score_error(x_H, arrays, spec.router, logits_E))
                     for x_H, logits_E in zip(x_TH, injected, strict=True)])


def check_routing(x_TH: np.ndarray, arrays: Arrays, spec: MoESpec,
                  logits_TE: np.ndarray | None = None) -> Routing:
    """The oracle's routing, after comparing it token by token with the double's."""
    logits = None if logits_TE is None else torch.from_numpy(logits_TE)
    routing = moe_ref.route(torch.from_numpy(x_TH), to_weights(arrays), spec, logits_TE=logits)
    choices = double.route(x_TH, arrays, spec, logits_TE)
    if spec.router is None:
        assert routing.ids_TK.tolist() == [[0]] * len(x_TH)
        assert routing.weights_TK.tolist() == [[1.0]] * len(x_TH)
        return routing
    errors_T = weight_errors(x_TH, arrays, spec, logits_TE)
    for t, choice in enumerate(choices):
        ids, weights = routing.ids_TK[t].tolist(), routing.weights_TK[t].tolist()
        if ids != choice.ids:
            relative = score_error(x_TH[t], arrays, spec.router, None if logits_TE is None else logits_TE[t])
            assert could_differ(choice, arrays, spec.router, relative), f"token {t}: {ids}, double {choice}"
            continue
        for weight, expected in zip(weights, choice.weights, strict=True):
            assert abs(weight - expected) <= 2.0 * errors_T[t] * expected, f"token {t}: {weights}, {choice}"
    return routing


def check_layer(x_TH: np.ndarray, arrays: Arrays, spec: MoESpec, parallel: Parallel | None = None,
                residual_TH: np.ndarray | None = None) -> None:
    """route, then experts from that very routing, then the whole layer."""
    routing = check_routing(x_TH, arrays, spec)
    ids_TK, weights_TK = routing.ids_TK.numpy(), routing.weights_TK.numpy()
    difference_TH = layer_difference(x_TH, ids_TK, weights_TK, arrays, spec, parallel=parallel,
                                     residual_TH=residual_TH)
    y_TH = oracle_moe(x_TH, arrays, spec, parallel, residual_TH=residual_TH)
    expected_TH = double.layer(x_TH, ids_TK, weights_TK, arrays, spec, parallel, residual_TH)
    assert y_TH.dtype == np.float64
    assert y_TH.shape == x_TH.shape
    assert (np.abs(y_TH - expected_TH) <= difference_TH).all()
    if parallel is None and residual_TH is None:
        experts_TH = moe_ref.experts(torch.from_numpy(x_TH), routing, to_weights(arrays), spec)
        assert np.array_equal(experts_TH.numpy(), y_TH)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_published_families(family: str, seed: int) -> None:
    """One small layer per published kind of routing, forty tokens."""
    x_TH, arrays = draw_arrays(FAMILIES[family], 40, seed)
    check_layer(x_TH, arrays, FAMILIES[family])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(spec=specs(), num_tokens=st.integers(0, 5), seed=st.integers(0, 2**32 - 1), residual=st.booleans())
def test_any_layer(spec: MoESpec, num_tokens: int, seed: int, residual: bool) -> None:
    """Any router, activation and shared expert that the spec allows, zero tokens included."""
    x_TH, arrays = draw_arrays(spec, num_tokens, seed)
    check_layer(x_TH, arrays, spec, residual_TH=x_TH[::-1].copy() if residual else None)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(router=routers(), seed=st.integers(0, 2**32 - 1))
def test_injected_logits_with_many_ties(router: Router, seed: int) -> None:
    """Three levels of logits and one bias for all: most decisions are ties, which are no excuse here.

    Equal logits are equal scores; different levels, also summed by twos, lie far apart: ids agree exactly.
    """
    spec = MoESpec(hidden_size=2, intermediate_size=2, router=router)
    x_TH, arrays = draw_arrays(spec, 4, seed)
    if router.selection_bias:
        arrays["selection_bias_E"] = np.full(router.num_experts, 0.25)
    logits_TE = np.random.default_rng(seed).choice([-1.0, 0.0, 2.0], (4, router.num_experts))
    routing = check_routing(x_TH, arrays, spec, logits_TE)
    assert routing.ids_TK.tolist() == [choice.ids for choice in double.route(x_TH, arrays, spec, logits_TE)]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(num_experts=st.integers(1, 12), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_softmax_over_the_selected_is_softmax_renormalised(num_experts: int, seed: int,
                                                           data: st.DataObject) -> None:
    """gpt-oss and Granite take the softmax of the K best logits only; the spec says it is the same number.

    exp(l_i) / sum over S of exp(l_j) = (exp(l_i) / Z) / (sum over S of exp(l_j) / Z).
    """
    top_k = data.draw(st.integers(1, num_experts))
    router = Router(num_experts=num_experts, top_k=top_k, renormalize=True)
    spec = MoESpec(hidden_size=4, intermediate_size=1, router=router)
    x_TH, arrays = draw_arrays(spec, 3, seed)
    logits_TE = 3.0 * np.random.default_rng(seed).standard_normal((3, num_experts))
    routing = moe_ref.route(torch.from_numpy(x_TH), to_weights(arrays), spec,
                            logits_TE=torch.from_numpy(logits_TE))
    errors_T = weight_errors(x_TH, arrays, spec, logits_TE)
    for t, logits_E in enumerate(logits_TE):
        best = sorted(range(num_experts), key=lambda e: -logits_E[e])[:top_k]
        exponentials = [math.exp(logits_E[e] - logits_E[best[0]]) for e in best]
        assert routing.ids_TK[t].tolist() == best
        for weight, exponential in zip(routing.weights_TK[t].tolist(), exponentials, strict=True):
            expected = exponential / math.fsum(exponentials)
            assert abs(weight - expected) <= 2.0 * errors_T[t] * expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
def test_ranks_agree_with_the_unsharded_layer(family: str, tp: int) -> None:
    """Cutting I over ranks only reorders the sum; also with more ranks than hidden neurons."""
    spec, parallel = FAMILIES[family], Parallel(tp=tp)
    x_TH, arrays = draw_arrays(spec, 5, seed=tp)
    check_layer(x_TH, arrays, spec, parallel, residual_TH=x_TH + 1.0)
    routing = check_routing(x_TH, arrays, spec)
    difference_TH = layer_difference(x_TH, routing.ids_TK.numpy(), routing.weights_TK.numpy(), arrays, spec,
                                     parallel=parallel)
    sharded_TH, whole_TH = oracle_moe(x_TH, arrays, spec, parallel), oracle_moe(x_TH, arrays, spec)
    assert (np.abs(sharded_TH - whole_TH) <= difference_TH).all()


def test_uneven_splits() -> None:
    """Shares given by the user, one of them far smaller."""
    spec, parallel = FAMILIES["qwen2"], Parallel(tp=3, splits=(60, 1, 39))
    x_TH, arrays = draw_arrays(spec, 5, seed=0)
    check_layer(x_TH, arrays, spec, parallel)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tp", [2, 3])
def test_exactly_one_all_reduce(family: str, tp: int) -> None:
    """Routed and shared experts share one all_reduce of T * H elements; routing and residual need none."""
    x_TH, arrays = draw_arrays(FAMILIES[family], 5, seed=0)
    calls: list = []
    oracle_moe(x_TH, arrays, FAMILIES[family], Parallel(tp=tp), residual_TH=x_TH, calls=calls)
    assert [[(call.operation, call.num_elements) for call in rank] for rank in calls] == [
        [("all_reduce", x_TH.size)]] * tp


def test_partial_results_sum_to_the_layer() -> None:
    """reduce=False communicates nothing; the ranks' partial results, added by hand, are the layer."""
    spec, parallel = FAMILIES["deepseek_v3"], Parallel(tp=3)
    x_TH, arrays = draw_arrays(spec, 5, seed=0)
    routing, weights = check_routing(x_TH, arrays, spec), to_weights(arrays)
    calls: list = []

    def body(comm: moe_ref.LocalComm) -> torch.Tensor:
        counting = moe_ref.CountingComm(comm)
        shard = weights.shard(parallel, comm.rank)
        partial_TH = moe_ref.experts(torch.from_numpy(x_TH), routing, shard, spec, parallel,
                                     moe_ref.Groups(tp=counting), reduce=False)
        calls.extend(counting.calls)
        return partial_TH

    total_TH = sum(moe_ref.run_virtual_ranks(3, body)).numpy()
    ids_TK, weights_TK = routing.ids_TK.numpy(), routing.weights_TK.numpy()
    expected_TH = double.layer(x_TH, ids_TK, weights_TK, arrays, spec)
    assert calls == []
    assert (np.abs(total_TH - expected_TH)
            <= layer_difference(x_TH, ids_TK, weights_TK, arrays, spec, parallel=parallel)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_inputs_are_computed_in_fp64(dtype: torch.dtype) -> None:
    """The oracle's result for rounded inputs is that of the same numbers in fp64, to the bit."""
    spec = FAMILIES["deepseek_v3"]
    x_TH, arrays = draw_arrays(spec, 5, seed=0)
    narrow = {name: torch.from_numpy(array).to(torch.float32 if name == "selection_bias_E" else dtype)
              for name, array in arrays.items()}
    x_narrow_TH = torch.from_numpy(x_TH).to(dtype)
    wide = {name: tensor.double().numpy() for name, tensor in narrow.items()}
    y_TH = moe_ref.moe(x_narrow_TH, moe_ref.MoEWeights(**narrow), spec)
    assert y_TH.dtype == torch.float64
    assert np.array_equal(y_TH.numpy(), oracle_moe(x_narrow_TH.double().numpy(), wide, spec))


@pytest.mark.parametrize("fault", ["weight off by 1e-10", "neuron dropped", "gate and up swapped",
                                   "wrong expert"])
def test_the_bound_has_teeth(fault: str) -> None:
    """A bound that forgives everything would pass every test above; faults, even tiny ones, exceed it."""
    spec = FAMILIES["mixtral"]
    x_TH, arrays = draw_arrays(spec, 5, seed=0)
    routing = check_routing(x_TH, arrays, spec)
    ids_TK, weights_TK = routing.ids_TK.numpy(), routing.weights_TK.numpy()
    difference_TH = layer_difference(x_TH, ids_TK, weights_TK, arrays, spec)
    faulty_weights_TK, faulty_ids_TK, faulty = weights_TK.copy(), ids_TK.copy(), dict(arrays)
    if fault == "weight off by 1e-10":
        faulty_weights_TK[:, 1] *= 1.0 + 1e-10
    elif fault == "neuron dropped":
        faulty["w2_EHI"] = arrays["w2_EHI"] * (np.arange(spec.intermediate_size) < spec.intermediate_size - 1)
    elif fault == "gate and up swapped":
        faulty["w13_EGIH"] = arrays["w13_EGIH"][:, ::-1]
    else:
        faulty_ids_TK[:, 1] = (ids_TK[:, 1] + 1) % spec.num_experts
    faulty_TH = double.layer(x_TH, faulty_ids_TK, faulty_weights_TK, faulty, spec)
    off_TH = np.abs(oracle_moe(x_TH, arrays, spec) - faulty_TH) > difference_TH
    assert off_TH.any(axis=1).all(), "a token hides the fault"
