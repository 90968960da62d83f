"""Gradients of a block in fp32 against autograd through the oracle in fp64, by the block's own parameters."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

import moe_ref
from moe_ref.contract.routing import Routing
from moe_ref.contract.weights import MoEWeights
from tests.third_party.blocks import run, weights_of
from tests.third_party.compare import dense_weights
from tests.third_party.family import E, Family, H, I, K

UNIT = 2.0**-24


@dataclass(frozen=True)
class Gradients:
    """Largest max |difference| / max |gradient| of any parameter, and which; their number, and which get none."""

    worst: float
    name: str
    number: int
    silent: tuple[str, ...]
    allowed: float


def compare_gradients(block: nn.Module, family: Family, x_BSH: torch.Tensor) -> Gradients:
    """x and every parameter that asks for a gradient; tokens whose experts differ get no upstream gradient.

    Of the output, or of the weights as (T, E + Z) where only the router is compared. Where logits or routing are
    injected, they come from an fp64 copy of the block, as part of its graph.
    """
    x = x_BSH.clone().requires_grad_()
    ran = run(block, family, x)
    precise = copy.deepcopy(block).double()
    for module in precise.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"  # grouped_mm has no fp64
    x64 = x_BSH.double().requires_grad_()
    theirs_TN = ran.output_TH if family.fit != "router" else dense_weights(ran.routing, family.spec)
    ours_TN, same_T = _oracle(precise, family, x64, ran.routing)
    upstream_TN = upstream(theirs_TN) * same_T[:, None]
    theirs = _gradients(theirs_TN, block, x, upstream_TN)
    ours = _gradients(ours_TN, precise, x64, upstream_TN.double())
    ratios = {name: _relative(theirs[name], ours[name]) for name in ours}
    name = max(ratios, key=lambda key: ratios[key])
    silent = tuple(name for name, grad in ours.items() if not bool(grad.any()))
    limit = allowed(x_BSH.flatten(0, 1), weights_of(block, family))
    return Gradients(ratios[name], name, len(ours), silent, limit)


def allowed(x_TH: torch.Tensor, weights: MoEWeights) -> float:
    """UNIT times the operations between an input and a gradient, relative to a parameter's largest gradient.

    Every sum of n terms counts n: forward H and I, backward H and I again, K slots and E scores, and T tokens of a
    parameter's gradient; twice, for the factors of a gradient meet as a product. A logit is exponentiated, so that
    its absolute error, H operations times its sum of absolute terms, is a relative one of every weight, forward
    and backward.
    """
    assert weights.router_EH is not None
    gauge = float((x_TH.detach().double().abs() @ weights.router_EH.detach().double().abs().T).max())
    return UNIT * 2 * (2 * H + 2 * I + K + E + len(x_TH) + H * gauge)


def upstream(value: torch.Tensor) -> torch.Tensor:
    """Gradient of what is differentiated, in its dtype, the same for every family."""
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(2)).to(value.dtype)


def _oracle(precise: nn.Module, family: Family, x_BSH: torch.Tensor,
            chosen: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle on the copy's parameters, which the adapter's views lead to; tokens with the block's experts."""
    x_TH, weights, spec = x_BSH.flatten(0, 1), weights_of(precise, family), family.spec
    if family.fit == "routing":
        routing = run(precise, family, x_BSH).routing
        return moe_ref.moe(x_TH, weights, spec, routing=routing), _same(routing, chosen)
    logits_TE = run(precise, family, x_BSH).logits_TE if family.fit == "logits" else None
    own = moe_ref.route(x_TH, weights, spec, logits_TE=logits_TE)
    if family.fit == "router":
        return dense_weights(own, spec), _same(own, chosen)
    return moe_ref.moe(x_TH, weights, spec, logits_TE=logits_TE), _same(own, chosen)


def _same(first: Routing, second: Routing) -> torch.Tensor:
    return (first.ids_TK.sort(-1).values == second.ids_TK.sort(-1).values).all(-1)


def _gradients(value: torch.Tensor, block: nn.Module, x: torch.Tensor,
               upstream_of: torch.Tensor) -> dict[str, torch.Tensor]:
    """By name; zero where nothing arrives."""
    leaves = {"x": x} | {name: p for name, p in block.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(value, list(leaves.values()), upstream_of, allow_unused=True)
    return {name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), found, strict=True)}


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    largest = want.abs().max()
    difference = (got.double() - want).abs().max()
    return float(difference / largest) if largest > 0 else float(difference)
