"""Protects the oracle against inputs that break formulas: saturation, infinities, nothing chosen, no numbers."""

import copy
import math

import pytest
import torch

import moe_ref
from moe_ref import MLP, Capacity, MoESpec, MoEWeights, Parallel, Router, Routing, SharedExpert
from moe_ref.contract.errors import UsageTypeError, UsageValueError
from moe_ref.contract.weights import parameter_shapes
from moe_ref.oracle.expert import activation


def drawn(spec: MoESpec, seed: int = 0) -> MoEWeights:
    """Standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return MoEWeights(**{name: torch.randn(shape, generator=generator, dtype=torch.float64)
                         for name, shape in parameter_shapes(spec).items()})


def tokens(count: int, hidden: int) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize(("options", "logits", "best"), [
    ({"score": "sigmoid"}, [40.0, 50.0], 1),
    ({"logit_softcap": 1.0}, [20.0, 40.0], 1),
    ({"top_k": 2, "num_experts": 3}, [1000.0, 0.0, 100.0], [0, 2]),
])
def test_scores_that_saturate_do_not_tie(options: dict, logits: list[float], best: object) -> None:
    """Sigmoid and tanh reach 1, softmax reaches 0; the larger logit still wins (Llama 4's logits pass 100)."""
    spec = MoESpec(hidden_size=4, intermediate_size=3, router=Router(**{"num_experts": 2, "top_k": 1, **options}))
    routing = moe_ref.route(tokens(1, 4), drawn(spec), spec, logits_TE=torch.tensor([logits]))
    assert routing.ids_TK[0].tolist() == (best if isinstance(best, list) else [best])


@pytest.mark.parametrize("logits", [[1.0, 0.5, -800.0], [-400.0, -400.5, -900.0]])
def test_slopes_stay_finite_where_a_sigmoid_underflows(logits: list[float]) -> None:
    """Autograd has no NaN and is what the written formulas say; the selected ones do have slopes."""
    spec = MoESpec(hidden_size=4, intermediate_size=3,
                   router=Router(num_experts=3, top_k=2, score="sigmoid", renormalize=True))
    x_TH, weights, logits_TE = tokens(1, 4), drawn(spec), torch.tensor([logits], dtype=torch.float64)
    leaf = logits_TE.clone().requires_grad_()
    y_TH = moe_ref.moe(x_TH, weights, spec, logits_TE=leaf)
    y_TH.sum().backward()
    written = moe_ref.moe_backward(torch.ones_like(y_TH), x_TH, weights, spec, logits_TE=logits_TE).logits_TE
    assert bool(torch.isfinite(leaf.grad).all())
    # A few dozen operations on either side, each good to 2^-52 of sums of order one.
    assert float((leaf.grad - written).abs().max()) <= 100 * 2.0**-52 * float(written.abs().max())
    assert float(written[0, 0]) != 0.0


@pytest.mark.parametrize("gate", [-5.0, -7.0, -8.0, -20.0])
def test_gelu_keeps_its_digits_on_the_negative_side(gate: float) -> None:
    """1 + erf and 1 + tanh would cancel; the reference is erfc of the C library, and exp for the tanh form."""
    value = torch.tensor(gate, dtype=torch.float64)
    exact = 0.5 * gate * math.erfc(-gate / math.sqrt(2))
    z = 2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    tanh_form = gate * math.exp(z) / (1 + math.exp(z))
    # exp and erfc to 4 ulps, their argument to 2 roundings, amplified by the argument.
    for name, want, amplified in (("gelu", exact, gate**2), ("gelu_tanh", tanh_form, abs(z))):
        got = float(activation(value, MLP(activation=name)))
        assert abs(got - want) <= (16 + 4 * amplified) * 2.0**-52 * abs(want)


@pytest.mark.parametrize("tp", [1, 3])
def test_an_infinity_stays_one_whatever_the_ranks(tp: int) -> None:
    """Identity experts and biases are added by rank 0: by leaving out, not by a product with 0."""
    spec = MoESpec(hidden_size=4, intermediate_size=6, router=Router(num_experts=2, top_k=1, num_zero_experts=1),
                   output_bias=True)
    weights, x_TH = drawn(spec), tokens(2, 4)
    x_TH[1, 0], weights.output_bias_H[3] = torch.inf, -torch.inf
    routing, parallel = Routing(torch.tensor([[0], [2]]), torch.ones(2, 1)), Parallel(tp=tp)

    def body(comm: moe_ref.LocalComm) -> torch.Tensor:
        return moe_ref.moe(x_TH, weights.shard(parallel, comm.rank), spec, parallel, moe_ref.Groups(tp=comm),
                           routing=routing)

    y_TH = moe_ref.run_virtual_ranks(tp, body)[0]
    assert y_TH[1, 0] == torch.inf
    assert bool((y_TH[:, 3] == -torch.inf).all())
    assert bool(torch.isfinite(y_TH[:, 1:3]).all())


@pytest.mark.parametrize("ids", [[], [[-1, -1], [7, -1]]], ids=["no token", "no expert"])
def test_nothing_chosen_has_a_gradient_of_zero(ids: list) -> None:
    """The result hangs on its inputs all the same, so that a training step with an idle rank goes on."""
    spec = MoESpec(hidden_size=4, intermediate_size=3, router=Router(num_experts=3, top_k=2))
    x_TH = tokens(len(ids), 4).requires_grad_()
    weights_TK = torch.ones(len(ids), 2, dtype=torch.float64, requires_grad=True)
    routing = Routing(torch.tensor(ids, dtype=torch.int64).reshape(len(ids), 2), weights_TK)
    y_TH = moe_ref.moe(x_TH, drawn(spec), spec, routing=routing)
    y_TH.sum().backward()
    assert not y_TH.any()
    assert not x_TH.grad.any()
    assert not weights_TK.grad.any()


def test_a_second_derivative_under_tensor_parallelism_is_refused() -> None:
    """The collectives are differentiable once: a silent wrong Hessian is worse than none."""
    spec, parallel = MoESpec(hidden_size=4, intermediate_size=6), Parallel(tp=2)
    weights = drawn(spec)

    def body(comm: moe_ref.LocalComm) -> bool:
        x_TH = tokens(2, 4).requires_grad_()
        y_TH = moe_ref.moe(x_TH, weights.shard(parallel, comm.rank), spec, parallel, moe_ref.Groups(tp=comm))
        (slope_TH,) = torch.autograd.grad(y_TH.sum(), x_TH, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope_TH.square().sum().backward()
        return True

    assert moe_ref.run_virtual_ranks(2, body) == [True, True]


@pytest.mark.parametrize("priority", ["token", "choice", "weight"])
def test_identity_experts_have_no_capacity(priority: str) -> None:
    """They compute nothing that could be full."""
    spec = MoESpec(hidden_size=4, intermediate_size=3,
                   router=Router(num_experts=2, top_k=1, num_zero_experts=1,
                                 capacity=Capacity(tokens=1, priority=priority)))
    logits_TE = torch.tensor([[0.0, 0.0, 5.0]] * 4 + [[5.0, 0.0, 0.0]] * 3)
    ids_TK = moe_ref.route(tokens(7, 4), drawn(spec), spec, logits_TE=logits_TE).ids_TK
    assert ids_TK.flatten().tolist() == [2, 2, 2, 2, 0, -1, -1]


SPEC = MoESpec(hidden_size=4, intermediate_size=3, router=Router(num_experts=3, top_k=2),
               shared=SharedExpert(intermediate_size=5))


class Without:
    """The same source with another shared expert."""

    def __init__(self, weights: MoEWeights, shared: object) -> None:
        self._weights, self._shared = weights, shared

    def __getattr__(self, name: str) -> object:
        return getattr(self._weights, name)

    def shared_expert(self) -> object:
        return self._shared


def wrong_calls() -> dict[str, tuple]:
    """Call, kind of error, words."""
    weights, x_TH = drawn(SPEC), tokens(2, 4)
    routing, logits_TE = moe_ref.route(x_TH, weights, SPEC), torch.zeros(2, 3)
    meta = MoEWeights(**{name: tensor.to("meta") for name, tensor in weights.named_tensors()})
    integers = MoEWeights(**{name: tensor.to(torch.int8) for name, tensor in weights.named_tensors()})
    biased = MoEWeights(**dict(weights.named_tensors()), selection_bias_E=torch.zeros(3))
    wide = drawn(MoESpec(hidden_size=4, intermediate_size=3, shared=SharedExpert(intermediate_size=6))).shared_expert()
    return {
        "arguments exchanged": (lambda: moe_ref.moe(weights, x_TH, SPEC), UsageTypeError, "x_TH: MoEWeights"),
        "a dictionary of weights": (lambda: moe_ref.moe(x_TH, dict(weights.named_tensors()), SPEC), UsageTypeError,
                                    "weights: dict, but should be MoEWeights"),
        "a pair as routing": (lambda: moe_ref.moe(x_TH, weights, SPEC, routing=(routing.ids_TK, routing.weights_TK)),
                              UsageTypeError, "routing: tuple, but should be Routing"),
        "routing and logits": (lambda: moe_ref.moe(x_TH, weights, SPEC, routing=routing, logits_TE=logits_TE),
                               UsageValueError, "only one of them"),
        "backward too": (lambda: moe_ref.moe_backward(x_TH, x_TH, weights, SPEC, routing=routing, logits_TE=logits_TE),
                         UsageValueError, "only one of them"),
        "weights without numbers": (lambda: moe_ref.moe(x_TH, meta, SPEC, routing=routing), UsageTypeError,
                                    "on the meta device"),
        "integers": (lambda: moe_ref.moe(x_TH, integers, SPEC), UsageTypeError, "dtype torch.int8"),
        "a parameter nobody asked for": (lambda: moe_ref.route(x_TH, biased, SPEC), UsageValueError,
                                         "selection_bias_E is given, but the spec has no such parameter"),
        "no shared expert": (lambda: moe_ref.moe(x_TH, Without(weights, None), SPEC), UsageValueError,
                             "missing, but the spec has one"),
        "another shared expert": (lambda: moe_ref.moe(x_TH, Without(weights, wide), SPEC), UsageValueError,
                                  r"shared_w13_GIH: shape \(2, 6, 4\), but should be \(2, 5, 4\)"),
        "a layer without numbers": (lambda: moe_ref.MoELayer(SPEC, device="meta").load_weights(weights),
                                    UsageTypeError, "call to_empty"),
        "weights that would be rounded": (lambda: moe_ref.MoELayer(SPEC, dtype=torch.bfloat16).load_weights(weights),
                                          UsageTypeError, "without rounding"),
        "a rank that is none": (lambda: weights.shard(Parallel(tp=2), -1), UsageValueError, "-1"),
    }


@pytest.mark.parametrize("name", list(wrong_calls()))
def test_wrong_calls_are_told_before_anything_is_computed(name: str) -> None:
    """Each was once accepted with a wrong result, or failed far from its cause."""
    call, kind, words = wrong_calls()[name]
    with pytest.raises(kind, match=words):
        call()


def test_a_layer_keeps_a_precise_router_and_can_be_copied() -> None:
    """fp32 beside bf16 as released checkpoints have it; a copy shares the process groups, which are no data."""
    bf16, precise = torch.bfloat16, ("router_EH",)
    held = {name: tensor.float() if name in precise else tensor.to(bf16)
            for name, tensor in drawn(SPEC).named_tensors()}

    def body(comm: moe_ref.LocalComm) -> None:
        groups = moe_ref.Groups(tp=comm)
        layer = moe_ref.MoELayer(SPEC, Parallel(tp=2), groups, dtype=bf16, router_dtype=torch.float32)
        layer.load_weights(MoEWeights(**held))
        assert torch.equal(layer.router_EH, held["router_EH"])
        twin = copy.deepcopy(layer)
        assert twin.groups is groups
        assert twin.router_EH is not layer.router_EH
        assert torch.equal(twin(tokens(3, 4).to(bf16)), layer(tokens(3, 4).to(bf16)))

    moe_ref.run_virtual_ranks(2, body)
