"""Gradients of the fast layer against the written-out formulas in fp64, inside a bound that counts its roundings.

The majorant's gradient of tests.backward_bound times the relative error of one evaluation: n roundings to fp32
along a path, and in bf16 at most five more to bf16: of grad_gate_up, of a row of x, of the sum of rows over slots,
and of the two sums with what comes through the router and the shared gate. Other paths have fewer. The majorant of
a routing weight is coarse, so what goes through the router is judged more closely by operator in
tests.test_operators, and here by bits: the layer's gradients are the operators', chained.
"""

from dataclasses import replace
from itertools import permutations
from typing import Literal

import pytest
import torch

import moe_fast
import moe_ref
from moe_fast.capabilities import CAPABILITIES
from moe_ref import MLP, Groups, MoESpec, MoEWeights, Parallel, Router, Routing, SharedExpert, run_virtual_ranks
from moe_ref.contract.comm import Comm, CountingComm, SoloComm
from moe_ref.contract.vocabulary import Storage
from moe_ref.inputs.storage import empty_stored
from moe_ref.oracle.backward.layer import moe_backward
from tests import backward_bound, backward_cases
from tests.backward_bound import Named, bounds, excess, named, shard
from tests.backward_cases import SHARED, SIGMOID, SOFTMAX, Inputs, draw, layer, router

Mode = Literal["routed", "logits", "routing"]
CASES = {name: spec for name, spec in backward_cases.CASES.items() if not CAPABILITIES.refused_mathematics(spec)} | {
    "gelu": layer(experts=MLP(activation="gelu")),
    "gelu_tanh": layer(experts=MLP(activation="gelu_tanh")),
    "groups by maximum": router(SOFTMAX, num_groups=3, num_groups_kept=2, renormalize=True),
    "everything": layer(Router(**(vars(SIGMOID) | {"num_groups": 2, "selection_bias": "score", "scaling_factor": 2.5})),
                        experts=MLP(activation="gelu"),
                        shared=SharedExpert(intermediate_size=8, gate="sigmoid", mlp=MLP(activation="gelu_tanh"))),
    "every bias": layer(SIGMOID, output_bias=True,
                        experts=MLP(bias=True, limit=0.75, sigmoid_scale=1.702, up_offset=1.0),
                        shared=SharedExpert(intermediate_size=8, gate="sigmoid", merge="mean", mlp=MLP(bias=True))),
    "one choice": layer(Router(num_experts=6, top_k=1)),
    "every choice": layer(Router(num_experts=6, top_k=6, renormalize=True), shared=SHARED),
}
UNEVEN = Parallel(tp=3, splits=(3, 1, 2))


def inputs_of(name: str, dtype: torch.dtype = torch.float32) -> Inputs:
    """The inputs of a case, as each test draws them."""
    return draw(CASES[name], dtype=dtype)


def gradients(inputs: Inputs, spec: MoESpec, given: dict | None = None, parallel: Parallel | None = None,
              comm: Comm | None = None) -> Named:
    """Gradients by autograd through moe_fast.moe, by name; inputs: with this rank's shard, given: what is injected."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.weights.named_tensors()}
    weights = MoEWeights(**leaves)
    given = {name: value.detach().requires_grad_() if isinstance(value, torch.Tensor) else value
             for name, value in (given or {}).items()}
    leaves |= {name: getattr(inputs, name).detach().requires_grad_() for name in ("x_TH", "residual_TH")}
    if "logits_TE" in given:
        leaves["logits_TE"] = given["logits_TE"]
    if "routing" in given:
        routing = given["routing"]
        leaves |= {field: getattr(routing, field).detach().requires_grad_() for field in ("weights_TK", "shared_TS")
                   if getattr(routing, field) is not None}
        given["routing"] = Routing(routing.ids_TK, leaves["weights_TK"], shared_TS=leaves.get("shared_TS"))
    y_TH = moe_fast.moe(leaves["x_TH"], weights, spec, parallel, Groups(tp=comm or SoloComm()),
                        residual_TH=leaves["residual_TH"], **given)
    y_TH.backward(inputs.grad_y_TH)
    assert all(tensor.grad is None or tensor.grad.dtype == tensor.dtype for tensor in leaves.values())
    return {name: tensor.grad for name, tensor in leaves.items()}


def injected(inputs: Inputs, spec: MoESpec, mode: Mode) -> dict:
    """What is injected: nothing, logits, or the routing that the layer would choose itself, in fp32."""
    if mode == "logits":
        logits_TE = torch.linspace(-2, 2, len(inputs.x_TH) * spec.num_choices)
        return {"logits_TE": logits_TE[torch.arange(len(logits_TE)) * 5 % len(logits_TE)].reshape(len(inputs.x_TH), -1)}
    return {"routing": moe_fast.route(inputs.x_TH, inputs.weights, spec)} if mode == "routing" else {}


def allowed(inputs: Inputs, spec: MoESpec, routing: Routing, given: dict) -> Named:
    """Bound on the error of one evaluation in the inputs' dtype, unsharded."""
    fp64 = bounds(inputs, spec, routing, given.get("logits_TE"), "routing" in given)
    relative = num_roundings(spec, len(inputs.x_TH)) * 2**-24
    relative += 5 * 2**-8 if inputs.x_TH.dtype == torch.bfloat16 else 0.0
    in_fp64 = 2 * backward_bound.num_roundings(spec, len(inputs.x_TH)) * 2**-53
    return {name: None if bound is None else bound / in_fp64 * relative / (1 - relative)
            for name, bound in fp64.items()}


