"""Matrices as codes with scales, the parts of them, and their checks; what the numbers mean stands in schemes.py."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from moe_ref.contract.errors import UsageTypeError, UsageValueError, raise_faults
from moe_ref.contract.parallel import Range
from moe_ref.contract.schemes import ENCODINGS, Codes, Scales
from moe_ref.contract.vocabulary import Scheme

CODE_DTYPES = {Codes.E4M3: torch.float8_e4m3fn, Codes.INT8: torch.int8, Codes.INT4: torch.uint8,
               Codes.E2M1: torch.uint8}
SCALE_DTYPES = {Scales.FP32: (torch.float32,), Scales.HALF: (torch.float16, torch.bfloat16),
                Scales.E8M0: (torch.uint8,), Scales.E4M3: (torch.float8_e4m3fn,)}


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Matrices of N rows (out) and K columns (in) with the same leading axes L: (E, G), (E,), (G,) or none.

    codes (L, N, K), two to a byte (L, N, ceil(K / 2)), the even column in the low half; scales (L, blocks of rows,
    blocks of columns); zeros (L, N, blocks of columns), uint8; groups (L, K), int32: the block of every column, where
    it is no run; second_scale (L), fp32.
    row_start, column_start: how far inside the first block the first row and column lie, where a part was cut there.
    """

    scheme: Scheme
    codes: torch.Tensor
    scales: torch.Tensor
    num_columns: int
    zeros: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    second_scale: torch.Tensor | None = None
    row_start: int = 0
    column_start: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """(L, N, K)."""
        return (*self.codes.shape[:-1], self.num_columns)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that are present, by name."""
        held = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: one for name, one in held if isinstance(one, torch.Tensor)}

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Encoded":
        """The same with every tensor changed, as by a move to a device."""
        return replace(self, **{name: change(one) for name, one in self.tensors.items()})

    def at(self, index: int) -> "Encoded":
        """Views of one place along the first leading axis."""
        return self.mapped(lambda one: one[index])

    def experts(self, index: list[int]) -> "Encoded":
        """Copies of some places along the first axis, in that order."""
        return self.mapped(lambda one: torch.stack([one[e] for e in index]) if index else one[:0].clone())

    def rows(self, rows: Range) -> "Encoded":
        """Contiguous copies of the rows [start, stop), with every scale that they need.

        UsageValueError for rows that are not there.
        """
        _check_part("rows", rows, self.shape[-2])
        (start, stop), size = rows, ENCODINGS[self.scheme].rows
        codes = self.codes[..., start:stop, :]
        zeros = None if self.zeros is None else self.zeros[..., start:stop, :]
        if size is None:
            return self._copied(codes=codes, zeros=zeros)
        first, last = _blocks(self.row_start, rows, size)
        return self._copied(codes=codes, zeros=zeros, scales=self.scales[..., first:last, :],
                            row_start=(self.row_start + start) % size)

    def columns(self, columns: Range) -> "Encoded":
        """Contiguous copies of the columns [start, stop), with every scale that they need: of an act-order all.

        UsageValueError for columns that are not there.
        """
        _check_part("columns", columns, self.num_columns)
        (start, stop), encoding = columns, ENCODINGS[self.scheme]
        codes = self._code_columns(start, stop)
        if self.groups is not None:
            return self._copied(codes=codes, groups=self.groups[..., start:stop], num_columns=stop - start)
        if encoding.columns is None:
            return self._copied(codes=codes, num_columns=stop - start)
        first, last = _blocks(self.column_start, columns, encoding.columns)
        return self._copied(codes=codes, scales=self.scales[..., first:last], num_columns=stop - start,
                            zeros=None if self.zeros is None else self.zeros[..., first:last],
                            column_start=(self.column_start + start) % encoding.columns)

    def _code_columns(self, start: int, stop: int) -> torch.Tensor:
        if ENCODINGS[self.scheme].codes.per_byte == 1:
            return self.codes[..., start:stop]
        if start % 2 == 0:
            part = self.codes[..., start // 2:-(-stop // 2)].clone()
            if stop % 2 and stop > start:
                part[..., -1] &= 15
            return part
        return packed(unpacked(self.codes, self.num_columns)[..., start:stop])

    def copied(self) -> "Encoded":
        """Contiguous copies."""
        return self.mapped(lambda one: one.clone(memory_format=torch.contiguous_format))

    def _copied(self, **changed: object) -> "Encoded":
        return replace(self, **changed).copied()  # pyrefly: ignore


def _check_part(axis: str, part: Range, count: int) -> None:
    """A slice would clip it, or count from the end."""
    if not 0 <= part[0] <= part[1] <= count:
        raise UsageValueError(f"{axis} {part}, but should lie in 0 to {count}")


def _blocks(offset: int, part: Range, size: int) -> Range:
    """The blocks that elements [start, stop) lie in, when the first element is `offset` inside block 0."""
    start, stop = part
    first = (offset + start) // size
    return first, max(first, -(-(offset + stop) // size)) if stop > start else first


def unpacked(codes: torch.Tensor, num_columns: int) -> torch.Tensor:
    """(L, N, K), uint8 from 0 to 15, of two codes a byte."""
    return torch.stack([codes & 15, codes >> 4], -1).flatten(-2)[..., :num_columns]


def packed(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte of (L, N, K) from 0 to 15; of an odd number of columns the last byte's high half is 0."""
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, codes.shape[-1] % 2))
    return padded[..., 0::2] | padded[..., 1::2] << 4


