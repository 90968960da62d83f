"""What must hold for every layer, whatever its numbers: the oracle against itself under transformations.

Bits are compared where the transformation leaves every operation as it was; elsewhere sums run in another order,
and both results lie within the derived error of the same exact one (tests/double/bound.py). Routings that a
transformation must carry along are drawn away from ties, as could_differ proves.
"""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_ref import MLP, MoESpec, Parallel, Router, Routing, SharedExpert
from tests.double import layer as double
from tests.double.border import oracle_moe, oracle_route, to_choices
from tests.double.bound import layer_difference, whole_difference
from tests.double.layer import Arrays
from tests.double.rounded import gamma
from tests.double.router import Choice
from tests.double.routing_bound import compete, could_differ
from tests.double.strategies import SEEDS, draw_arrays, mlps, specs
from tests.nightly import examples

EXAMPLES = settings(max_examples=examples(120), deadline=None, derandomize=True)
WHOLE_BATCH = ("weight",)
"""The priority that does not ask for a token's place."""


def decided(x_TH: np.ndarray, arrays: Arrays, spec: MoESpec) -> list[Choice]:
    """The routing, if no two correct evaluations can differ on it."""
    choices = double.route(x_TH, arrays, spec)
    if spec.router is not None:
        assume(not could_differ(choices, compete(x_TH, arrays, spec), spec.router).any())
    return choices


def agree(one_TH: np.ndarray, two_TH: np.ndarray, *differences: np.ndarray) -> None:
    """Each is within half of its own largest difference from the exact result, which is the same for both."""
    assert (np.abs(one_TH - two_TH) <= sum(differences) / 2.0).all()


def draw_routing(spec: MoESpec, num_tokens: int, seed: int, low: int = 0) -> Routing:
    """Ids from `low` to E + Z - 1, repeated ones included; weights are multiples of 2^-10, whose sums are exact.

    Weights of a shared expert's gates are drawn too.
    """
    generator = np.random.default_rng((seed, 1))
    shape = (num_tokens, spec.top_k)
    gates = spec.shared.num_gates if spec.shared is not None else 0
    weights_TK = generator.integers(-1023, 1024, shape) / 1024.0
    shared_TS = torch.tensor(generator.random((num_tokens, gates))) if gates else None
    return Routing(torch.tensor(generator.integers(low, spec.num_choices, shape)), torch.tensor(weights_TK),
                   shared_TS=shared_TS)


def difference(x_TH: np.ndarray, routing: Routing, arrays: Arrays, spec: MoESpec,
               parallel: Parallel | None = None) -> np.ndarray:
    """layer_difference of an injected routing."""
    return layer_difference(x_TH, to_choices(routing, x_TH, arrays, spec), arrays, spec, parallel=parallel)


@EXAMPLES
@given(spec=specs(priorities=WHOLE_BATCH), num_tokens=st.integers(2, 7), seed=SEEDS)
def test_permuted_tokens_are_permuted_rows(spec: MoESpec, num_tokens: int, seed: int) -> None:
    """No token sees its place in the batch; ids move with it exactly, also where weights compete for capacity."""
    if spec.router and spec.router.capacity:
        capacity = replace(spec.router.capacity, sequence_length=None)
        spec = replace(spec, router=replace(spec.router, capacity=capacity))
    x_TH, arrays = draw_arrays(spec, num_tokens, seed)
    difference_TH = whole_difference(x_TH, decided(x_TH, arrays, spec), arrays, spec)
    order_T = np.random.default_rng(seed).permutation(num_tokens)
    ids_TK = oracle_route(x_TH, arrays, spec).ids_TK.numpy()
    assert np.array_equal(oracle_route(x_TH[order_T], arrays, spec).ids_TK.numpy(), ids_TK[order_T])
    permuted_TH = oracle_moe(x_TH[order_T], arrays, spec)
    agree(permuted_TH, oracle_moe(x_TH, arrays, spec)[order_T], 2.0 * difference_TH[order_T])


def relabelling(spec: MoESpec, seed: int) -> np.ndarray:
    """Old id of every new one, (E + Z,): groups change places, experts inside them, identity experts apart."""
    generator, router = np.random.default_rng(seed), spec.router
    groups = generator.permutation(np.arange(router.num_experts).reshape(router.num_groups, -1))
    return np.concatenate([generator.permuted(groups, axis=1).ravel(),
                           generator.permutation(np.arange(router.num_experts, router.num_choices))])