def num_roundings(spec: MoESpec, num_tokens: int) -> int:
    """n of the module's docstring: at most three sums over H along a path (logits, gate or up, back through w2).

    Two over I (back through w13, which has gate and up), two over scores and two over slots (forward and backward),
    one over an expert's rows; and some 30 elementwise steps, of at most two ulp in the mean.
    """
    columns = spec.intermediate_size + (spec.shared.intermediate_size if spec.shared else 0)
    return (3 * spec.hidden_size + 2 * columns + 2 * (spec.num_choices + spec.top_k) + num_tokens * spec.top_k + 128)


def check(name: str, mode: Mode, dtype: torch.dtype = torch.float32, parallel: Parallel | None = None) -> None:
    """Every gradient on every rank must be inside its bound."""
    inputs, spec = inputs_of(name, dtype), CASES[name]
    given = injected(inputs, spec, mode)
    routing = moe_ref.route(inputs.x_TH, inputs.weights, spec, logits_TE=given.get("logits_TE"))
    chosen = moe_fast.route(inputs.x_TH, inputs.weights, spec, logits_TE=given.get("logits_TE"))
    assert torch.equal(chosen.ids_TK, routing.ids_TK), "a choice within rounding: draw other inputs"
    bound = allowed(inputs, spec, given.get("routing", routing), given)

    def body(comm: Comm) -> dict[str, float]:
        split = parallel or Parallel()
        mine = replace(inputs, weights=inputs.weights.shard(split, comm.rank))
        truth = moe_backward(mine.grad_y_TH, mine.x_TH, mine.weights, spec, split, Groups(tp=comm), **given)
        return excess(named(truth), gradients(mine, spec, given, split, comm), shard(bound, spec, split, comm.rank))

    for rank, ratios in enumerate(run_virtual_ranks(parallel.tp, body) if parallel else [body(SoloComm())]):
        assert {field: ratio for field, ratio in ratios.items() if not ratio <= 1} == {}, f"rank {rank}"


