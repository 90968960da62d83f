"""A product as its kernel walks it, read from a recorded launch."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moe_fast.compile.recorder import Launch
from moe_fast.form import Form


@dataclass(frozen=True)
class Product:
    """Row blocks with rows, as (expert, rows), in the order of the launch; out and inner: features of the operands.

    parts: products with the same rows, as gate and up. rows_bytes: all that rows are read from, which several experts
    may share. stages: of operand tiles that are in shared memory at once.
    """

    kernel: str
    blocks: tuple[tuple[int, int], ...]
    out: int
    inner: int
    parts: int
    itemsize: int
    rows_bytes: int
    block_m: int
    block_n: int
    block_k: int
    group: int
    warps: int
    stages: int

    @property
    def columns(self) -> int:
        """Programs of a row block."""
        return -(-self.out // self.block_n)

    @property
    def steps(self) -> int:
        """Of the loop over the inner dimension."""
        return -(-self.inner // self.block_k)

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.blocks)

    @property
    def wasted_rows(self) -> float:
        """Share of the rows of all blocks that are padding."""
        return 1 - self.rows / (len(self.blocks) * self.block_m)

    @property
    def weight_stripe(self) -> int:
        """Bytes of weights that a program reads."""
        return self.parts * min(self.block_n, self.out) * self.inner * self.itemsize

    @property
    def flop(self) -> float:
        """Useful operations."""
        return 2.0 * self.rows * self.out * self.inner * self.parts

    @property
    def program_flop(self) -> float:
        """Operations of one program, padding of the tile included."""
        return 2.0 * self.block_m * self.block_n * self.steps * self.block_k * self.parts

    @property
    def least_bytes(self) -> int:
        """Weights of experts with rows, rows and results, once."""
        weights = len({expert for expert, _ in self.blocks}) * self.parts * self.out * self.inner
        return (weights + self.rows * self.out) * self.itemsize + self.rows_bytes


def product_of(launch: Launch, num_tokens: int) -> Product | None:
    """None of kernels that are no forward product. Loads of experts are taken to be even, none is left out."""
    given = launch.arguments
    name = launch.kernel.fn.__name__
    if name == "product_kernel":
        left, inner, size = _tensor(given, "left"), _number(given, "inner_size"), _number(given, "part_size")
        # Each part of the sum is a product with weights of its own.
        return _product(name, given, [_number(given, "num_rows")] * -(-inner // size), _number(given, "num_columns"),
                        min(inner, size), 1, left.numel() * left.element_size(), ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    if name == "route_kernel":
        x = _tensor(given, "x")
        return _product(name, given, [_number(given, "num_tokens")], _number(given, "num_experts"),
                        _number(given, "hidden_size"), 1, x.numel() * x.element_size(),
                        ("BLOCK_T", "EXPERTS", "BLOCK_H"))
    if name not in ("gate_up_kernel", "down_kernel"):
        return None
    weights, rows = operand(given["w13" if name == "gate_up_kernel" else "w2"]), _tensor(given, "sorted_rows").numel()
    loads = _even_loads(rows, len(weights), num_tokens)
    hidden, intermediate = _number(given, "hidden_size"), _number(given, "intermediate_size")
    if name == "gate_up_kernel":
        x, form = _tensor(given, "x"), given["FORM"]
        assert isinstance(form, Form)
        return _product(name, given, loads, intermediate, hidden, form.num_projections, x.numel() * x.element_size(),
                        ("BLOCK_M", "BLOCK_I", "BLOCK_H"))
    act = _tensor(given, "act")
    return _product(name, given, loads, hidden, intermediate, 1, act.numel() * act.element_size(),
                    ("BLOCK_M", "BLOCK_H", "BLOCK_I"))


def _product(name: str, given: Mapping[str, object], loads: list[int], out: int, inner: int, parts: int,
             rows_bytes: int, blocks: tuple[str, str, str]) -> Product:
    block_m, block_n, block_k = (_number(given, block) for block in blocks)
    itemsize = _tensor(given, {"down_kernel": "act", "product_kernel": "left"}.get(name, "x")).element_size()
    walked = tuple((expert, min(block_m, rows - first)) for expert, rows in enumerate(loads)
                   for first in range(0, rows, block_m))
    group = given.get("GROUP", len(walked))
    assert isinstance(group, int)
    return Product(name, walked, out, inner, parts, itemsize, rows_bytes, block_m, block_n, block_k, group,
                   _number(given, "num_warps"), _number(given, "num_stages"))


def _even_loads(rows: int, experts: int, num_tokens: int) -> list[int]:
    """Rows of each visited expert: as many as are to be expected if every token chose K of E at random."""
    top_k = rows / num_tokens
    visited = max(1, min(rows, round(experts * (1 - (1 - top_k / experts)**num_tokens))))
    return [rows // visited + (place < rows % visited) for place in range(visited)]


def operand(argument: object) -> torch.Tensor:
    """A tensor, or the one that a descriptor is of."""
    tensor = getattr(argument, "base", argument)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _tensor(given: Mapping[str, object], name: str) -> torch.Tensor:
    return operand(given[name])


def _number(given: Mapping[str, object], name: str) -> int:
    number = given[name]
    assert isinstance(number, int)
    return number