@EXAMPLES
@given(spec=specs(routed=True), num_tokens=st.integers(1, 5), seed=SEEDS)
def test_experts_have_no_names(spec: MoESpec, num_tokens: int, seed: int) -> None:
    """Experts, router rows and biases relabelled alike: other ids, the same result.

    Not with groups filled with 0: masked experts tie exactly, and their ids decide.
    """
    assume(spec.router.num_groups == 1 or spec.router.group_fill == "minus_inf")
    x_TH, arrays = draw_arrays(spec, num_tokens, seed)
    choices, old = decided(x_TH, arrays, spec), relabelling(spec, seed)
    relabelled = {name: array[old[:len(array)]] if name.rpartition("_")[2].startswith("E")
                  and len(array) >= spec.num_experts else array for name, array in arrays.items()}
    ids_TK = oracle_route(x_TH, relabelled, spec).ids_TK.numpy()
    back_TK = np.where(ids_TK >= 0, old[ids_TK], -1)
    assert back_TK.tolist() == [choice.ids for choice in choices]
    agree(oracle_moe(x_TH, relabelled, spec), oracle_moe(x_TH, arrays, spec),
          2.0 * whole_difference(x_TH, choices, arrays, spec))


@EXAMPLES
@given(spec=specs(priorities=(), weight_on=("output",)), num_tokens=st.integers(1, 5), seed=SEEDS)
def test_linear_in_the_routing_weights(spec: MoESpec, num_tokens: int, seed: int) -> None:
    """f(v + w) + f(0) = f(v) + f(w); f(0) is what routing has no part in, the shared expert and biases."""
    x_TH, arrays = draw_arrays(spec, num_tokens, seed)
    one = draw_routing(spec, num_tokens, seed)
    other_TK = draw_routing(spec, num_tokens, seed + 1).weights_TK
    routings = [replace(one, weights_TK=weights_TK)
                for weights_TK in (one.weights_TK + other_TK, 0.0 * other_TK, one.weights_TK, other_TK)]
    both, none, first, second = [oracle_moe(x_TH, arrays, spec, routing=routing) for routing in routings]
    differences = [difference(x_TH, routing, arrays, spec) for routing in routings]
    sums = 2.0 * gamma(2) * (np.abs(both) + np.abs(none) + np.abs(first) + np.abs(second))
    agree(both + none, first + second, *differences, sums)


@EXAMPLES
@given(spec=specs(priorities=(), weight_on=("output",)), num_tokens=st.integers(1, 5), seed=SEEDS)
def test_twice_the_weights_is_twice_the_result(spec: MoESpec, num_tokens: int, seed: int) -> None:
    """To the bit, since a factor of 2 rounds nothing; without what routing has no part in."""
    spec = replace(spec, shared=None, output_bias=False)
    x_TH, arrays = draw_arrays(spec, num_tokens, seed)
    routing = draw_routing(spec, num_tokens, seed)
    doubled = replace(routing, weights_TK=2.0 * routing.weights_TK)
    assert np.array_equal(oracle_moe(x_TH, arrays, spec, routing=doubled),
                          2.0 * oracle_moe(x_TH, arrays, spec, routing=routing))


@EXAMPLES
@given(spec=specs(), sequences=st.tuples(st.integers(0, 2), st.integers(0, 2)), seed=SEEDS)
def test_a_batch_may_be_cut_in_two(spec: MoESpec, sequences: tuple[int, int], seed: int) -> None:
    """Tokens meet in a capacity only, and only inside their sequence: a cut between two changes nothing."""
    length = 3
    if spec.router and spec.router.capacity:
        capacity = replace(spec.router.capacity, sequence_length=length)
        spec = replace(spec, router=replace(spec.router, capacity=capacity))
    x_TH, arrays = draw_arrays(spec, length * sum(sequences), seed)
    difference_TH = whole_difference(x_TH, decided(x_TH, arrays, spec), arrays, spec)
    cut = length * sequences[0]
    parts_TH = np.concatenate([oracle_moe(part_TH, arrays, spec) for part_TH in (x_TH[:cut], x_TH[cut:])])
    agree(parts_TH, oracle_moe(x_TH, arrays, spec), 2.0 * difference_TH)


@EXAMPLES
@given(spec=specs(priorities=(), routed=True, weight_on=("output",)), num_tokens=st.integers(1, 5), seed=SEEDS)
def test_an_id_named_twice_has_the_sum_of_both_weights(spec: MoESpec, num_tokens: int, seed: int) -> None:
    """Slot 0 repeated in slot 1, or slot 0 with both weights and slot 1 empty."""
    assume(spec.top_k > 1)
    x_TH, arrays = draw_arrays(spec, num_tokens, seed)
    routing = draw_routing(spec, num_tokens, seed)
    ids_TK, weights_TK = routing.ids_TK.clone(), routing.weights_TK.clone()
    ids_TK[:, 1] = ids_TK[:, 0]
    twice = replace(routing, ids_TK=ids_TK.clone())
    ids_TK[:, 1] = -1
    weights_TK[:, 0] += weights_TK[:, 1]
    once = replace(routing, ids_TK=ids_TK, weights_TK=weights_TK)
    agree(*[oracle_moe(x_TH, arrays, spec, routing=one) for one in (twice, once)],
          *[difference(x_TH, one, arrays, spec) for one in (twice, once)])


