"""The oracle against a second implementation that shares no line with it, on drawn layers in fp64.

Both round, so they are compared within the bound that tests/double/bound.py derives from the number of
operations and the sum of absolute values; nothing here is a tolerance somebody chose.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_ref
from moe_ref import Capacity, MoESpec, Parallel, Router, Routing
from tests.double import layer as double
from tests.double.border import oracle_moe, oracle_route, to_choices, to_weights
from tests.double.bound import layer_difference, whole_difference
from tests.double.families import DISTINCT, FAMILIES
from tests.double.layer import Arrays
from tests.double.router import Choice
from tests.double.routing_bound import compete, could_differ, sigmoid_gates, weights_bound
from tests.double.strategies import SEEDS, draw_arrays, parallels, routers, specs
from tests.nightly import examples


def check_routing(x_TH: np.ndarray, arrays: Arrays, spec: MoESpec,
                  logits_TE: np.ndarray | None = None) -> tuple[Routing, list[Choice]]:
    """The oracle's routing and the double's, after comparing them token by token."""
    routing, choices = oracle_route(x_TH, arrays, spec, logits_TE), double.route(x_TH, arrays, spec, logits_TE)
    shared = None
    if spec.shared is not None and spec.shared.gate == "sigmoid":
        shared = sigmoid_gates(x_TH, arrays)
    if spec.router is None:
        assert routing.ids_TK.tolist() == [[0]] * len(x_TH)
        assert routing.weights_TK.tolist() == [[1.0]] * len(x_TH)
    else:
        competition = compete(x_TH, arrays, spec, logits_TE)
        differ_T = could_differ(choices, competition, spec.router)
        weights_TK, columns_TS = weights_bound(choices, competition, arrays, spec.router)
        shared = columns_TS or shared
    for t, choice in enumerate(choices):
        ids = routing.ids_TK[t].tolist()
        if ids != choice.ids:
            assert differ_T[t], f"token {t}: {ids}, double {choice}"
        elif spec.router is not None:
            off_K = np.abs(routing.weights_TK[t].numpy() - choice.weights)
            assert (off_K <= 2.0 * weights_TK.error[t]).all(), f"token {t}: {routing.weights_TK[t]}, {choice}"
        if shared is not None and ids == choice.ids:
            off_S = np.abs(routing.shared_TS[t].numpy() - choice.shared)
            assert (off_S <= 2.0 * shared.error[t]).all(), f"token {t}: {routing.shared_TS[t]}, {choice}"
    assert (routing.shared_TS is None) == (shared is None)
    return routing, choices


def check_layer(x_TH: np.ndarray, arrays: Arrays, spec: MoESpec, parallel: Parallel | None = None,
                residual_TH: np.ndarray | None = None) -> bool:
    """route, then experts from that very routing, then the whole layer; whether both chose the same experts."""
    routing, own = check_routing(x_TH, arrays, spec)
    choices = to_choices(routing, x_TH, arrays, spec)
    difference_TH = layer_difference(x_TH, choices, arrays, spec, parallel=parallel, residual_TH=residual_TH)
    y_TH = oracle_moe(x_TH, arrays, spec, parallel, residual_TH=residual_TH)
    expected_TH = double.layer(x_TH, choices, arrays, spec, parallel, residual_TH)
    assert y_TH.dtype == np.float64
    assert y_TH.shape == x_TH.shape
    assert (np.abs(y_TH - expected_TH) <= difference_TH).all()
    if parallel is None and residual_TH is None:
        experts_TH = moe_ref.experts(torch.from_numpy(x_TH), routing, to_weights(arrays), spec)
        assert np.array_equal(experts_TH.numpy(), y_TH)
    return [choice.ids for choice in choices] == [choice.ids for choice in own]


def test_every_family_has_a_spec() -> None:
    """Families of equal mathematics share one; the tests below take each spec once."""
    assert set(FAMILIES.values()) == set(DISTINCT.values())
    assert len(DISTINCT) == len(set(FAMILIES.values()))


@pytest.mark.sampled(every=2, each="family")
@pytest.mark.parametrize("family", DISTINCT)
@pytest.mark.parametrize("seed", range(2))
def test_published_families(family: str, seed: int) -> None:
    """One small layer per published kind of mathematics, thirty tokens, routed by either one on its own.

    No decision of these data is close to a tie, so nothing is excused.
    """
    spec = DISTINCT[family]
    x_TH, arrays = draw_arrays(spec, 30, seed)
    assert check_layer(x_TH, arrays, spec)
    choices = double.route(x_TH, arrays, spec)
    whole_TH = double.layer(x_TH, choices, arrays, spec)
    difference_TH = whole_difference(x_TH, choices, arrays, spec)
    assert (np.abs(oracle_moe(x_TH, arrays, spec) - whole_TH) <= difference_TH).all()


@settings(max_examples=examples(1200), deadline=None, derandomize=True)
@given(spec=specs(), num_tokens=st.integers(0, 7), seed=SEEDS, parallel=parallels(), residual=st.booleans())
def test_any_layer(spec: MoESpec, num_tokens: int, seed: int, parallel: Parallel, residual: bool) -> None:
    """Every layer that a spec allows, zero tokens and uneven ranks included."""
    x_TH, arrays = draw_arrays(spec, num_tokens, seed)
    residual_TH = x_TH[::-1].copy() if residual else None
    check_layer(x_TH, arrays, spec, None if parallel.tp == 1 else parallel, residual_TH)


@settings(max_examples=examples(300), deadline=None, derandomize=True)
@given(router=routers(priorities=("token", "choice")), num_tokens=st.integers(1, 6), seed=SEEDS)
def test_injected_logits_with_many_ties(router: Router, num_tokens: int, seed: int) -> None:
    """Three levels of logits and one bias for all: most decisions are ties, which are no excuse here.

    Equal logits are equal scores; different levels, also summed by twos, lie far apart: ids agree exactly. Not
    with a capacity by weight: equal weights of two tokens come from sums in different orders.
    """
    spec = MoESpec(hidden_size=2, intermediate_size=2, router=router)
    x_TH, arrays = draw_arrays(spec, num_tokens, seed)
    if router.selection_bias:
        arrays["selection_bias_E"] = np.full(router.num_choices, 0.25)
    logits_TE = np.random.default_rng(seed).choice([-1.0, 0.0, 2.0], (num_tokens, router.num_choices))
    routing, choices = check_routing(x_TH, arrays, spec, logits_TE)
    assert routing.ids_TK.tolist() == [choice.ids for choice in choices]


@settings(max_examples=examples(100), deadline=None, derandomize=True)
@given(num_experts=st.integers(1, 12), seed=SEEDS, data=st.data())
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
    routing = oracle_route(x_TH, arrays, spec, logits_TE)
    choices = double.route(x_TH, arrays, spec, logits_TE)
    bound_TK, _ = weights_bound(choices, compete(x_TH, arrays, spec, logits_TE), arrays, router)
    for t, logits_E in enumerate(logits_TE):
        best = sorted(range(num_experts), key=lambda e: -logits_E[e])[:top_k]
        exponentials = [math.exp(logits_E[e] - logits_E[best[0]]) for e in best]
        assert routing.ids_TK[t].tolist() == best
        expected_K = [exponential / math.fsum(exponentials) for exponential in exponentials]
        assert (np.abs(routing.weights_TK[t].numpy() - expected_K) <= 2.0 * bound_TK.error[t]).all()


@pytest.mark.sampled(every=3, each="family")
@pytest.mark.parametrize("family", DISTINCT)
@pytest.mark.parametrize("tp", [2, 3, 8])
def test_ranks_agree_with_the_unsharded_layer(family: str, tp: int) -> None:
    """Cutting I over ranks only reorders the sum; also with more ranks than hidden neurons."""
    spec, parallel = DISTINCT[family], Parallel(tp=tp)
    x_TH, arrays = draw_arrays(spec, 5, seed=tp)
    check_layer(x_TH, arrays, spec, parallel, residual_TH=x_TH + 1.0)
    choices = to_choices(oracle_route(x_TH, arrays, spec), x_TH, arrays, spec)
    difference_TH = layer_difference(x_TH, choices, arrays, spec, parallel=parallel)
    sharded_TH, whole_TH = oracle_moe(x_TH, arrays, spec, parallel), oracle_moe(x_TH, arrays, spec)
    assert (np.abs(sharded_TH - whole_TH) <= difference_TH).all()


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("family", DISTINCT)
def test_uneven_splits(family: str) -> None:
    """Shares given by the user, one of them far smaller: most often a rank without a single neuron."""
    spec, parallel = DISTINCT[family], Parallel(tp=3, splits=(60, 1, 39))
    x_TH, arrays = draw_arrays(spec, 5, seed=0)
    check_layer(x_TH, arrays, spec, parallel)


@pytest.mark.sampled(every=5)
@pytest.mark.parametrize("family", DISTINCT)
@pytest.mark.parametrize("tp", [2, 3])
def test_exactly_one_all_reduce(family: str, tp: int) -> None:
    """Routed and shared experts share one all_reduce of T * H elements; routing and residual need none."""
    x_TH, arrays = draw_arrays(DISTINCT[family], 5, seed=0)
    calls: list = []
    oracle_moe(x_TH, arrays, DISTINCT[family], Parallel(tp=tp), residual_TH=x_TH, calls=calls)
    assert [[(call.operation, call.num_elements) for call in rank] for rank in calls] == [
        [("all_reduce", x_TH.size)]] * tp


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "inkling", "longcat_flash", "jetmoe", "cohere2_moe"])
def test_partial_results_sum_to_the_layer(family: str) -> None:
    """reduce=False communicates nothing; the ranks' partial results, added by hand, are the layer.

    One family each for what is not cut and must come from one rank only: biases, identity experts, the mean.
    """
    spec, parallel = FAMILIES[family], Parallel(tp=3)
    x_TH, arrays = draw_arrays(spec, 5, seed=0)
    (routing, _), weights = check_routing(x_TH, arrays, spec), to_weights(arrays)
    calls: list = []

    def body(comm: moe_ref.LocalComm) -> torch.Tensor:
        counting = moe_ref.CountingComm(comm)
        shard = weights.shard(parallel, comm.rank)
        partial_TH = moe_ref.experts(torch.from_numpy(x_TH), routing, shard, spec, parallel,
                                     moe_ref.Groups(tp=counting), reduce=False)
        calls.extend(counting.calls)
        return partial_TH

    total_TH = sum(moe_ref.run_virtual_ranks(3, body)).numpy()
    choices = to_choices(routing, x_TH, arrays, spec)
    expected_TH = double.layer(x_TH, choices, arrays, spec)
    assert calls == []
    assert (np.abs(total_TH - expected_TH)
            <= layer_difference(x_TH, choices, arrays, spec, parallel=parallel)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "inkling", "longcat_flash", "jetmoe", "gemma4"])
def test_narrow_inputs_are_computed_in_fp64(family: str, dtype: torch.dtype) -> None:
    """The oracle's result for rounded inputs is that of the same numbers in fp64, to the bit.

    The families have one of every parameter between them; what checkpoints keep in fp32 is fp32 here.
    """
    spec, precise = FAMILIES[family], ("selection_bias_E", "weight_scale_E")
    x_TH, arrays = draw_arrays(spec, 5, seed=0)
    narrow = {name: torch.from_numpy(array).to(torch.float32 if name in precise else dtype)
              for name, array in arrays.items()}
    x_narrow_TH = torch.from_numpy(x_TH).to(dtype)
    wide = {name: tensor.double().numpy() for name, tensor in narrow.items()}
    y_TH = moe_ref.moe(x_narrow_TH, moe_ref.MoEWeights(**narrow), spec)
    assert y_TH.dtype == torch.float64
    assert np.array_equal(y_TH.numpy(), oracle_moe(x_narrow_TH.double().numpy(), wide, spec))


FAULTS = {
    "weight off by 1e-10": "mixtral", "neuron dropped": "mixtral", "gate and up swapped": "mixtral",
    "wrong expert": "mixtral", "offset off by 1e-10": "gpt_oss", "bias of w2 counted twice": "gpt_oss",
    "limit off by 1e-10": "step3p7", "softcap off by 1e-10": "inkling2", "erf for tanh": "gemma4",
    "shared weight off by 1e-10": "inkling", "output bias forgotten": "jetmoe", "weight on output": "llama4",
    "sum for mean": "cohere2_moe",
}


def faulty_layer(fault: str, x_TH: np.ndarray, choices: list[Choice], arrays: Arrays, spec: MoESpec) -> np.ndarray:
    """The double's layer with one fault."""
    faulty, experts, shared = dict(arrays), spec.experts, spec.shared
    if "weight off" in fault:
        part = "shared" if "shared" in fault else "weights"
        choices = [replace(choice, **{part: [weight * (1.0 + 1e-10) for weight in getattr(choice, part)]})
                   for choice in choices]
    elif fault == "wrong expert":
        choices = [replace(choice, ids=[choice.ids[0], (choice.ids[1] + 1) % spec.num_experts])
                   for choice in choices]
    elif fault == "neuron dropped":
        faulty["w2_EHI"] = arrays["w2_EHI"] * (np.arange(spec.intermediate_size) < spec.intermediate_size - 1)
    elif fault == "gate and up swapped":
        faulty["w13_EGIH"] = arrays["w13_EGIH"][:, ::-1]
    elif fault == "bias of w2 counted twice":
        faulty["w2_bias_EH"] = 2.0 * arrays["w2_bias_EH"]
    elif fault == "output bias forgotten":
        faulty["output_bias_H"] = 0.0 * arrays["output_bias_H"]
    elif fault == "weight on output":
        spec = replace(spec, weight_on="output")
    elif fault == "sum for mean":
        spec = replace(spec, shared=replace(shared, merge="sum"))
    else:
        changed = {"offset off by 1e-10": {"up_offset": experts.up_offset + 1e-10},
                   "limit off by 1e-10": {"limit": (experts.limit or 0.0) + 1e-10},
                   "softcap off by 1e-10": {"gate_softcap": experts.gate_softcap + 1e-10},
                   "erf for tanh": {"activation": "gelu"}}[fault]
        spec = replace(spec, experts=replace(experts, **changed))
    return double.layer(x_TH, choices, faulty, spec)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_bound_has_teeth(fault: str) -> None:
    """A bound that forgives everything would pass every test above; faults, even tiny ones, exceed it.

    Every token shows the fault, or at least one of twenty does where a limit must be reached first.
    """
    spec = FAMILIES[FAULTS[fault]]
    x_TH, arrays = draw_arrays(spec, 20, seed=0)
    routing, _ = check_routing(x_TH, arrays, spec)
    choices = to_choices(routing, x_TH, arrays, spec)
    difference_TH = layer_difference(x_TH, choices, arrays, spec)
    faulty_TH = faulty_layer(fault, x_TH, choices, arrays, spec)
    off_T = (np.abs(oracle_moe(x_TH, arrays, spec) - faulty_TH) > difference_TH).any(axis=1)
    assert off_T.any() if "limit" in fault else off_T.all(), "a token hides the fault"


