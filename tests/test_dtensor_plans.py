"""The layer on DTensors by parallelize_module: outputs, gradients and collectives."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import moe_fast
from moe_fast import fp8_training
from moe_ref import MoEWeights
from tests.dtensor_cases import CASES, Problem, digest, loaded, parallel, problem, warm_up
from tests.gloo_ranks import run_gloo_ranks


@pytest.fixture(autouse=True, scope="module")
def _warm() -> None:
    warm_up()


def short(counts: dict) -> dict[str, int]:
    """Collectives by name."""
    return {str(operator).rpartition(".")[2]: count for operator, count in counts.items()}


def trained(given: Problem, plan: str, shape: tuple[int, ...], layout: str) -> dict[str, Any]:
    """One forward and backward pass of a layer under a plan; layout: placement of x_TH and of the output, as "R S"."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    entry, leave = ({"R": Replicate(), "S": Shard(0)}[word] for word in layout.split())
    layer = parallel(loaded(given), plan, shape, input_layouts=entry, output_layouts=leave, use_local_output=False)
    mesh = layer.w13_EGIH.device_mesh
    x_TH = distribute_tensor(given.inputs.x_TH, mesh, [entry] * mesh.ndim).requires_grad_()
    grad_TH = distribute_tensor(given.inputs.grad_y_TH, mesh, [leave] * mesh.ndim)
    with CommDebugMode() as forward:
        y_TH = layer(x_TH)
    with CommDebugMode() as backward:
        y_TH.backward(grad_TH)
    leaves = {"x_TH": x_TH, **dict(layer.named_parameters())}
    assert y_TH.placements == (leave,) * mesh.ndim
    for name, leaf in leaves.items():
        assert leaf.grad.placements == leaf.placements, name
    whole = {"y_TH": y_TH.full_tensor().detach(), **{name: leaf.grad.full_tensor() for name, leaf in leaves.items()}}
    return {"excess": given.excess(whole), "bits": {name: digest(tensor) for name, tensor in whole.items()},
            "forward": short(forward.get_comm_counts()), "backward": short(backward.get_comm_counts())}


def expected(given: Problem, dims: int, layout: str) -> tuple[dict[str, int], dict[str, int]]:
    """The collectives of one pass, each once per mesh dimension.

    Forward, the output is summed by one of them. Backward, the gradients that ranks have in parts are summed: of x_TH,
    of the routing weights and of the shared gate. Sharded tokens are gathered with their ids, weights and gate; then
    each rank has a part of the gradients of the router and of the shared gate's weights.
    """
    entry, leave = layout.split()
    routed, gated = given.spec.router is not None, given.spec.shared is not None and given.spec.shared.gate == "sigmoid"
    forward = {"all_reduce" if leave == "R" else "reduce_scatter_tensor": dims}
    parts = dims * (1 + routed + gated)
    if entry == "R":
        backward = {"all_reduce": parts}
    else:
        forward["all_gather_into_tensor"] = dims * (3 + gated)
        backward = {"reduce_scatter_tensor": parts} | ({"all_reduce": dims * (routed + gated)} if routed else {})
    return forward, backward | ({"all_gather_into_tensor": dims} if leave == "S" else {})


def check(plan: str, shape: tuple[int, ...], names: list[str], layouts: list[str]) -> None:
    """Every case in every layout, on one set of ranks."""
    problems = {name: problem(name) for name in names}
    size = torch.Size(shape).numel()

    def body(rank: int) -> list:
        return [(name, layout, trained(problems[name], plan, shape, layout)) for name in names for layout in layouts]

    for results in zip(*run_gloo_ranks(size, body), strict=True):
        name, layout, first = results[0]
        for _, _, result in results:
            assert {field: ratio for field, ratio in result["excess"].items() if not ratio <= 1} == {}, (name, layout)
            assert result["bits"] == first["bits"], f"ranks differ: {name}, {layout}"
            assert (result["forward"], result["backward"]) == expected(problems[name], len(shape), layout)


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize(("size", "layouts"), [(2, ["R R", "S S", "R S", "S R"]), (3, ["R R", "S S"]),
                                               (4, ["R R", "S S"])])
