"""The written-out gradients against autograd through the oracle, finite differences, and their own mistakes."""

from dataclasses import replace
from typing import Literal

import pytest
import torch

import moe_ref
from moe_ref import MLP, Groups, MoESpec, MoEWeights, Parallel, Routing, run_virtual_ranks
from moe_ref.contract.comm import Comm, SoloComm
from moe_ref.oracle import expert as formula
from moe_ref.oracle.backward.layer import moe_backward
from tests.backward_bound import Named, act_majorant, bounds, excess, named, shard, value_bound
from tests.backward_cases import CASES, Inputs, decisions, draw

Mode = Literal["routed", "logits", "routing"]
UNEVEN = Parallel(tp=3, splits=(3, 1, 2))


def injected(inputs: Inputs, spec: MoESpec, mode: Mode) -> dict:
    """What is injected: nothing, logits, or the routing that the layer would choose itself."""
    if mode == "logits":
        logits_TE = torch.linspace(-2, 2, len(inputs.x_TH) * spec.num_choices, dtype=torch.float64)
        return {"logits_TE": logits_TE.roll(3)[torch.arange(len(logits_TE)) * 5 % len(logits_TE)].reshape(
            len(inputs.x_TH), -1)}
    return {"routing": moe_ref.route(inputs.x_TH, inputs.weights, spec)} if mode == "routing" else {}


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in fp64, as the start of a graph."""
    return tensor.detach().double().clone().requires_grad_()


def autograd(inputs: Inputs, spec: MoESpec, given: dict, parallel: Parallel | None, comm: Comm) -> Named:
    """Gradients by autograd through moe_ref.moe, by name; `inputs` holds this rank's shard."""
    leaves = {name: leaf(tensor) for name, tensor in inputs.weights.named_tensors()}
    weights = MoEWeights(**leaves)
    leaves |= {"x_TH": leaf(inputs.x_TH), "residual_TH": leaf(inputs.residual_TH)}
    if "logits_TE" in given:
        given = {"logits_TE": leaves.setdefault("logits_TE", leaf(given["logits_TE"]))}
    if "routing" in given:
        routing = given["routing"]
        leaves["weights_TK"] = leaf(routing.weights_TK)
        if routing.shared_TS is not None:
            leaves["shared_TS"] = leaf(routing.shared_TS)
        given = {"routing": Routing(routing.ids_TK, leaves["weights_TK"], shared_TS=leaves.get("shared_TS"))}
    y_TH = moe_ref.moe(leaves["x_TH"], weights, spec, parallel, Groups(tp=comm),
                       residual_TH=leaves["residual_TH"], **given)
    (y_TH * inputs.grad_y_TH.double()).sum().backward()
    return {name: tensor.grad for name, tensor in leaves.items()}


def compare(inputs: Inputs, spec: MoESpec, mode: Mode, parallel: Parallel | None = None) -> list[dict[str, float]]:
    """For every rank: largest difference between autograd and the formulas over its bound, by field."""
    given = injected(inputs, spec, mode)
    routing = given.get("routing") or moe_ref.route(inputs.x_TH, inputs.weights, spec, **given)
    allowed = bounds(inputs, spec, routing, given.get("logits_TE"), mode == "routing")

    def body(comm: Comm) -> dict[str, float]:
        split = parallel or Parallel()
        mine = replace(inputs, weights=inputs.weights.shard(split, comm.rank))
        expected = autograd(mine, spec, given, split, comm)
        written = moe_backward(mine.grad_y_TH, mine.x_TH, mine.weights, spec, split, Groups(tp=comm), **given)
        return excess(expected, named(written), shard(allowed, spec, split, comm.rank))

    return run_virtual_ranks(parallel.tp, body) if parallel else [body(SoloComm())]


