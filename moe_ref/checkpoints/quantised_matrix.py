"""One encoded parameter of a layer, read expert by expert: the stored tensors of a rank's part, decoded by no one."""

from collections.abc import Mapping
from itertools import starmap

import torch

from moe_ref.checkpoints.quantised_format import Axis
from moe_ref.checkpoints.quantised_names import LayerNames, MatrixNames
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.parallel import Parallel, Range
from moe_ref.contract.placements import part_range, placements
from moe_ref.layouts.blocks import Stored, read_block
from moe_ref.layouts.stored import Part, layout_sizes, parameter_name

E, GROUPS, WHOLE = "E", "Q", "S"
"""Axis letters beside those of rows and columns: experts, groups of columns, and an axis of the format's own."""


class QuantisedMatrix:
    """w13 or w2, of the routed experts or the shared one, as `rank` holds it."""

    def __init__(self, names: LayerNames, part: Part, parameter: str, stored: Mapping[str, Stored],
                 parallel: Parallel, rank: int) -> None:
        self._names, self._stored, self._matrices = names, stored, names.matrices(part, parameter)
        self._stacked = part == "experts" and names.layout(part).stacked
        self._flipped = not names.layout(part).gate_first
        self._gated = parameter == "w13"
        sizes = layout_sizes(names.spec, part)[self._matrices[0].key]
        self._letters = self._matrices[0].rows.replace("G", ""), self._matrices[0].columns
        canonical = parameter_name(parameter, part)
        kind = placements(parallel)[canonical].kind
        whole = tuple((0, sizes[letter]) for letter in self._letters)
        cut = [kind == "colwise", kind == "rowwise"]
        self._part: tuple[Range, ...] = tuple(
            part_range(canonical, stop, parallel, rank) if is_cut else (start, stop)
            for (start, stop), is_cut in zip(whole, cut, strict=True))
        self._read_ranges = tuple(starmap(_outward, zip(self._part, whole, names.format.grain, strict=True)))
        self._sizes = dict(zip(self._letters, (stop for _, stop in whole), strict=True))

    def read(self, e: int | None) -> Encoded:
        """That of one expert or of the shared one, None: w13 (G, N, K), w2 (N, K), contiguous."""
        (first_row, _), (first_column, last_column) = self._read_ranges
        tensors = self._tensors(e)
        try:
            encoded = self._names.format.encode(tensors, last_column - first_column)
        except UsageValueError as error:
            raise UsageValueError(f"{self._module(self._matrices[0], e)}: {error}") from error
        (row, row_end), (column, column_end) = self._part
        part = encoded.rows((row - first_row, row_end - first_row))
        return part.columns((column - first_column, column_end - first_column))

    def input_scale(self, e: int | None) -> torch.Tensor:
        """The fixed scale of the rows that it takes; raises UsageValueError where gate and up differ in it."""
        suffix = self._names.format.input_scale
        assert suffix
        scales = {name: self._stored[name][()][0]
                  for name in (self._names.tensor(self._module(one, e), suffix) for one in self._matrices)}
        if len({float(scale) for scale in scales.values()}) > 1:
            raise UsageValueError(", ".join(f"{name}: {float(scale):g}" for name, scale in scales.items())
                                  + ", but should be the same: gate and up take the same rows")
        return next(iter(scales.values()))

    def _module(self, one: MatrixNames, e: int | None) -> str:
        return one.modules[e if e is not None and len(one.modules) > 1 else 0]

    def _tensors(self, e: int | None) -> dict[str, torch.Tensor]:
        found = {}
        for suffix, part in self._names.format.parts.items():
            read = [self._read(one, self._names.tensor(self._module(one, e), suffix), part.axes, e)
                    for one in self._matrices]
            if not self._gated:
                found[suffix] = read[0]
            elif "G" in self._matrices[0].rows:
                found[suffix] = read[0].flip(0) if self._flipped else read[0]
            else:
                found[suffix] = torch.stack(read)
        return found

    def _read(self, one: MatrixNames, name: str, axes: tuple[Axis, ...], e: int | None) -> torch.Tensor:
        """A block of one tensor: (G where it holds both, then its axes)."""
        row, column = self._letters
        letters = {"rows": one.rows, "columns": one.columns, "groups": GROUPS, "whole": WHOLE}
        place = {"rows": 0, "columns": 1}
        sizes, ranges = {"G": 2, E: self._names.spec.num_experts}, {}
        for axis in axes:
            letter = {"rows": row, "columns": column}.get(axis.kind, letters[axis.kind])
            sizes[letter] = axis.entries(self._sizes[row], self._sizes[column])
            if axis.kind in place:
                start, stop = self._read_ranges[place[axis.kind]]
                ranges[letter] = range(start // axis.size, -(-stop // axis.size))
        groups = tuple(letters[axis.kind] for axis in axes)
        if self._stacked:
            groups = (E, *groups)
            ranges[E] = range(e or 0, (e or 0) + 1)
        joined = "".join(groups)
        order = "".join(sorted(joined, key=lambda letter: (letter != E, letter != "G")))
        block = read_block(self._stored[name], groups, sizes, ranges, order)
        return block[0] if self._stacked else block


def _outward(part: Range, whole: Range, grain: int) -> Range:
    """The range that begins and ends between words and blocks, or where the matrix ends."""
    start, stop = part
    return start // grain * grain, min(-(-stop // grain) * grain, whole[1])