@EXAMPLES
@given(spec=specs(), num_tokens=st.integers(0, 5), seed=SEEDS,
       splits=st.sampled_from([(1, 1), (5, 2), (1, 1, 1), (60, 1, 39), (1,) * 5, (3, 1, 1, 7, 2)]))
def test_any_number_of_ranks(spec: MoESpec, num_tokens: int, seed: int, splits: tuple[int, ...]) -> None:
    """Two, three or five ranks of equal or uneven shares: every rank the same bits, and the unsharded result."""
    parallel = Parallel(tp=len(splits), splits=splits)
    x_TH, arrays = draw_arrays(spec, num_tokens, seed)
    routing = oracle_route(x_TH, arrays, spec)
    agree(oracle_moe(x_TH, arrays, spec, parallel), oracle_moe(x_TH, arrays, spec),
          difference(x_TH, routing, arrays, spec, parallel), difference(x_TH, routing, arrays, spec))


@EXAMPLES
@given(spec=specs(priorities=()), num_tokens=st.integers(1, 5), seed=SEEDS,
       outside=st.sampled_from([-7, -1, 0, 5]))
def test_ids_outside_contribute_nothing(spec: MoESpec, num_tokens: int, seed: int, outside: int) -> None:
    """An expert with weight 0, or an id that belongs to nobody with any weight: the same.

    To the bit for a single token whose ids differ; else an expert multiplies a matrix of fewer rows.
    """
    x_TH, arrays = draw_arrays(spec, num_tokens, seed)
    routing = draw_routing(spec, num_tokens, seed)
    if num_tokens == 1:
        different_E = np.random.default_rng(seed).permutation(spec.num_choices)
        routing = replace(routing, ids_TK=torch.tensor(different_E[None, :spec.top_k]))
    empty_TK = torch.tensor(np.random.default_rng(seed).random((num_tokens, spec.top_k)) < 0.5)
    stray = outside if outside < 0 else spec.num_choices + outside
    zeroed = replace(routing, weights_TK=routing.weights_TK.masked_fill(empty_TK, 0.0))
    strayed = replace(routing, ids_TK=routing.ids_TK.masked_fill(empty_TK, stray))
    zeroed_TH, strayed_TH = (oracle_moe(x_TH, arrays, spec, routing=one) for one in (zeroed, strayed))
    agree(zeroed_TH, strayed_TH, *[difference(x_TH, one, arrays, spec) for one in (zeroed, strayed)])
    if num_tokens == 1:
        assert np.array_equal(zeroed_TH, strayed_TH)


@EXAMPLES
@given(spec=specs(priorities=(), routed=True, weight_on=("output",)), num_tokens=st.integers(1, 5), seed=SEEDS)
def test_identity_experts_add_the_weighted_token(spec: MoESpec, num_tokens: int, seed: int) -> None:
    """To the bit: they come after the experts, in the order of their ids."""
    router = replace(spec.router, num_groups=1, num_groups_kept=1, num_zero_experts=2,
                     learned_scale=None, top_k=min(spec.top_k, spec.num_experts))
    spec = replace(spec, router=router, shared=None, output_bias=False)
    x_TH, arrays = draw_arrays(spec, num_tokens, seed)
    routing = draw_routing(spec, num_tokens, seed, low=-1)
    ids_TK = routing.ids_TK
    expected_TH = torch.tensor(oracle_moe(x_TH, arrays, spec, routing=replace(
        routing, ids_TK=ids_TK.masked_fill(ids_TK >= spec.num_experts, -1))))
    for e in range(spec.num_experts, spec.num_choices):
        for t, k in (ids_TK == e).nonzero().tolist():
            expected_TH[t] += routing.weights_TK[t, k] * torch.tensor(x_TH[t])
    assert np.array_equal(oracle_moe(x_TH, arrays, spec, routing=routing), expected_TH.numpy())