def test_tensor_parallel(size: int, layouts: list[str]) -> None:
    """I = 35 over 2, 3 and 4 ranks, tokens replicated or sharded (sequence parallel), 11 over all of them."""
    check("MoETensorParallel", (size,), ["gated shared"], layouts)


def test_fewer_tokens_than_ranks() -> None:
    """2 tokens over 3 ranks: what cannot be sharded is gathered, and gradients still come back as x_TH is placed."""
    given = problem("gated shared", num_tokens=2)
    for result in run_gloo_ranks(3, lambda rank: trained(given, "MoETensorParallel", (3,), "S S")):
        assert {field: ratio for field, ratio in result["excess"].items() if not ratio <= 1} == {}


def test_tensor_parallel_options() -> None:
    """Router options, an ungated shared expert, no shared expert, no router: other collectives, same rules."""
    check("MoETensorParallel", (2,), ["plain", "groups, bias, shared", "dense", "weight on input"], ["R R", "S S"])


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize(("plan", "shape"), [("MoETensorParallel", (3,)), ("MoEExpertParallel", (3,)),
                                             ("MoETensorExpertParallel", (2, 2))])
def test_biases_count_once(plan: str, shape: tuple[int, ...]) -> None:
    """What every rank holds whole comes into the sum of their parts once, and needs no collective of its own."""
    check(plan, shape, ["every bias"], ["R R", "S S"])


def test_training_in_8_bits_is_the_same_layer() -> None:
    """A plan puts its own function in place of the module's: the same bits on a mesh of one rank, and no others."""
    given = problem("gated shared")

    def body(rank: int) -> list[list[bytes]]:
        results = []
        for kind, plan in ((fp8_training, None), (fp8_training, "MoETensorParallel"), (moe_fast, None)):
            layer = kind.MoELayer(given.spec)
            layer.load_weights(given.inputs.weights)
            if plan is not None:
                layer = parallel(layer, plan, (1,), use_local_output=True)
            y_TH = layer(given.inputs.x_TH)
            y_TH.backward(given.inputs.grad_y_TH)
            gradients = (layer.w13_EGIH.grad, layer.w2_EHI.grad)
            found = [y_TH.detach(), *(one.to_local() if plan else one for one in gradients)]
            results.append([digest(one) for one in found])
        return results

    (plain, spread, exact), = run_gloo_ranks(1, body)
    assert spread == plain
    assert not set(exact) & set(plain)


def test_a_bias_that_every_rank_adds_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above fail where parts of a bias are the bias itself."""
    from moe_fast.distributed import parts

    given = problem("every bias")
    monkeypatch.setattr(parts, "torch", SimpleNamespace(zeros_like=lambda tensor: tensor))
    for result in run_gloo_ranks(2, lambda rank: trained(given, "MoETensorParallel", (2,), "R R")):
        assert result["excess"]["y_TH"] > 1


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("size", [2, 3])
def test_expert_parallel(size: int) -> None:
    """5 experts over 2 and 3 ranks: each computes the slots of its own; the shared expert counts once."""
    check("MoEExpertParallel", (size,), ["gated shared", "plain"], ["R R", "S S"])


@pytest.mark.nightly("each of the two alone runs by default")
def test_tensor_and_expert_parallel() -> None:
    """Partial along both dimensions; the shared expert's 17 columns are cut twice, 9 and 8 and then halves of these."""
    check("MoETensorExpertParallel", (2, 2), ["gated shared", "groups, bias, shared"], ["R R", "S S"])


@pytest.mark.parametrize("name", CASES)
def test_the_bounds_see_a_quarter(name: str) -> None:
    """A bound that nothing exceeds proves nothing: an output or a gradient that is off by a quarter is outside."""
    given = problem(name)
    judged = [field for field, bound in given.bound.items() if bound is not None and bound.any()]
    off = {field: given.truth[field] * 1.25 for field in judged}
    assert set(judged) >= {"y_TH", "x_TH", "w13_EGIH", "w2_EHI"}
    assert {field: ratio for field, ratio in given.excess(off).items() if ratio <= 1} == {}


