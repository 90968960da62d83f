"""Reading a block of a stored tensor by ranges of its axis letters; a view wherever strides can express it."""

from collections.abc import Mapping
from math import prod
from typing import Any, Protocol

import torch

from moe_ref.layouts.layout import Axes


class Stored(Protocol):
    """A tensor, or anything with a shape that yields a tensor for a tuple of slices, as safetensors slices do."""

    @property
    def shape(self) -> Any: ...
    def __getitem__(self, index: Any, /) -> torch.Tensor: ...


def read_block(stored: Stored, axes: Axes, sizes: Mapping[str, int], ranges: Mapping[str, range],
               order: str) -> torch.Tensor:
    """The block in which every letter runs over its range (all of it where none is given), one dimension per
    letter of `order`.

    A view, unless a range inside a joint axis leaves gaps, as a rank's columns of gate and of up do in a merged
    axis; then the pieces are read one by one and copied together.
    """
    letters = "".join(axes)
    full = {letter: ranges.get(letter, range(sizes[letter])) for letter in letters}
    block = _read(stored, axes, sizes, full)
    return block.permute([letters.index(letter) for letter in order])


def _read(stored: Stored, axes: Axes, sizes: Mapping[str, int], ranges: Mapping[str, range]) -> torch.Tensor:
    for group in axes:
        if (split := _gap(group, sizes, ranges)) is not None:
            pieces = [_read(stored, axes, sizes, {**ranges, split: range(i, i + 1)}) for i in ranges[split]]
            return torch.cat(pieces, "".join(axes).index(split))
    block = stored[tuple(_flat(group, sizes, ranges) for group in axes)]
    for position, letter in enumerate("".join(axes)):
        inner = next(group for group in axes if letter in group).partition(letter)[2]
        if inner:
            block = block.unflatten(position, (len(ranges[letter]), prod(len(ranges[other]) for other in inner)))
    return block


def _gap(group: str, sizes: Mapping[str, int], ranges: Mapping[str, range]) -> str | None:
    """The letter to split on: its range has several values, and a letter inside it is not read whole."""
    for position, letter in enumerate(group):
        if len(ranges[letter]) > 1:
            partial = any(len(ranges[inner]) < sizes[inner] for inner in group[position + 1:])
            return letter if partial else None
    return None


def _flat(group: str, sizes: Mapping[str, int], ranges: Mapping[str, range]) -> slice:
    start = 0
    for letter in group:
        start = start * sizes[letter] + ranges[letter].start
    return slice(start, start + prod(len(ranges[letter]) for letter in group))