@EXAMPLES
@given(mlp=mlps(), num_tokens=st.integers(1, 5), seed=SEEDS)
def test_a_gated_shared_expert_is_an_expert_with_that_weight(mlp: MLP, num_tokens: int, seed: int) -> None:
    """The shared expert under a sigmoid gate, or one more routed expert that every token gets with this weight."""
    router = Router(num_experts=3, top_k=2)
    beside = MoESpec(hidden_size=4, intermediate_size=5, router=router, experts=mlp,
                     shared=SharedExpert(intermediate_size=5, mlp=mlp, gate="sigmoid"))
    x_TH, arrays = draw_arrays(beside, num_tokens, seed)
    routing = oracle_route(x_TH, arrays, beside)
    one_more = {name: np.concatenate([arrays[name], arrays["shared_" + name.replace("_E", "_", 1)][None]])
                for name in ("w13_EGIH", "w2_EHI", "w13_bias_EGI", "w2_bias_EH") if name in arrays}
    one_more["router_EH"] = np.zeros((4, 4))
    among = replace(beside, router=replace(router, num_experts=4, top_k=3), shared=None)
    appended = Routing(torch.nn.functional.pad(routing.ids_TK, (0, 1), value=3),
                       torch.cat([routing.weights_TK, routing.shared_TS], 1))
    agree(oracle_moe(x_TH, arrays, beside, routing=routing), oracle_moe(x_TH, one_more, among, routing=appended),
          difference(x_TH, routing, arrays, beside), difference(x_TH, appended, one_more, among))


@EXAMPLES
@given(spec=specs(), num_tokens=st.integers(0, 5), seed=SEEDS, tp=st.sampled_from([1, 3]))
def test_a_residual_is_added_once(spec: MoESpec, num_tokens: int, seed: int, tp: int) -> None:
    """One addition after the all-reduce, to the bit."""
    x_TH, arrays = draw_arrays(spec, num_tokens, seed)
    residual_TH = 100.0 * x_TH[::-1].copy()
    y_TH = oracle_moe(x_TH, arrays, spec, Parallel(tp=tp))
    assert np.array_equal(oracle_moe(x_TH, arrays, spec, Parallel(tp=tp), residual_TH=residual_TH),
                          y_TH + residual_TH)


@EXAMPLES
@given(spec=specs(routed=True), num_tokens=st.integers(0, 5), seed=SEEDS, factor=st.sampled_from([2.5, 0.3, 16.0]))
def test_the_scaling_factor_scales_the_weights(spec: MoESpec, num_tokens: int, seed: int, factor: float) -> None:
    """It comes last, and shared columns of the router have it too; to the bit without a learned scale."""
    plain = replace(spec, router=replace(spec.router, scaling_factor=1.0, learned_scale=None))
    scaled = replace(plain, router=replace(plain.router, scaling_factor=factor))
    x_TH, arrays = draw_arrays(plain, num_tokens, seed)
    routing = oracle_route(x_TH, arrays, plain)
    shared_TS = routing.shared_TS
    if spec.shared is not None and spec.shared.gate == "router":
        shared_TS = shared_TS * factor
    by_hand = replace(routing, weights_TK=routing.weights_TK * factor, shared_TS=shared_TS)
    assert np.array_equal(oracle_moe(x_TH, arrays, scaled), oracle_moe(x_TH, arrays, plain, routing=by_hand))


@EXAMPLES
@given(spec=specs(priorities=()), num_tokens=st.integers(2, 5), seed=SEEDS, tp=st.sampled_from([1, 2]),
       number=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_a_broken_token_stays_alone(spec: MoESpec, num_tokens: int, seed: int, tp: int, number: float) -> None:
    """NaN or infinity in one row: all others keep their bits under the same routing.

    Under its own routing the broken token may choose other experts and leave fewer rows to a product; the others
    then keep their ids, and their values within the bound.
    """
    x_TH, arrays = draw_arrays(spec, num_tokens, seed)
    broken_TH, others_T, parallel = x_TH.copy(), np.arange(num_tokens) != seed % num_tokens, Parallel(tp=tp)
    broken_TH[~others_T, 0] = number
    routing = draw_routing(spec, num_tokens, seed)
    y_TH, y_broken_TH = (oracle_moe(tokens_TH, arrays, spec, parallel, routing=routing)
                         for tokens_TH in (x_TH, broken_TH))
    assert np.array_equal(y_broken_TH[others_T], y_TH[others_T])
    choices = decided(x_TH, arrays, spec)
    ids_TK = oracle_route(broken_TH, arrays, spec).ids_TK.numpy()[others_T]
    assert ids_TK.tolist() == [choice.ids for choice, other in zip(choices, others_T, strict=True) if other]
    difference_TH = whole_difference(x_TH, choices, arrays, spec, parallel=parallel)
    y_TH, y_broken_TH = (oracle_moe(tokens_TH, arrays, spec, parallel) for tokens_TH in (x_TH, broken_TH))
    agree(y_broken_TH[others_T], y_TH[others_T], 2.0 * difference_TH[others_T])