@pytest.mark.sampled(every=3, each="name")
@pytest.mark.parametrize("mode", ["routed", "logits", "routing"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_in_fp32(name: str, mode: Mode) -> None:
    """Every activation, score and router option; with its own routing, and with what replaces it as a leaf."""
    if CASES[name].router is None and mode == "logits":
        mode = "routed"  # without a router there are no logits
    check(name, mode)


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize("name", CASES)
def test_gradients_in_bf16(name: str) -> None:
    """Rows between the products are rounded to bf16, sums are not."""
    check(name, "routed", torch.bfloat16)


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("mode", ["routed", "routing"])
@pytest.mark.parametrize("name", ["everything", "softmax", "dense, gated shared", "every bias", "weight on input",
                                  "shared mean", "relu_squared, not gated"])
def test_gradients_on_uneven_ranks(name: str, mode: Mode) -> None:
    """Shards' gradients stay local; tokens, routing weights, router and gates are complete on every rank."""
    check(name, mode, parallel=UNEVEN)


@pytest.mark.parametrize("name", CASES)
def test_the_bounds_see_half_a_percent(name: str) -> None:
    """A bound that nothing exceeds proves nothing: with the routing given, fp32 gradients off by 2^-8 are outside."""
    inputs, spec = inputs_of(name), CASES[name]
    given = injected(inputs, spec, "routing")
    bound = allowed(inputs, spec, given["routing"], given)
    truth = named(moe_backward(inputs.grad_y_TH, inputs.x_TH, inputs.weights, spec, **given))
    wrong: Named = {field: None if tensor is None else tensor * (1 + 2**-8) for field, tensor in truth.items()}
    ratios = excess(truth, wrong, bound)
    unreached = {"selection_bias_E", "router_EH", "router_bias_E", "weight_scale_E", "shared_gate_SH"}
    assert [field for field in bound if field not in unreached and ratios[field] <= 1] == []


def sparse(*shape: int, seed: int) -> torch.Tensor:
    """-1, 0 and 1, seven eighths of them 0."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1
    return signs * (torch.rand(shape, generator=generator) < 0.125)


def probe(num_experts: int, intermediate: int, hidden: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """w13_EGIH whose gates are 256 or 512 where first and last element of x are 1, and w2_EHI of -1, 0 and 1."""
    w13_EGIH = sparse(num_experts, 2, intermediate, hidden, seed=seed)
    w13_EGIH[:, 0] = 0
    w13_EGIH[:, 0, :, 0], w13_EGIH[:, 0, :, -1] = 128, 128
    w13_EGIH[:, 0, ::2, 0] = 384
    return w13_EGIH, sparse(num_experts, hidden, intermediate, seed=seed + 1)


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("hidden", "intermediate"), [(65, 129), (257, 66)])
def test_exact_sums_over_many_tiles(hidden: int, intermediate: int, dtype: torch.dtype) -> None:
    """silu(256) and silu(512) are 256 and 512 in fp32, with slope 1; all else is powers of two and small integers.

    So every row is exact in every dtype, every sum exact in fp32 in any order, and gradients are the truth, rounded
    once (those of x three times, so they are compared in fp32). Blocks of rows, tiles and their rests are crossed.
    """
    x_TH, grad_TH = sparse(101, hidden, seed=1), sparse(101, hidden, seed=2) / 256
    x_TH[:, 0], x_TH[:, -1] = 1, 1
    w13_EGIH, w2_EHI = probe(3, intermediate, hidden, seed=3)
    shared_w13_EGIH, shared_w2_EHI = probe(1, 66, hidden, seed=5)
    for w13_GIH, w2_HI in zip((*w13_EGIH, *shared_w13_EGIH), (*w2_EHI, *shared_w2_EHI), strict=True):
        up_TI, grad_act_TI = x_TH @ w13_GIH[1].T, grad_TH @ w2_HI
        assert torch.equal((up_TI * grad_act_TI).bfloat16().float(), up_TI * grad_act_TI), "rows are not exact"
    spec = MoESpec(hidden_size=hidden, intermediate_size=intermediate, router=Router(num_experts=3, top_k=2),
                   shared=SharedExpert(intermediate_size=66, gate="sigmoid"))
    weights = MoEWeights(w13_EGIH=w13_EGIH.to(dtype), w2_EHI=w2_EHI.to(dtype), router_EH=x_TH[:3].to(dtype),
                         shared_w13_GIH=shared_w13_EGIH[0].to(dtype), shared_w2_HI=shared_w2_EHI[0].to(dtype),
                         shared_gate_SH=x_TH[:1].to(dtype))
    inputs = Inputs(x_TH.to(dtype), weights, grad_TH.to(dtype), x_TH.to(dtype))
    ids_TK = torch.tensor([[0, 2], [0, 1], [2, 0]]).repeat(34, 1)[:101]
    routing = Routing(ids_TK, torch.tensor([0.5, 2.0]).expand(101, 2), shared_TS=torch.full((101, 1), 0.25))
    found = gradients(inputs, spec, {"routing": routing})
    truth = named(moe_backward(inputs.grad_y_TH, inputs.x_TH, weights, spec, routing=routing))
    compared = {"w13_EGIH", "w2_EHI", "shared_w13_GIH", "shared_w2_HI", "weights_TK", "shared_TS"}
    for name in compared | ({"x_TH"} if dtype == torch.float32 else set()):
        assert torch.equal(found[name], truth[name].to(found[name].dtype)), name
        assert found[name].any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_chains_its_operators(dtype: torch.dtype) -> None:
    """Bit by bit what the operators' backwards return, each fed by the one after it: nothing is lost between them."""
    inputs, spec, ops = inputs_of("everything", dtype), CASES["everything"], torch.ops.moe_fast
    weights, router, x_TH = inputs.weights, CASES["everything"].router, inputs.x_TH
    routing = moe_fast.route(x_TH, weights, spec)
    of_x_TH, of_weights_TK, w13_EGIH, w2_EHI, shared_w13_GIH, shared_w2_HI, of_gate_T1, *_ = ops.experts_backward(
        inputs.grad_y_TH, x_TH, routing.ids_TK, routing.weights_TK, torch.arange(6), weights.w13_EGIH, weights.w2_EHI,
        weights.shared_w13_GIH, weights.shared_w2_HI, routing.shared_TS, "gelu", "gelu_tanh")
    of_logits_TE, *_ = ops.select_backward(of_weights_TK, None, routing.logits_TE, None, None, routing.ids_TK,
                                           "sigmoid", 1.0, 0.0, True, router.renormalize_epsilon, "add", 2.5, None)
    router_x_TH, router_EH, _ = ops.router_logits_backward(of_logits_TE, x_TH, weights.router_EH, None)
    gate_logits_T1 = ops.router_logits(x_TH, weights.shared_gate_SH, None)
    of_logits_T1, *_ = ops.select_backward(of_gate_T1, None, gate_logits_T1, None, None,
                                           torch.zeros(6, 1, dtype=torch.int32), "sigmoid", 1.0, 0.0, False, 0.0, "add",
                                           1.0, None)
    gate_x_TH, shared_gate_SH, _ = ops.router_logits_backward(of_logits_T1, x_TH, weights.shared_gate_SH, None)
    found = gradients(inputs, spec)
    chained = {"w13_EGIH": w13_EGIH, "w2_EHI": w2_EHI, "shared_w13_GIH": shared_w13_GIH, "shared_w2_HI": shared_w2_HI,
               "router_EH": router_EH, "shared_gate_SH": shared_gate_SH, "residual_TH": inputs.grad_y_TH}
    assert [name for name, tensor in chained.items() if not torch.equal(tensor, found[name])] == []
    parts = (of_x_TH, router_x_TH, gate_x_TH)
    assert any(torch.equal(one + two + three, found["x_TH"]) for one, two, three in permutations(parts))


def test_collectives_of_the_backward_pass() -> None:
    """One all-reduce forward; backward one each for tokens, routing weights and gates: T*(H + K + S) elements."""
    inputs, spec = inputs_of("everything"), CASES["everything"]

    def body(comm: Comm) -> list[tuple[str, int]]:
        counting = CountingComm(comm)
        mine = replace(inputs, weights=inputs.weights.shard(UNEVEN, comm.rank))
        gradients(mine, spec, None, UNEVEN, counting)
        return [(call.operation, call.num_elements) for call in counting.calls]

    for forward, *backward in run_virtual_ranks(UNEVEN.tp, body):
        assert forward == ("all_reduce", 6 * 5)
        assert backward == [("all_reduce", 6 * 5), ("all_reduce", 6 * 3), ("all_reduce", 6)]


def test_a_partial_sum_has_the_gradients_of_the_whole() -> None:
    """reduce=False: whoever adds the ranks' results up hands every rank the gradient of the sum."""
    inputs, spec = inputs_of("everything"), CASES["everything"]

    def body(comm: Comm) -> tuple[torch.Tensor, torch.Tensor]:
        weights, found = inputs.weights.shard(UNEVEN, comm.rank), []
        routing = moe_fast.route(inputs.x_TH, weights, spec)
        for reduce in (True, False):
            x_TH = inputs.x_TH.clone().requires_grad_()
            y_TH = moe_fast.experts(x_TH, routing, weights, spec, UNEVEN, Groups(tp=comm), reduce=reduce)
            y_TH.backward(inputs.grad_y_TH)
            found.append(x_TH.grad)
        return found[0], found[1]

    for whole, partial in run_virtual_ranks(UNEVEN.tp, body):
        assert torch.equal(whole, partial)


def spread(inputs: Inputs, ids: list[int]) -> Routing:
    """Every token goes to the experts `ids`, in turn by one place; weights 1, 2, 3 quarters."""
    ids_TK = torch.tensor([ids[place % 3:] + ids[:place % 3] for place in range(len(inputs.x_TH))])
    return Routing(ids_TK, torch.tensor([0.25, 0.5, 0.75]).expand(len(inputs.x_TH), 3).clone())


@pytest.mark.parametrize("ids", [[0, 2, 5], [4, -1, 6], [-1, 2**32 + 1, -2**31]],
                         ids=["three of six", "one, and no experts", "no experts"])
def test_experts_without_rows(ids: list[int]) -> None:
    """Exactly zero: optimisers tell an unused expert by that; ids of no expert give their weights exactly zero."""
    inputs, spec = inputs_of("softmax"), CASES["softmax"]
    routing = spread(inputs, ids)
    found = gradients(inputs, spec, {"routing": routing})
    used = {e for e in ids if 0 <= e < 6}
    for name in ("w13_EGIH", "w2_EHI"):
        assert {e for e in range(6) if found[name][e].any()} == used
    assert torch.equal(found["weights_TK"] != 0, (routing.ids_TK >= 0) & (routing.ids_TK < 6))
    assert bool(found["x_TH"].any()) == bool(used)


@pytest.mark.sampled(every=2, each="storage")
@pytest.mark.parametrize("name", ["everything", "every bias"])
@pytest.mark.parametrize("storage", [one for one in Storage if one is not Storage.OUT_IN])
def test_weights_in_another_order_in_memory(storage: Storage, name: str) -> None:
    """Strided views are read where they lie: the same bits, and gradients in the order of their parameters.

    Gradients of parts of larger tensors are dense.
    """
    inputs, spec = inputs_of(name), CASES[name]
    stored = {name: empty_stored(name, tuple(tensor.shape), storage, dtype=tensor.dtype, device="cpu").copy_(tensor)
              for name, tensor in inputs.weights.named_tensors()}
    assert not all(tensor.is_contiguous() for tensor in stored.values())
    plain = gradients(inputs, spec)
    strided = gradients(replace(inputs, weights=MoEWeights(**stored)), spec)
    for field, tensor in stored.items():
        assert (plain[field] is None) == (strided[field] is None)
        if plain[field] is not None:
            assert torch.equal(plain[field], strided[field]), field
            assert storage is Storage.PADDED or strided[field].stride() == tensor.stride(), field
    assert torch.equal(plain["x_TH"], strided["x_TH"])


@pytest.mark.parametrize("name", ["everything", "every bias"])
def test_no_element_of_scratch_memory_reaches_a_gradient(name: str) -> None:
    """Fresh memory is NaN here, and some rows have no expert: the same bits as without, twice."""
    inputs, spec = inputs_of(name), CASES[name]
    routing = replace(spread(inputs, [0, -1, 5]), shared_TS=torch.full((6, 1), 0.5))
    first, again = (gradients(inputs, spec, {"routing": routing}) for _ in range(2))
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan().all()
        filled = gradients(inputs, spec, {"routing": routing})
    finally:
        torch.use_deterministic_algorithms(False)
    for field, tensor in first.items():
        if tensor is not None:
            assert torch.equal(tensor, again[field])
            assert torch.equal(tensor, filled[field])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_router_in_fp32_beside_other_tokens(dtype: torch.dtype) -> None:
    """Checkpoints keep routers precise: logits are those of the same numbers in fp32, gradients keep both dtypes."""
    inputs, spec = inputs_of("softmax", dtype), CASES["softmax"]
    weights = replace(inputs.weights, router_EH=inputs.weights.router_EH.float() + 2**-12)
    logits_TE = moe_fast.route(inputs.x_TH, weights, spec).logits_TE
    wide = replace(weights, w13_EGIH=weights.w13_EGIH.float(), w2_EHI=weights.w2_EHI.float())
    assert torch.equal(logits_TE, moe_fast.route(inputs.x_TH.float(), wide, spec).logits_TE)
    found = gradients(replace(inputs, weights=weights), spec)
    assert found["router_EH"].any()


def test_a_module_trains() -> None:
    """Plain gradient descent on the module's parameters lowers the loss at every step."""
    inputs, spec = inputs_of("everything"), CASES["everything"]
    module = moe_fast.MoELayer(spec)
    module.load_weights(inputs.weights)
    optimizer = torch.optim.SGD(module.parameters(), lr=2**-5)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (module(inputs.x_TH) - inputs.grad_y_TH).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