def test_a_wrong_rule_is_seen() -> None:
    """The checks above fail where the router's gradients, each of other tokens, are declared to be the whole."""
    given = problem("gated shared")

    def body(rank: int) -> dict[str, float]:
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.experimental import register_sharding

        from moe_fast.distributed.rules import RULES

        operator = torch.ops.moe_fast.router_logits_backward.default

        def wrong(*values: object) -> list:
            replicated, tokens = RULES[operator](*values)
            tokens[0][1] = Replicate()
            return [replicated, tokens]

        register_sharding(operator)(wrong)
        return trained(given, "MoETensorParallel", (2,), "S S")["excess"]

    for ratios in run_gloo_ranks(2, body):
        assert {name for name, ratio in ratios.items() if not ratio <= 1} == {"router_EH", "shared_gate_SH"}


def test_weights_stay_dtensors_above_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A to_local of a weight would hide it from the rules: only the result passes it, if a local one is asked for."""
    given = problem("gated shared")

    def body(rank: int) -> list[list[torch.Size]]:
        from torch.distributed.tensor import DTensor

        shapes: list[torch.Size] = []
        to_local = DTensor.to_local

        def recorded(tensor: Any, **options: Any) -> torch.Tensor:
            shapes.append(tensor.shape)
            return to_local(tensor, **options)

        monkeypatch.setattr(DTensor, "to_local", recorded)
        parallel(loaded(given), "MoETensorParallel", (2,), use_local_output=False)(given.inputs.x_TH).sum().backward()
        without = list(shapes)
        parallel(loaded(given), "MoETensorParallel", (2,))(given.inputs.x_TH).sum().backward()
        return [without, shapes]

    assert run_gloo_ranks(2, body) == [[[], [given.inputs.x_TH.shape]]] * 2


def test_local_tensors_in_and_out() -> None:
    """The default: every rank passes the whole x_TH and residual and gets the whole sum, gradients included."""
    given = problem("plain")
    summed = given.truth["y_TH"] + given.inputs.residual_TH
    allowed = given.bound["y_TH"] + 2**-24 * (summed.abs() + given.bound["y_TH"])  # one sum more

    def body(rank: int) -> tuple[bool, float, bool]:
        layer = parallel(loaded(given), "MoETensorParallel", (2,))
        x_TH, residual_TH = given.inputs.x_TH.requires_grad_(), given.inputs.residual_TH.requires_grad_()
        y_TH = layer(x_TH, residual_TH)
        y_TH.backward(given.inputs.grad_y_TH)
        inside = bool(((y_TH.detach() - summed).abs() <= allowed).all())
        return inside, given.excess({"x_TH": x_TH.grad})["x_TH"], torch.equal(residual_TH.grad, given.inputs.grad_y_TH)

    for inside, ratio, residual in run_gloo_ranks(2, body):
        assert inside
        assert ratio <= 1
        assert residual


def test_data_parallel_dimension() -> None:
    """Parameters replicated along dp, tokens sharded: their gradients are summed over dp, not averaged."""
    given = problem("gated shared", num_tokens=9)

    def body(rank: int) -> dict:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        from moe_fast.distributed import Role, moe_dtensor
        from moe_fast.distributed.roles import of_tensor

        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        leaves = {name: distribute_tensor(tensor, mesh, [Replicate(), of_tensor(name, Role.COLUMNS)]).requires_grad_()
                  for name, tensor in given.inputs.weights.named_tensors()}
        x_TH, grad_TH = (distribute_tensor(tensor, mesh, [Shard(0), Replicate()])
                         for tensor in (given.inputs.x_TH, given.inputs.grad_y_TH))
        y_TH = moe_dtensor(x_TH.requires_grad_(), MoEWeights(**leaves), given.spec)
        y_TH.backward(grad_TH)
        assert all(leaf.grad.placements == leaf.placements for leaf in leaves.values())
        return given.excess({"y_TH": y_TH.full_tensor().detach(), "x_TH": x_TH.grad.full_tensor(),
                             **{name: leaf.grad.full_tensor() for name, leaf in leaves.items()}})

    for ratios in run_gloo_ranks(4, body):
        assert {name: ratio for name, ratio in ratios.items() if not ratio <= 1} == {}


def test_importing_moe_fast_stays_cheap() -> None:
    """torch.distributed.tensor takes seconds to load, which only its users should pay."""
    script = "import sys, moe_fast; print([name for name in sys.modules if name.startswith(" \
             "('torch.distributed.tensor', 'moe_fast.distributed'))])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
