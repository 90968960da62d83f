"""Protects moe_fast from tensors that are views: a kernel that knows no stride reads the neighbours' numbers."""

import pytest
import torch

import moe_fast
import moe_ref
from moe_ref.contract.spec import MLP, MoESpec, Router, SharedExpert
from moe_ref.contract.vocabulary import Dtype, Format
from moe_ref.contract.weights import MoEWeights, parameter_shapes
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.bounds.output import output_bound
from moe_ref.verify.bounds.rounding import RoundingModel

SPEC = MoESpec(hidden_size=24, intermediate_size=20, router=Router(num_experts=4, top_k=2),
               experts=MLP(bias=True), shared=SharedExpert(intermediate_size=12, gate="sigmoid", mlp=MLP(bias=True)),
               output_bias=True)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers around 0 that depend on shape and seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def layer() -> tuple[torch.Tensor, MoEWeights, torch.Tensor]:
    """Tokens, weights and ids."""
    weights = {name: drawn(*shape) / shape[-1]**0.5 for name, shape in parameter_shapes(SPEC).items()}
    ids_TK = torch.stack([torch.arange(9) % 4, (torch.arange(9) + 1) % 4], 1)
    return drawn(9, 24, seed=1), MoEWeights(**weights), ids_TK


def column(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, each followed in memory by one of another tensor."""
    return torch.stack([tensor, torch.full_like(tensor, 7.0)], -1)[..., 0]


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("which", ["tokens", "weights", "gates", "ids", "expanded", "biases"])
def test_views_mean_their_own_numbers(which: str) -> None:
    """Output and gradients have the same bits as for contiguous copies, and are right."""
    x_TH, weights, ids_TK = layer()
    weights_TK, gates_T1 = drawn(9, 2, seed=2).abs(), drawn(9, 1, seed=3).abs()
    if which == "expanded":
        weights_TK = torch.full((1, 1), 0.5).expand(9, 2)
    given = {"tokens": x_TH, "weights": weights_TK, "gates": gates_T1, "ids": ids_TK}
    results = []
    for viewed in (False, True):
        leaves = {name: (column(tensor) if viewed and name == which else tensor.clone())
                  for name, tensor in given.items()}
        if viewed and which == "expanded":
            leaves["weights"] = weights_TK
        for name in ("tokens", "weights", "gates"):
            leaves[name] = leaves[name].detach().requires_grad_()
        routing = moe_ref.Routing(leaves["ids"], leaves["weights"], shared_TS=leaves["gates"])
        held = {name: column(tensor) if viewed and which == "biases" and "bias" in name else tensor
                for name, tensor in weights.named_tensors()}
        y_TH = moe_fast.experts(leaves["tokens"], routing, MoEWeights(**held), SPEC)
        y_TH.backward(drawn(9, 24, seed=4))
        results.append((y_TH.detach(), *(leaves[name].grad for name in ("tokens", "weights", "gates"))))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    truth_TH, bound_TH = output_bound(x_TH, moe_ref.Routing(ids_TK, weights_TK, shared_TS=gates_T1), weights, SPEC,
                                      moe_fast.CAPABILITIES.numerics[Dtype.FP32],
                                      RoundingModel(load_tolerances(), "cpu", Format.FP32))
    assert bool(((results[1][0] - truth_TH).abs() <= bound_TH).all())
