"""The written-out gradients beyond autograd: empty slots, edges, streaming, collectives, and wrong formulas."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import moe_ref
from moe_ref import (
    Capacity,
    CountingComm,
    ExpertWeights,
    Groups,
    MoESpec,
    MoEWeights,
    Parallel,
    Routing,
    WeightSource,
)
from moe_ref.contract.comm import Comm
from moe_ref.contract.errors import UsageTypeError, UsageValueError
from moe_ref.contract.gradients import ExpertGradients
from moe_ref.contract.spec import MLP, Router
from moe_ref.oracle import expert as formula
from moe_ref.oracle.backward import layer as backward
from moe_ref.oracle.backward import mlp as backward_expert
from moe_ref.oracle.backward import router as backward_router
from moe_ref.oracle.backward import weights as backward_weights
from moe_ref.oracle.backward.layer import experts_backward, moe_backward
from moe_ref.oracle.backward.router import route_backward
from tests.backward_bound import named
from tests.backward_cases import CASES, draw, layer
from tests.test_backward import UNEVEN, compare

IDENTITY = CASES["identity experts"]
EXPERT_FIELDS = ("w13_EGIH", "w2_EHI", "w13_bias_EGI", "w2_bias_EH")


def test_ids_of_no_expert_get_exactly_zero() -> None:
    """Slots of id -1, or of one out of range, even with a NaN weight, leave no trace in any gradient."""
    inputs = draw(IDENTITY)
    routing = moe_ref.route(inputs.x_TH, inputs.weights, IDENTITY)
    ids_TK, weights_TK = routing.ids_TK % 2, routing.weights_TK.clone()
    empty_TK = torch.zeros_like(ids_TK, dtype=torch.bool)
    for token, slot, no_expert in [(0, 0, -1), (0, 1, -7), (0, 2, 9), (3, 1, 2**40), (4, 0, -2**40)]:
        ids_TK[token, slot], weights_TK[token, slot], empty_TK[token, slot] = no_expert, float("nan"), True
    written = experts_backward(inputs.grad_y_TH, inputs.x_TH, Routing(ids_TK, weights_TK), inputs.weights,
                               IDENTITY)
    assert (written.weights_TK[empty_TK] == 0).all()
    assert (written.weights_TK[~empty_TK] != 0).all()
    assert (written.x_TH[0] == 0).all()  # token 0 has no expert left
    assert (written.x_TH[1:] != 0).all()
    assert written.w13_EGIH is not None
    assert written.w2_EHI is not None
    assert not written.w13_EGIH[2:].any()  # ids above 1 were never used
    assert all(tensor.isfinite().all() for tensor in (written.w13_EGIH, written.w2_EHI))


def test_dropped_slots_get_exactly_zero() -> None:
    """A slot beyond its expert's capacity is one without an expert."""
    spec = CASES["capacity by choice"]
    inputs = draw(spec)
    dropped_TK = moe_ref.route(inputs.x_TH, inputs.weights, spec).ids_TK < 0
    written = moe_backward(inputs.grad_y_TH, inputs.x_TH, inputs.weights, spec)
    assert dropped_TK.any()
    assert torch.equal(written.weights_TK == 0, dropped_TK)


def test_a_token_that_lost_every_slot_does_not_reach_the_router() -> None:
    """Its weights are constants; NaN from 0 / 0 must not come out of the renormalisation over nothing."""
    spec = layer(Router(num_experts=6, top_k=2, renormalize=True,
                        capacity=Capacity(tokens=1, priority="token", renormalize_after=True)))
    inputs = draw(spec, num_tokens=12)
    lost_T = (moe_ref.route(inputs.x_TH, inputs.weights, spec).ids_TK < 0).all(-1)
    written = moe_backward(inputs.grad_y_TH, inputs.x_TH, inputs.weights, spec)
    assert written.logits_TE is not None
    assert lost_T.any()
    assert not lost_T.all()
    assert torch.equal((written.logits_TE == 0).all(-1) & (written.x_TH == 0).all(-1), lost_T)


@pytest.mark.parametrize("mlp", [MLP(limit=1.0), MLP(limit=1.0, activation="relu", limit_at="after"),
                                 MLP(activation="relu"), MLP(activation="relu_squared", gated=False)])