def check(inputs: Inputs, spec: MoESpec, mode: Mode, parallel: Parallel | None = None) -> None:
    """Every gradient on every rank must be inside its bound."""
    for rank, ratios in enumerate(compare(inputs, spec, mode, parallel)):
        assert {name: ratio for name, ratio in ratios.items() if not ratio <= 1} == {}, f"rank {rank}"


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("mode", ["routed", "logits", "routing"])
@pytest.mark.parametrize("name", CASES)
def test_formulas_are_autograd(name: str, mode: Mode) -> None:
    """Two derivations of one gradient: torch's, through the forward's code, and the formulas on paper."""
    check(draw(CASES[name]), CASES[name], mode)


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("mode", ["routed", "routing"])
@pytest.mark.parametrize("name", CASES)
def test_formulas_are_autograd_on_uneven_ranks(name: str, mode: Mode) -> None:
    """Shards stay local; tokens, routing weights, router, gates and whole biases are complete on every rank."""
    check(draw(CASES[name], seed=1), CASES[name], mode, UNEVEN)


@pytest.mark.parametrize("name", CASES)
def test_parameters_in_bfloat16(name: str) -> None:
    """bf16 is converted exactly: the same formulas, and gradients that are not rounded back."""
    inputs = draw(CASES[name], seed=2, dtype=torch.bfloat16)
    check(inputs, CASES[name], "routed", Parallel(tp=1))
    written = moe_backward(inputs.grad_y_TH, inputs.x_TH, inputs.weights, CASES[name])
    assert {tensor.dtype for tensor in named(written).values() if tensor is not None} == {torch.float64}


@pytest.mark.parametrize("name", CASES)
def test_the_bounds_see_a_millionth(name: str) -> None:
    """A bound that nothing exceeds proves nothing: every gradient of every case, off by 2^-19, is outside."""
    inputs, spec = draw(CASES[name]), CASES[name]
    allowed = bounds(inputs, spec, moe_ref.route(inputs.x_TH, inputs.weights, spec))
    written = named(moe_backward(inputs.grad_y_TH, inputs.x_TH, inputs.weights, spec))
    wrong: Named = {field: None if tensor is None else tensor * (1 + 2**-19) for field, tensor in written.items()}
    parameters = [field for field in allowed if field != "selection_bias_E"]
    assert [field for field in parameters if excess(written, wrong, allowed)[field] <= 1] == []


@pytest.mark.parametrize("activation", sorted({
    (spec.experts.activation, spec.experts.sigmoid_scale, spec.experts.gate_softcap) for spec in CASES.values()}))
def test_the_majorant_of_activations(activation: tuple) -> None:
    """F' >= |f'| + |g f''| on (-16, 16), which the bound's derivation assumes of every activation in use."""
    mlp = MLP(activation=activation[0], sigmoid_scale=activation[1], gate_softcap=activation[2])
    gate = (torch.arange(-2**14, 2**14, dtype=torch.float64) / 2**10 + 2**-12).requires_grad_()
    first, = torch.autograd.grad(formula.activation(gate, mlp).sum(), gate, create_graph=True)
    second = torch.autograd.grad(first.sum(), gate)[0] if first.requires_grad else torch.zeros_like(gate)
    size = gate.detach().abs().requires_grad_()
    slope, = torch.autograd.grad(act_majorant(size, mlp).sum(), size)
    assert (slope >= first.detach().abs() + (gate * second).detach().abs()).all()


