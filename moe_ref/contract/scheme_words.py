"""Schemes and encoded parts in words. Imports no torch."""

from moe_ref.contract.schemes import ENCODINGS, Codes, Encoding
from moe_ref.contract.vocabulary import Scheme


def scheme_words(scheme: Scheme) -> str:
    """As "e4m3 codes, a scale in fp32 for 128 rows x 128 columns"."""
    encoding = ENCODINGS[scheme]
    also = [words for is_so, words in ((encoding.zeros, "zero points"), (encoding.order, "columns in act-order"),
                                       (encoding.second, "a second scale in fp32 for each matrix"),
                                       (encoding.input_scale, "fixed scales of the rows that experts take")) if is_so]
    two = ", two in a byte" if encoding.codes.per_byte == 2 else ""
    return ", ".join([f"{encoding.codes} codes{two}, a scale in {encoding.scales} for {_block_words(encoding)}", *also])


def _block_words(encoding: Encoding) -> str:
    if encoding.rows is None and encoding.columns is None:
        return "each matrix"
    rows = {None: "all rows", 1: "each row"}.get(encoding.rows, f"{encoding.rows} rows")
    return rows if encoding.columns is None else f"{rows} x {encoding.columns} columns"


def encoded_words(scheme: Scheme, shape: tuple[int, ...], row_start: int, column_start: int) -> str:
    """Shapes of the codes and scales of matrices (L, N, K) that begin so far inside their first block."""
    encoding, (*leading, num_rows, num_columns) = ENCODINGS[scheme], shape
    blocks = encoding.blocks(num_rows, num_columns, row_start, column_start)
    if encoding.order:
        blocks = (blocks[0], 0)
    codes = (*leading, num_rows, -(-num_columns // encoding.codes.per_byte))
    scales = "scales of all groups" if encoding.order else f"scales {(*leading, *blocks)}"
    inside = [f"first {axis} {start} inside its block" for axis, start in (("row", row_start), ("column", column_start))
              if start]
    per_row = "" if encoding.codes is not Codes.INT4 or not encoding.zeros else ", zero points alike"
    return ", ".join([f"codes {codes}", f"{scales}{per_row}", *inside])