def test_edges_follow_torch(mlp: MLP) -> None:
    """At a clamp's edge the gradient passes, one ulp beyond it does not; relu has slope 0 at 0: as in autograd."""
    beyond = torch.nextafter(torch.tensor(1.0, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)).item()
    values = torch.tensor([-beyond, -1.0, 0.0, 5e-324, 0.5, 1.0, beyond], dtype=torch.float64)
    gate_up_RGI = torch.cartesian_prod(values, values)[:, :mlp.num_projections, None].clone().requires_grad_()
    act_RI = formula.activate(gate_up_RGI, mlp)
    act_RI.sum().backward()
    written = backward_expert.activate_backward(torch.ones_like(act_RI), gate_up_RGI.detach(), mlp)
    assert gate_up_RGI.grad is not None
    assert torch.equal(written == 0, gate_up_RGI.grad == 0)
    assert (written == 0).any()
    assert (written != 0).any()


def test_the_edge_of_the_clamped_sum() -> None:
    """A sum of exactly epsilon still has a gradient: torch's clamp passes it at equality."""
    router = Router(num_experts=2, top_k=2, renormalize=True, renormalize_epsilon=1.0, epsilon_rule="clamp")
    sum_T1 = torch.tensor([[1.0], [1 - 2**-53], [2.0]], dtype=torch.float64, requires_grad=True)
    backward_weights.divisor(sum_T1, router).sum().backward()
    assert sum_T1.grad is not None
    assert torch.equal(backward_weights.divisor_slope(sum_T1.detach(), router), sum_T1.grad)


def test_a_score_that_underflows_has_gradient_zero() -> None:
    """sqrt(softplus(-800)) is 0 in fp64; its slope, below 2^-537, is 0 and not 0 / 0."""
    router = Router(num_experts=2, top_k=1, score="sqrt_softplus")
    logits_TE = torch.tensor([[-800.0, 0.5]], dtype=torch.float64)
    written = backward_weights.score_backward(torch.ones_like(logits_TE), logits_TE, router)
    assert written[0, 0] == 0
    assert written[0, 1] > 0


class Streamed:
    """Weights that yield one expert at a time, as a checkpoint does."""

    def __init__(self, weights: MoEWeights) -> None:
        self.weights = weights

    def __getattr__(self, name: str) -> torch.Tensor | None:
        if name in EXPERT_FIELDS:
            raise AttributeError(f"{name}: nobody may ask for all experts at once")
        return getattr(self.weights, name)

    def expert(self, e: int) -> ExpertWeights:
        return self.weights.expert(e)


@pytest.mark.parametrize("name", ["gpt-oss", "identity experts", "shared weighted by router"])
def test_experts_are_handed_over_one_at_a_time(name: str) -> None:
    """on_expert gets every expert once, ascending, zeros for one without rows; all else is the same."""
    spec, inputs, seen = CASES[name], draw(CASES[name], num_tokens=1), {}
    whole = named(moe_backward(inputs.grad_y_TH, inputs.x_TH, inputs.weights, spec))

    def keep(e: int, gradients: ExpertGradients) -> None:
        assert e not in seen
        seen[e] = gradients

    source: WeightSource = Streamed(inputs.weights)  # type: ignore[assignment]
    rest = named(moe_backward(inputs.grad_y_TH, inputs.x_TH, source, spec, on_expert=keep))
    assert list(seen) == list(range(spec.num_experts))
    for position, field in enumerate(EXPERT_FIELDS):
        expected = whole.pop(field)
        assert rest.pop(field) is None
        assert expected is None or torch.equal(torch.stack([seen[e][position] for e in seen]), expected)
    assert all(torch.equal(rest[field], tensor) for field, tensor in whole.items() if tensor is not None)
    assert {field for field, tensor in rest.items() if tensor is None} == {
        field for field, tensor in whole.items() if tensor is None}


@pytest.mark.parametrize(("name", "sizes"), [("gpt-oss", [30, 18]), ("gated shared", [30, 18, 6]),
                                             ("dense", [30, 6]), ("shared weighted by router", [30, 18, 12])])
