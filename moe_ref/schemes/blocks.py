"""What the encoders share: a matrix that can be encoded, its blocks, and quotients by their scales.

Every encoder rounds w / scale, computed in fp32, to the nearest code, ties to even, and clamps it to the last code.
With its scale an element is therefore off by at most

    max(half a step between the codes around it, what |w| has beyond the last code) * scale

and by 2^-24 of |w| for the quotient. A block of zeros has scale 1 and decodes to zeros.
"""

import torch

from moe_ref.contract.dtypes import PLAIN_DTYPES
from moe_ref.contract.encoded import packed
from moe_ref.contract.errors import UsageTypeError, raise_faults
from moe_ref.contract.schemes import Encoding

LARGEST = torch.finfo(torch.float32).max


def checked(w_NK: torch.Tensor) -> torch.Tensor:
    """The matrices (L, N, K) in fp64; any leading axes L.

    UsageTypeError for other dtypes than fp64, fp32, fp16 and bf16, UsageValueError for an axis that is missing or empty
    and for what is not finite or beyond fp32.
    """
    if not isinstance(w_NK, torch.Tensor) or w_NK.dtype not in PLAIN_DTYPES:
        raise UsageTypeError(f"matrix to encode: {getattr(w_NK, 'dtype', type(w_NK).__name__)}, but should be a tensor "
                             f"of {', '.join(map(str, PLAIN_DTYPES))}")
    values_NK = w_NK.double()
    beyond = int((~(values_NK.abs() <= LARGEST)).sum())
    faults = [] if w_NK.dim() > 1 and w_NK.numel() else [
        f"shape {tuple(w_NK.shape)}, but should be (L, N, K) with sizes above 0"]
    faults += [f"{beyond} elements are not finite or beyond fp32, but should be 0"] if beyond else []
    raise_faults("matrix to encode", faults)
    return values_NK


def in_blocks(values_NK: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    """(L, row blocks, rows, column blocks, columns), the last blocks filled up with zeros."""
    num_rows, num_columns = values_NK.shape[-2:]
    rows, columns = encoding.rows or num_rows, encoding.columns or num_columns
    filled = torch.nn.functional.pad(values_NK, (0, -num_columns % columns, 0, -num_rows % rows))
    return filled.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))


def largest(values_NK: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    """The largest absolute value of every block, (L, row blocks, column blocks)."""
    return in_blocks(values_NK.abs(), encoding).amax((-3, -1))


def spread(per_block: torch.Tensor, values_NK: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    """One number for every element, (L, N, K), from one for every block."""
    num_rows, num_columns = values_NK.shape[-2:]
    by_row = per_block.repeat_interleave(encoding.rows or num_rows, -2)[..., :num_rows, :]
    return by_row.repeat_interleave(encoding.columns or num_columns, -1)[..., :num_columns]


def quotient(values_NK: torch.Tensor, scales: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    """w / scale, (L, N, K) in fp32, rounded once: fp64 has more than twice its bits."""
    return (values_NK / spread(scales.double(), values_NK, encoding)).float()


def e4m3(values: torch.Tensor) -> torch.Tensor:
    """Nearest codes of fp32 values, ties to even, saturating; torch's own cast did not saturate before 2.12."""
    return values.clamp(-448, 448).to(torch.float8_e4m3fn)


def e2m1(values_NK: torch.Tensor) -> torch.Tensor:
    """Nearest codes of fp32 values, two to a byte, ties to even, saturating at 6; a zero keeps the sign of its value.

    Numbers are whole multiples of 1/2 below 2, of 1 below 4, of 2 up to 6, so that an even multiple is an even code.
    """
    size = values_NK.abs().clamp(max=6)
    unit = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    number = torch.round(size / unit) * unit
    code = torch.bucketize(number, torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=number.device))
    return packed(code + 8 * torch.signbit(values_NK))