def check_encoded(name: str, encoded: Encoded, scheme: Scheme, shape: tuple[int, ...]) -> None:
    """Raise with both numbers unless codes, scales and what goes with them fit a matrix of `shape` (L, N, K)."""
    if not isinstance(encoded, Encoded):
        raise UsageTypeError(f"{name}: {type(encoded).__name__}, but should be Encoded")
    if encoded.scheme is not scheme:
        raise UsageTypeError(f"{name}: scheme {encoded.scheme}, but should be {scheme} as the weights")
    encoding, (*leading, num_rows, num_columns) = ENCODINGS[scheme], shape
    faults = [] if encoded.num_columns == num_columns else [
        f"num_columns={encoded.num_columns}, but should be {num_columns}"]
    faults += [f"{axis}_start={start}, but should be 0 to {(size or 1) - 1}, inside the first block"
               for axis, start, size in (("row", encoded.row_start, encoding.rows),
                                         ("column", encoded.column_start, None if encoding.order else encoding.columns))
               if not 0 <= start < (size or 1)]
    blocks = encoding.blocks(num_rows, num_columns, encoded.row_start, encoded.column_start)
    if encoding.order and isinstance(encoded.scales, torch.Tensor) and encoded.scales.dim():
        blocks = (blocks[0], encoded.scales.shape[-1])  # a part has columns of any of all groups
    if num_rows == 0 and encoding.rows is not None:
        blocks = (0, blocks[1])
    if num_columns == 0 and encoding.columns is not None and not encoding.order:
        blocks = (blocks[0], 0)
    wanted: dict[str, tuple[int, ...]] = {
        "codes": (*leading, num_rows, -(-num_columns // encoding.codes.per_byte)), "scales": (*leading, *blocks)}
    wanted |= {"zeros": (*leading, num_rows, blocks[1])} if encoding.zeros else {}
    wanted |= {"groups": (*leading, num_columns)} if encoding.order else {}
    wanted |= {"second_scale": tuple(leading)} if encoding.second else {}
    held = encoded.tensors
    faults += [f"{part} is missing, but should be {size}" for part, size in wanted.items() if part not in held]
    faults += [f"{part} is given, but {scheme} has none" for part in held if part not in wanted]
    faults += [f"{part}: shape {tuple(one.shape)}, but should be {wanted[part]}" for part, one in held.items()
               if part in wanted and tuple(one.shape) != wanted[part]]
    raise_faults(name, faults)
    _check_dtypes(name, encoded)


def _check_dtypes(name: str, encoded: Encoded) -> None:
    encoding = ENCODINGS[encoded.scheme]
    allowed = {"codes": (CODE_DTYPES[encoding.codes],), "scales": SCALE_DTYPES[encoding.scales],
               "zeros": (torch.uint8,), "groups": (torch.int32,), "second_scale": (torch.float32,)}
    for part, one in encoded.tensors.items():
        if one.dtype not in allowed[part]:
            raise UsageTypeError(f"{name}: {part}: dtype {one.dtype}, but should be "
                                 f"{' or '.join(str(dtype) for dtype in allowed[part])} [{encoded.scheme}]")
        if one.device != encoded.codes.device:
            raise UsageTypeError(f"{name}: {part}: device {one.device}, but should be {encoded.codes.device} as codes")


def stacked(parts: list[Encoded], count: int) -> Encoded:
    """The first `count` of these side by side along a new first axis; at least one is given, for its shape."""
    first = parts[0]
    side_by_side = {name: torch.stack([part.tensors[name] for part in parts])[:count] for name in first.tensors}
    return replace(first, **side_by_side)  # pyrefly: ignore