def test_the_cases_reach_what_they_are_about() -> None:
    """Drawn inputs must lie on both sides of every kink, or its rule is not in the comparison at all."""
    for name, spec in CASES.items():
        *sides, = decisions(draw(spec), spec)
        ids_TK = sides.pop(0)
        one_sided = [side for side in sides if side.numel() and side.all() == side.any()]
        assert not one_sided, name
        partly_T = (ids_TK < 0).any(-1) & (ids_TK >= 0).any(-1)
        assert (spec.router is not None and spec.router.capacity is not None) == bool(partly_T.any()), name
        assert spec.num_choices == spec.num_experts or (ids_TK >= spec.num_experts).any(), name


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str) -> None:
    """The forward is what autograd differentiates: compared with its own differences, far from kinks and ties."""
    spec = tiny(CASES[name])
    inputs = far_from_kinks(spec)
    names = [field for field, _ in inputs.weights.named_tensors() if field != "selection_bias_E"]

    def total(x_TH: torch.Tensor, residual_TH: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        weights = replace(inputs.weights, **dict(zip(names, parameters, strict=True)))
        return (moe_ref.moe(x_TH, weights, spec, residual_TH=residual_TH) * inputs.grad_y_TH).sum()

    leaves = [leaf(tensor) for tensor in (inputs.x_TH, inputs.residual_TH,
                                          *(getattr(inputs.weights, field) for field in names))]
    assert torch.autograd.gradcheck(total, leaves)


def tiny(spec: MoESpec) -> MoESpec:
    """The same mathematics at the smallest size that has all of it."""
    shared = spec.shared and replace(spec.shared, intermediate_size=2 * spec.shared.num_experts)
    return replace(spec, hidden_size=2, intermediate_size=2, shared=shared)


def far_from_kinks(spec: MoESpec) -> Inputs:
    """The first inputs whose decisions survive any change of one element by 2^-10, 1000 times gradcheck's step."""
    return next(inputs for inputs in (draw(spec, seed, num_tokens=3) for seed in range(200))
                if stable(inputs, spec, 2**-10))


def stable(inputs: Inputs, spec: MoESpec, step: float) -> bool:
    """Whether no id, drop or side of a kink changes when any one element of tokens or parameters moves so far."""
    settled = decisions(inputs, spec)
    for tensor in (inputs.x_TH, *(tensor for _, tensor in inputs.weights.named_tensors())):
        flat = tensor.view(-1)
        for index in range(flat.numel()):
            for change in (step, -step):
                before = float(flat[index])
                flat[index] = before + change
                moved = decisions(inputs, spec)
                flat[index] = before
                if not all(torch.equal(one, other) for one, other in zip(settled, moved, strict=True)):
                    return False
    return True


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("name", ["gpt-oss", "softcaps", "weight on input", "learned scale per expert",
                                  "gelu_tanh", "capacity by weight", "shared weighted by router",
                                  "identity experts"])
def test_formulas_against_differences(name: str) -> None:
    """No derivative is involved at all: two central differences, h and h / 2, along one direction per parameter.

    Their errors are c h^2 and c h^2 / 4 up to h^4, so that of the finer one is a third of what they differ by. The
    values' rounding errors r come on top: r / h in the coarse one, 2 r / h in the fine one, which is there twice.
    """
    spec, step = tiny(CASES[name]), 2**-12
    inputs = far_from_kinks(spec)
    rounding = value_bound(inputs, spec, moe_ref.route(inputs.x_TH, inputs.weights, spec))
    written = named(moe_backward(inputs.grad_y_TH, inputs.x_TH, inputs.weights, spec))
    assert len(written) >= 4
    for field, tensor in [("x_TH", inputs.x_TH), *inputs.weights.named_tensors()]:
        direction = torch.linspace(-1, 1, tensor.numel() + 1, dtype=torch.float64)[:-1].reshape(tensor.shape)
        coarse, fine = (slope_along(inputs, spec, field, direction, size) for size in (step, step / 2))
        gradient = written.get(field)
        along = 0.0 if gradient is None else float((gradient * direction).sum())
        assert abs(fine - along) <= abs(coarse - fine) + 5 * rounding / step, field


def slope_along(inputs: Inputs, spec: MoESpec, field: str, direction: torch.Tensor, step: float) -> float:
    """(f(p + step d) - f(p - step d)) / (2 step) of f = sum(grad_y * moe), no decision changed on the way."""
    values = []
    for sign in (step, -step):
        moved = (replace(inputs, x_TH=inputs.x_TH + sign * direction) if field == "x_TH" else replace(
            inputs, weights=replace(inputs.weights, **{field: getattr(inputs.weights, field) + sign * direction})))
        assert all(map(torch.equal, decisions(moved, spec), decisions(inputs, spec)))
        values.append(float((moe_ref.moe(moved.x_TH, moved.weights, spec) * inputs.grad_y_TH).sum()))
    return (values[0] - values[1]) / (2 * step)
