"""Protects the gauges: sums of absolute values and of squares, by which errors are measured.

Weights, tokens and routing weights are small integers and the activation is relu, so that every sum is exact in fp64
and must be equal to the loop that spells it out.
"""

import torch

import moe_ref
from moe_ref import MLP, MoESpec, MoEWeights, Router, Routing
from moe_ref.contract.weights import parameter_shapes
from moe_ref.oracle.gauges import Gauged, gauged_product, routed_with_gauges

SPEC = MoESpec(hidden_size=5, intermediate_size=4, router=Router(num_experts=3, top_k=2),
               experts=MLP(activation="relu", bias=True))


def integers(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """From -3 to 3."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).double()


def example() -> tuple[torch.Tensor, Routing, MoEWeights]:
    """Six tokens; one slot has no expert, one token chooses the same expert twice."""
    weights = MoEWeights(**{name: integers(shape, seed) for seed, (name, shape) in
                            enumerate(parameter_shapes(SPEC).items())})
    ids_TK = torch.tensor([[0, 1], [1, 2], [2, -1], [1, 1], [0, 2], [2, 0]])
    return integers((6, 5), 10), Routing(ids_TK, integers((6, 2), 11)), weights


def test_a_product_and_its_gauges() -> None:
    """Element by element from the definition; the operands come back unchanged."""
    a, b = integers((3, 7), 0), integers((4, 7), 1)
    copy = b.clone()
    got = gauged_product(a, b)
    terms = a[:, None, :] * b[None, :, :]
    for tensor, want in zip(got, (terms, terms.abs(), terms.square()), strict=True):
        assert torch.equal(tensor, want.sum(-1))
    assert torch.equal(b, copy)


def test_the_value_is_the_oracle_s() -> None:
    """The same sum as moe_ref.experts, without shared expert."""
    x_TH, routing, weights = example()
    assert torch.equal(routed_with_gauges(x_TH, routing, weights, SPEC).value,
                       moe_ref.experts(x_TH, routing, weights, SPEC))


def test_every_term_is_counted_once() -> None:
    """Token by token: weighted absolute values and squares of every term, the bias being one of them."""
    x_TH, routing, weights = example()
    got = routed_with_gauges(x_TH, routing, weights, SPEC)
    for t, x_H in enumerate(x_TH):
        absolute_H, squares_H = torch.zeros(5).double(), torch.zeros(5).double()
        for e, weight in zip(routing.ids_TK[t].tolist(), routing.weights_TK[t].tolist(), strict=True):
            if e < 0:
                continue
            gate_I, up_I = weights.w13_EGIH[e] @ x_H + weights.w13_bias_EGI[e]
            terms_HI = weights.w2_EHI[e] * (torch.relu(gate_I) * up_I)
            bias_H = weights.w2_bias_EH[e]
            absolute_H += abs(weight) * (terms_HI.abs().sum(-1) + bias_H.abs())
            squares_H += weight**2 * (terms_HI.square().sum(-1) + bias_H.square())
        assert torch.equal(got.absolute[t], absolute_H)
        assert torch.equal(got.squares[t], squares_H)


def test_gate_and_up_are_observed_per_expert() -> None:
    """Every routed row is seen once, with the products before their bias."""
    x_TH, routing, weights = example()
    seen = []

    def observe(e: int, token_R: torch.Tensor, slot_R: torch.Tensor, gate_up: Gauged) -> None:
        seen.extend(zip(token_R.tolist(), slot_R.tolist(), strict=True))
        for row, token in enumerate(token_R.tolist()):
            terms = weights.w13_EGIH[e] * x_TH[token]
            for tensor, want in zip(gate_up, (terms, terms.abs(), terms.square()), strict=True):
                assert torch.equal(tensor[row], want.sum(-1))

    routed_with_gauges(x_TH, routing, weights, SPEC, observe=observe)
    assert sorted(seen) == [(t, k) for t in range(6) for k in range(2) if (t, k) != (2, 1)]