def test_collectives(name: str, sizes: list[int]) -> None:
    """One all-reduce each for tokens (T*H), routing weights (T*K) and shared gates (T*S); without ranks none."""
    spec, inputs = CASES[name], draw(CASES[name])

    def body(comm: Comm) -> list[tuple[str, int]]:
        counting, shard = CountingComm(comm), inputs.weights.shard(UNEVEN, comm.rank)
        moe_backward(inputs.grad_y_TH, inputs.x_TH, shard, spec, UNEVEN, Groups(tp=counting))
        return [(call.operation, call.num_elements) for call in counting.calls]

    assert moe_ref.run_virtual_ranks(3, body) == [[("all_reduce", size) for size in sizes]] * 3
    alone = CountingComm(moe_ref.SoloComm())
    moe_backward(inputs.grad_y_TH, inputs.x_TH, inputs.weights, spec, Parallel(), Groups(tp=alone))
    assert alone.calls == []


@pytest.mark.parametrize("name", CASES)
def test_the_pieces_add_up(name: str) -> None:
    """moe_backward is experts_backward of the routing it finds, then route_backward of the result: same bits."""
    spec, inputs = CASES[name], draw(CASES[name])
    routing = moe_ref.route(inputs.x_TH, inputs.weights, spec)
    whole = moe_backward(inputs.grad_y_TH, inputs.x_TH, inputs.weights, spec)
    experts = experts_backward(inputs.grad_y_TH, inputs.x_TH, routing, inputs.weights, spec)
    router = route_backward(experts.weights_TK, experts.shared_TS, inputs.x_TH, inputs.weights, spec)
    assert torch.equal(whole.x_TH, experts.x_TH + router.x_TH)
    assert torch.equal(whole.weights_TK, experts.weights_TK)
    assert (whole.router_EH is None) == (router.router_EH is None) == (spec.router is None)
    assert spec.router is None or torch.equal(whole.router_EH, router.router_EH)  # type: ignore[arg-type]
    injected = moe_backward(inputs.grad_y_TH, inputs.x_TH, inputs.weights, spec, routing=routing)
    assert injected.router_EH is None
    assert torch.equal(injected.x_TH, experts.x_TH)


def test_a_sigmoid_gate_without_injected_values_is_part_of_the_layer() -> None:
    """A routing that leaves the gates out lets the layer compute them, so tokens and gate get their gradient."""
    spec = CASES["gated shared"]
    inputs = draw(spec)
    routing = moe_ref.route(inputs.x_TH, inputs.weights, spec)
    whole = moe_backward(inputs.grad_y_TH, inputs.x_TH, inputs.weights, spec)
    without = moe_backward(inputs.grad_y_TH, inputs.x_TH, inputs.weights, spec,
                           routing=replace(routing, shared_TS=None))
    assert whole.shared_gate_SH is not None
    assert without.shared_gate_SH is not None
    assert torch.equal(without.shared_gate_SH, whole.shared_gate_SH)
    assert without.router_EH is None


@pytest.mark.parametrize("name", ["gpt-oss", "gated shared"])
def test_the_layout_of_weights_does_not_show(name: str) -> None:
    """Experts' weights with other strides are the same weights: the same bits, as forward."""
    spec, inputs = CASES[name], draw(CASES[name])
    turned = {field: tensor.mT.contiguous().mT if field.endswith(("GIH", "HI")) else tensor
              for field, tensor in inputs.weights.named_tensors()}
    assert not turned["w2_EHI"].is_contiguous()
    one = named(moe_backward(inputs.grad_y_TH, inputs.x_TH, inputs.weights, spec))
    other = named(moe_backward(inputs.grad_y_TH, inputs.x_TH, MoEWeights(**turned), spec))
    assert all(torch.equal(tensor, other[field]) for field, tensor in one.items() if tensor is not None)


@pytest.mark.parametrize("name", ["dense", "gpt-oss", "shared weighted by router", "capacity per sequence"])
def test_zero_tokens(name: str) -> None:
    """No tokens: gradients of parameters are there, and zero."""
    spec, inputs = CASES[name], draw(CASES[name], num_tokens=0)
    written = named(moe_backward(inputs.grad_y_TH, inputs.x_TH, inputs.weights, spec))
    for field, tensor in inputs.weights.named_tensors():
        gradient = written.get(field)
        assert gradient is not None
        assert gradient.shape == tensor.shape
        assert not gradient.any()


