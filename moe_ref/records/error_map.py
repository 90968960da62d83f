"""Where a failing stage is wrong: the largest error / allowed of each bin of rows and columns, a byte each, as text."""

import base64
import binascii
import zlib

import msgspec

MOST_BINS = 96
WITHIN, BEYOND = 16, 255
"""The last level that is allowed, and that of infinity."""

PROFILE = 64
"""Rows after which a profile begins again: the places of a row in a tile of 16, 32 or 64."""

_MOST_NUMBER = 2**53


class ErrorMap(msgspec.Struct, frozen=True, kw_only=True):
    """A stage in bins of row_step x column_step elements, at most MOST_BINS each way.

    rows: what a row is and how they are sorted, in words. cells: levels, row by row. A level is a byte: 0 where nothing
    was compared, l where the largest error / allowed lies above 2^(l - 17) and not above 2^(l - 16), 1 also for less,
    BEYOND for infinity; up to WITHIN all is allowed. experts: (row, expert) where the rows of one begin; of several in
    a bin the first. ranks: (column, tp rank) where a shard begins. row_ranks: (row, rank) where the first rank that
    shows a row changes. profile: levels by row within its expert mod PROFILE, or by token, or by row of a parameter.
    tails: sizes of tiles of whose last, partial ones all rows are wrong, and no others.
    """

    rows: str
    num_rows: int
    num_columns: int
    row_step: int
    column_step: int
    cells: str
    experts: list[tuple[int, int]] = []
    ranks: list[tuple[int, int]] = []
    row_ranks: list[tuple[int, int]] = []
    profile: str = ""
    tails: list[int] = []

    @property
    def num_bins(self) -> tuple[int, int]:
        """Bins of rows and of columns."""
        return -(-self.num_rows // self.row_step), -(-self.num_columns // self.column_step)

    def levels(self) -> list[bytes]:
        """One byte string per bin of rows; raises ValueError where sizes or cells are no map."""
        sizes = (self.num_rows, self.num_columns, self.row_step, self.column_step)
        if not all(0 < size <= _MOST_NUMBER for size in sizes):
            raise ValueError(f"sizes {sizes}, but should be positive numbers")
        height, width = self.num_bins
        if max(height, width) > MOST_BINS:
            raise ValueError(f"{height} x {width} bins, but should be at most {MOST_BINS} each way")
        cells = unpack(self.cells, height * width)
        return [cells[start:start + width] for start in range(0, len(cells), width)]

    def profile_levels(self) -> bytes:
        """Levels of the profile, b"" without one; raises ValueError where they are none."""
        return unpack(self.profile, PROFILE) if self.profile else b""


def pack(levels: bytes) -> str:
    """Levels as text, zlib in base64."""
    return base64.b64encode(zlib.compress(levels, 9)).decode()


def unpack(text: str, size: int) -> bytes:
    """So many levels out of their text; raises ValueError for any other number, and reads no further than that."""
    try:
        reader = zlib.decompressobj()
        levels = reader.decompress(base64.b64decode(text, validate=True), size + 1)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise ValueError(f"levels that cannot be read: {error}") from error
    if len(levels) != size or not reader.eof:
        raise ValueError(f"{'more than ' if len(levels) > size else ''}{min(len(levels), size)} levels, but should be "
                         f"{size}")
    return levels
