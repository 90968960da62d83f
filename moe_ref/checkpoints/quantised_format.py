"""How a format stores one encoded matrix: the tensors that stand for it, and functions there and back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import lcm
from typing import Literal, NamedTuple

import torch

from moe_ref.contract.encoded import Encoded
from moe_ref.contract.vocabulary import Scheme
from moe_ref.layouts.layout import Layout

WIDENED = ("F32", "BF16", "F16")
"""Dtypes of scales that fp32 holds exactly."""


class Axis(NamedTuple):
    """One axis of a stored tensor.

    kind: "rows" or "columns" of the matrix, of which every entry stands for `size`; "groups": of runs of `size`
    columns, but read whole, since columns may be of any group; "whole": of `size` entries whatever the matrix is.
    """

    kind: Literal["rows", "columns", "groups", "whole"]
    size: int = 1

    def entries(self, num_rows: int, num_columns: int) -> int:
        """How many it has."""
        if self.kind == "whole":
            return self.size
        return -(-(num_rows if self.kind == "rows" else num_columns) // self.size)


class Part(NamedTuple):
    """One stored tensor of a matrix: its axes, outermost first, and the dtypes that it may have in a header."""

    axes: tuple[Axis, ...]
    dtypes: tuple[str, ...]

    def shape(self, num_rows: int, num_columns: int) -> tuple[int, ...]:
        """Of a matrix of so many rows and columns."""
        return tuple(axis.entries(num_rows, num_columns) for axis in self.axes)


Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class QuantisedFormat:
    """A format as one checkpoint's configuration says it.

    parts: name of the tensor -> what it is; the name follows that of the module, behind `joint`. encode: from tensors
    by name, each (L, its axes) of the same leading axes L, and the number of columns to the matrices (L, N, K); the
    tensors may be of whole matrices, or of runs of rows and columns that begin and end between packed words and blocks.
    store: back. input_scale: name of the fixed scale of the rows that a product takes, one fp32 number. shape: name of
    a tensor that holds [N, K]. unread: names that may stand beside them and change nothing that is read.
    packed: multiples that the rows and columns must have. layout: where gate and up lie, if not as the naming says.
    skips: whether a module of that full name is left in its own dtype.
    """

    name: str
    scheme: Scheme
    parts: Mapping[str, Part]
    encode: Callable[[Tensors, int], Encoded]
    store: Callable[[Encoded], dict[str, torch.Tensor]]
    skips: Callable[[str], bool]
    joint: str = "."
    input_scale: str | None = None
    shape: str | None = None
    unread: frozenset[str] = frozenset()
    packed: tuple[int, int] = (1, 1)
    layout: Layout | None = None

    @property
    def grain(self) -> tuple[int, int]:
        """Rows and columns between which a part of a matrix can be read by itself."""
        axes = [axis for part in self.parts.values() for axis in part.axes]
        return (lcm(*(axis.size for axis in axes if axis.kind == "rows")),
                lcm(*(axis.size for axis in axes if axis.kind == "columns")))

    def shape_faults(self, module: str, num_rows: int, num_columns: int) -> list[str]:
        """A fault for each size of a matrix that its words cannot hold."""
        sizes = zip(("rows", "columns"), (num_rows, num_columns), self.packed, strict=True)
        return [f"{module}: {size} {word}, but should be a multiple of {multiple} in format {self.name}"
                for word, size, multiple in sizes if size % multiple]