def test_wrong_use() -> None:
    """Both numbers in the message, before anything is computed."""
    spec = CASES["shared weighted by router"]
    inputs = draw(spec)
    with pytest.raises(UsageValueError, match=r"grad_y_TH: shape \(5, 5\), but should be \(6, 5\) as x_TH"):
        moe_backward(inputs.grad_y_TH[1:], inputs.x_TH, inputs.weights, spec)
    with pytest.raises(UsageTypeError, match=r"grad_y_TH: dtype torch.int64, but should be floating point"):
        moe_backward(inputs.grad_y_TH.long(), inputs.x_TH, inputs.weights, spec)
    routing = moe_ref.route(inputs.x_TH, inputs.weights, spec)
    with pytest.raises(UsageValueError, match=r"shared_TS is missing, but shared.gate='router' needs \(6, 2\)"):
        moe_backward(inputs.grad_y_TH, inputs.x_TH, inputs.weights, spec, routing=replace(routing, shared_TS=None))


def _without_weights_gradient(grad_weights_TK: torch.Tensor, *rest: object, **options: object) -> object:
    return route_backward(torch.zeros_like(grad_weights_TK), *rest, **options)  # type: ignore[arg-type]


def _sigmoid_scale_left_out(gate: torch.Tensor, mlp: MLP, right: Callable = backward_expert.slope) -> torch.Tensor:
    return right(gate, replace(mlp, sigmoid_scale=1.0))


def _other_gelu(gate: torch.Tensor, mlp: MLP, right: Callable = backward_expert.slope) -> torch.Tensor:
    return right(gate, replace(mlp, activation="gelu"))


def _weight_on_output(grad_TH: torch.Tensor, x_TH: torch.Tensor, routing: Routing, weights: MoEWeights,
                      spec: MoESpec, *rest: object, right: Callable = backward.RoutedBackward) -> object:
    return right(grad_TH, x_TH, routing, weights, replace(spec, weight_on="output"), *rest)


def _no_scaling(*arguments: object, right: Callable = backward_weights.weigh_backward) -> object:
    return right(*(replace(a, scaling_factor=1.0) if isinstance(a, Router) else a for a in arguments))


MUTANTS = {
    "renormalisation forgotten": (backward_weights, "divisor_slope", lambda total, router: torch.zeros_like(total),
                                  ("sigmoid", "softmax, renormalised", "shared weighted by router")),
    "clamped sum not seen": (backward_weights, "divisor_slope", lambda total, router: torch.ones_like(total),
                             ("epsilon clamp", "softmax")),
    "drops not seen": (backward_weights, "kept_slots", lambda ids, score, router: torch.ones_like(ids).bool(),
                       ("capacity by weight", "capacity per sequence")),
    "softcap of logits not seen": (backward_weights, "softcap_slope", lambda value, cap: torch.ones_like(value),
                                   ("logit scale and softcap",)),
    "scaling factor forgotten": (backward_router, "weigh_backward", _no_scaling,
                                 ("sqrt softplus", "identity experts")),
    "weight's gradient forgotten": (backward, "route_backward", _without_weights_gradient, ("softmax", "gpt-oss")),
    "weight on the wrong side": (backward, "RoutedBackward", _weight_on_output, ("weight on input",)),
    "clamps ignored": (backward_expert, "within", lambda value, low, high: torch.ones_like(value).bool(),
                       ("gpt-oss", "limit after", "shared")),
    "softcap of gate and up ignored": (backward_expert, "softcap_slope", lambda value, cap: torch.ones_like(value),
                                       ("softcaps",)),
    "sigmoid_scale forgotten": (backward_expert, "slope", _sigmoid_scale_left_out, ("gpt-oss", "softcaps")),
    "gelu for gelu_tanh": (backward_expert, "slope", _other_gelu, ("gelu_tanh", "gelu_tanh, not gated")),
    "all-reduce forgotten": (backward, "_complete", lambda partial, tp: partial, ("softmax", "gated shared")),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_formula_is_seen(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with autograd must fail on each of these, wherever the mistake matters."""
    module, attribute, wrong, cases = MUTANTS[mutant]
    parallel = UNEVEN if mutant == "all-reduce forgotten" else None

    def worst(name: str) -> float:
        ranks = compare(draw(CASES[name]), CASES[name], "routed", parallel)
        return max(max(ratios.values()) for ratios in ranks)

    assert [name for name in cases if worst(name) > 1] == []
    monkeypatch.setattr(module, attribute, wrong)
    assert [name for name in cases if worst(name) <= 1] == []
