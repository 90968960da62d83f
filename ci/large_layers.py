"""Layers with a tensor of more elements than asked for, of small integers that are mostly zero."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_ref.contract.routing import Routing
from moe_ref.contract.weights import MoEWeights

_X_PLACES, _W2_PLACES, _GRAD_PLACES = 4, 8, 2
"""Numbers of a row that are not zero: rows of gate, up, act and down stay below 256, which bf16 holds."""
REFERENCE_BYTES = 2**30
"""What a comparison may take for one tensor."""


@dataclass(frozen=True)
class Sizes:
    """Of a layer; tokens is a function of how many elements are wanted."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    tokens: int


@dataclass(frozen=True)
class Shape:
    """sizes(elements, small): a layer with a tensor that has more than so many; small: other widths, for a CPU."""

    what: str
    sizes: Callable[[int, bool], Sizes]


def _past(elements: int, per_unit: int) -> int:
    """Units that have a sixteenth more elements: that many are past the limit."""
    return (elements + elements // 16) // per_unit + 1


def _rows(elements: int, small: bool) -> Sizes:
    hidden = 96 if small else 7168
    return Sizes(hidden, 16, 8, 8, _past(elements, 8 * hidden))


def _experts(elements: int, small: bool) -> Sizes:
    hidden, intermediate, top_k = (48, 48, 2) if small else (4096, 1024, 8)
    return Sizes(hidden, intermediate, _past(2 * elements, 2 * intermediate * hidden), top_k, 4)


def _act(elements: int, small: bool) -> Sizes:
    hidden, intermediate = (16, 96) if small else (64, 2816)
    return Sizes(hidden, intermediate, 8, 8, _past(2 * elements, 8 * intermediate))


def _tokens(elements: int, small: bool) -> Sizes:
    hidden = 96 if small else 7168
    return Sizes(hidden, 16, 2, 1, _past(elements, hidden))


SHAPES = {
    "rows": Shape("routed rows times H, as in a long prefill", _rows),
    "experts": Shape("gate and up of all experts, twice as many", _experts),
    "act": Shape("routed rows times I, twice as many, which 32 unsigned bits do not count", _act),
    "tokens": Shape("tokens times H, of the input, the result and their gradients", _tokens),
}


@dataclass(frozen=True)
class Layer:
    """Everything that a call is given."""

    x_TH: torch.Tensor
    routing: Routing
    weights: MoEWeights
    grad_TH: torch.Tensor


def needed_bytes(sizes: Sizes) -> int:
    """Weights and their gradients, tokens and results, rows with the copies that a trace takes, and the reference."""
    weights = 3 * sizes.experts * sizes.intermediate * sizes.hidden
    rows = sizes.tokens * sizes.top_k * (4 * sizes.intermediate + 4 * sizes.hidden)
    return 2 * (2 * weights + 8 * sizes.tokens * sizes.hidden + rows) + 4 * REFERENCE_BYTES


def _sparse(rows: int, width: int, places: int, generator: torch.Generator, device: str) -> torch.Tensor:
    """(rows, width), of which so many numbers in a row are 1 or -1."""
    result = torch.zeros(rows, width, dtype=torch.bfloat16, device=device)
    at = torch.randint(width, (rows, places), generator=generator, device=device)
    signs = torch.randint(2, (rows, places), generator=generator, device=device).mul_(2).sub_(1)
    return result.scatter_(1, at, signs.to(torch.bfloat16))


def build_layer(sizes: Sizes, device: str) -> Layer:
    """Token t's slots go to experts in turn, from the last one down."""
    generator = torch.Generator(device).manual_seed(sizes.tokens)
    w13_EGIH = torch.empty(sizes.experts, 2, sizes.intermediate, sizes.hidden, dtype=torch.bfloat16, device=device)
    w2_EHI = torch.empty(sizes.experts, sizes.hidden, sizes.intermediate, dtype=torch.bfloat16, device=device)
    for e in range(sizes.experts):
        drawn = torch.randint(-1, 2, w13_EGIH.shape[1:], generator=generator, device=device, dtype=torch.int8)
        w13_EGIH[e].copy_(drawn)
        w2_EHI[e].copy_(_sparse(sizes.hidden, sizes.intermediate, _W2_PLACES, generator, device))
    slot_R = torch.arange(sizes.tokens * sizes.top_k, device=device)
    ids_TK = (sizes.experts - 1 - slot_R % sizes.experts).view(-1, sizes.top_k).to(torch.int32)
    weights_TK = torch.where(slot_R % 2 == 0, 1.0, 0.5).view(-1, sizes.top_k)
    router_EH = torch.zeros(sizes.experts, sizes.hidden, dtype=torch.bfloat16, device=device)
    return Layer(_sparse(sizes.tokens, sizes.hidden, _X_PLACES, generator, device), Routing(ids_TK, weights_TK),
                 MoEWeights(router_EH=router_EH, w13_EGIH=w13_EGIH, w2_EHI=w2_EHI),
                 _sparse(sizes.tokens, sizes.hidden, _GRAD_PLACES, generator, device))
