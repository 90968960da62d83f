"""The two products of a layer on one rank, data for them, and torch's results."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moe_fast.compile.products import TORCH_DTYPES
from moe_fast.form import Form
from moe_fast.kernels.align import align
from moe_fast.kernels.down import down
from moe_fast.kernels.gate_up import gate_up
from moe_fast.tiles.tables import Product
from moe_fast.tiles.tile import Load, Tile

_HALF = 0.5


@dataclass(frozen=True)
class Shape:
    """A layer's routed experts on one rank: sizes as of its weights there, T tokens with K experts each."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    tokens: int
    parts: int = 2
    dtype: str = "bf16"

    @property
    def load(self) -> Load:
        return Load(self.tokens * self.top_k, self.experts)

    @property
    def products(self) -> tuple[Product, Product]:
        """Gate and up; down."""
        return (Product("gate_up", self.dtype, self.intermediate, self.hidden, self.parts, self.experts),
                Product("down", self.dtype, self.hidden, self.intermediate, 1, self.experts))


@dataclass(frozen=True)
class Operands:
    """Of one product: rows (tokens of gate_up, activated rows of down), weights_ENK as the kernel takes them."""

    product: Product
    rows: torch.Tensor
    weights: torch.Tensor
    ids_TK: torch.Tensor

    @property
    def form(self) -> Form:
        return Form(gated=self.product.accumulators == 2)

    def call(self, tile: Tile) -> Callable[[], torch.Tensor]:
        """The kernel with that tile; the alignment is made beforehand and is no part of it."""
        (_, top_k), device = self.ids_TK.shape, self.rows.device
        alignment = align(self.ids_TK, torch.arange(self.product.experts, device=device), tile.block_m)
        weights_R = torch.full((self.ids_TK.numel(),), _HALF, device=device)
        if self.product.kernel == "gate_up":
            return lambda: gate_up(self.rows, self.weights, None, None, alignment, top_k, self.form, tile)
        return lambda: down(self.rows, self.weights, None, weights_R, alignment, tile)

    def expected(self) -> torch.Tensor:
        """By torch in fp32, one expert after the other, rounded once; in the order in which the kernel writes."""
        ids_R = self.ids_TK.flatten()
        order_R = torch.argsort(ids_R, stable=True)
        results = []
        for e, count in enumerate(torch.bincount(ids_R, minlength=self.product.experts).tolist()):
            results.append(self._expert(e, sum(map(len, results)), count, order_R))
        sorted_RN = torch.cat(results).to(self.rows.dtype)
        if self.product.kernel == "gate_up":
            return sorted_RN
        return torch.empty_like(sorted_RN).index_copy_(0, order_R, sorted_RN)

    def _expert(self, e: int, first: int, count: int, order_R: torch.Tensor) -> torch.Tensor:
        if self.product.kernel == "down":
            return _HALF * (self.rows[first:first + count].float() @ self.weights[e].float().T)
        x_RK = self.rows[order_R[first:first + count] // self.ids_TK.shape[1]].float()
        gate, *up = (x_RK @ part.float().T for part in self.weights[e])
        return F.silu(gate) * up[0] if up else F.silu(gate)


def draw(shape: Shape, product: Product, device: str, *, exact: bool, seed: int = 0) -> Operands:
    """exact: operands of -1, 0 and 1 times a power of two, whose sums are exact in fp32 in any order; else normal ones.

    Loads of experts are what a random choice makes of them.
    """
    generator = torch.Generator(device).manual_seed(seed)
    tokens, top_k, dtype = shape.tokens, shape.top_k, TORCH_DTYPES[shape.dtype]
    scores_TE = torch.rand(tokens, shape.experts, generator=generator, device=device)
    ids_TK = scores_TE.topk(top_k, dim=1).indices

    def drawn(size: tuple[int, ...], scale: float) -> torch.Tensor:
        tensor = torch.empty(size, dtype=dtype, device=device)
        if exact:
            return tensor.random_(0, 3, generator=generator).sub_(1).mul_(scale)
        return tensor.normal_(generator=generator).mul_(scale)

    num_rows = tokens if product.kernel == "gate_up" else tokens * top_k
    parts = (product.accumulators,) if product.kernel == "gate_up" else ()
    scale = 2.0**-(product.in_features.bit_length() // 2)  # products of about 1
    return Operands(product, drawn((num_rows, product.in_features), scale),
                    drawn((shape.experts, *parts, product.out_features, product.in_features), 1.0), ids_TK)


_LAST_PLACE = {"bf16": 2.0**-7, "fp16": 2.0**-10, "fp32": 2.0**-20}
"""Relative: one unit in the last place; in fp32 eight, which an exponential may be off by."""


def fault(operands: Operands, got: torch.Tensor, expected: torch.Tensor) -> str:
    """What is wrong with a result on exact operands, "" if nothing: sums are equal, activations within one place."""
    if operands.product.kernel == "down":
        wrong = got != expected
    else:
        last = _LAST_PLACE[operands.product.dtype]
        wrong = ~((got.float() - expected.float()).abs() <= last * expected.float().abs() + torch.finfo(got.dtype).tiny)
    count = int(wrong.sum())
    return f"{count} of {wrong.numel()} elements differ from torch's" if count else ""