def test_decisions_are_in_doubt_only_where_they_are_close() -> None:
    """The excuse for choosing differently exists for a tie, and for nothing a millionth away from one."""
    spec = MoESpec(hidden_size=1, intermediate_size=1, router=Router(num_experts=3, top_k=1, score="sigmoid"))
    x_TH, arrays = draw_arrays(spec, 4, seed=0)
    logits_TE = np.array([[0.0, 0.0, -1.0], [1e-6, 0.0, -1.0], [2.0, -1.0, -1.0], [0.0, 1e-16, 0.0]])
    choices = double.route(x_TH, arrays, spec, logits_TE)
    doubt_T = could_differ(choices, compete(x_TH, arrays, spec, logits_TE), spec.router)
    assert doubt_T.tolist() == [True, False, False, True]


@pytest.mark.parametrize(("last", "doubt"), [(1.0, True), (1.0 + 1e-6, False)])
def test_a_tie_for_the_last_place_puts_every_token_in_doubt(last: float, doubt: bool) -> None:
    """With a capacity by weight, two equal weights at one expert decide who else finds a place."""
    router = Router(num_experts=2, top_k=1, score="sigmoid", capacity=Capacity(tokens=1, priority="weight"))
    spec = MoESpec(hidden_size=1, intermediate_size=1, router=router)
    x_TH, arrays = draw_arrays(spec, 3, seed=0)
    logits_TE = np.array([[1.0, -9.0], [last, -9.0], [-9.0, 3.0]])
    choices = double.route(x_TH, arrays, spec, logits_TE)
    assert could_differ(choices, compete(x_TH, arrays, spec, logits_TE), router).tolist() == [doubt] * 3
