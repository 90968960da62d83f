"""Scales in the orders in which kernels read them, and exactly back: no number changes, so that a layer can be checked
from what a kernel was really handed.

Where all scales are equal, every order of them is right: only scales that differ between neighbours tell one from
another. Padding is zero. Each function takes any leading axes L and returns tensors of its own.
"""

import torch
from torch.nn.functional import pad

from moe_ref.contract.errors import UsageTypeError, UsageValueError, raise_faults

TILE_ROWS, TILE_BLOCKS = 128, 4
TMA_BYTES = 16
GROUPED = tuple(i + 8 * j for i in range(8) for j in range(8))
SINGLE = tuple(2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25))
"""Marlin's orders of 64 and of 32 columns of N (IST-DASLab/marlin; vLLM quantization/utils/marlin_utils.py)."""


def to_blackwell(scales: torch.Tensor) -> torch.Tensor:
    """Block scales (L, N, blocks) of 8 bits in NVIDIA's tiles of 128 rows x 4 blocks, (L, elements): tile by tile along
    the blocks first, and in a tile rows r, r + 32, r + 64, r + 96 side by side.

    Both axes are padded to whole tiles. Source: cuBLAS documentation, "1D Block Scaling Factors Layout".
    """
    num_rows, num_blocks = scales.shape[-2:]
    # Not every operation has 8-bit floats: the bytes are moved.
    padded = pad(scales.view(torch.uint8), (0, -num_blocks % TILE_BLOCKS, 0, -num_rows % TILE_ROWS))
    tiles = padded.unflatten(-1, (-1, TILE_BLOCKS)).unflatten(-3, (-1, 4, 32))
    # (row tiles, 4, 32, block tiles, 4) -> (row tiles, block tiles, 32, 4, 4)
    return tiles.movedim(-2, -4).transpose(-3, -2).flatten(-5).contiguous().view(scales.dtype)


def from_blackwell(stored: torch.Tensor, num_rows: int, num_blocks: int) -> torch.Tensor:
    """Block scales (L, N, blocks); raises UsageValueError where so many do not fill these tiles."""
    row_tiles, block_tiles = -(-num_rows // TILE_ROWS), -(-num_blocks // TILE_BLOCKS)
    _check_size("stored", stored.shape[-1], row_tiles * TILE_ROWS * block_tiles * TILE_BLOCKS,
                f"{num_rows} x {num_blocks} scales")
    tiles = stored.view(torch.uint8).unflatten(-1, (row_tiles, block_tiles, 32, 4, TILE_BLOCKS))
    rows = tiles.transpose(-3, -2).movedim(-4, -2).flatten(-2).flatten(-4, -2)
    return rows[..., :num_rows, :num_blocks].contiguous().view(stored.dtype)


def to_column_major(scales: torch.Tensor) -> torch.Tensor:
    """fp32 scales (L, N, blocks) as DeepGEMM reads them, (L, N, blocks) with the rows side by side: the stride of a row
    is 1, of a block N rounded up to 16 bytes, as TMA wants it.

    Source: DeepGEMM README, get_mn_major_tma_aligned_tensor.
    """
    _check_dtype("scales", scales, torch.float32)
    return _column_major(scales)


def from_column_major(stored: torch.Tensor) -> torch.Tensor:
    """Contiguous scales (L, N, blocks), fp32; raises UsageValueError for strides that are not to_column_major's."""
    _check_dtype("stored", stored, torch.float32)
    _check_strides(stored)
    return stored.contiguous()


def to_packed_exponents(scales: torch.Tensor) -> torch.Tensor:
    """fp32 powers of two (L, N, blocks) as DeepGEMM's packed UE8M0: int32 (L, N, ceil(blocks / 4)), four exponents to a
    word, the first in the lowest byte, words with strides as in to_column_major.

    Raises UsageValueError for a scale that is no power of two, or none that an exponent plus 127 from 1 to 254 says.
    Source: DeepGEMM README, get_mn_major_tma_aligned_packed_ue8m0_tensor.
    """
    _check_dtype("scales", scales, torch.float32)
    bits = scales.contiguous().view(torch.int32)
    exponents = bits >> 23
    wrong = ((bits & 0x7FFFFF) != 0) | (exponents < 1) | (exponents > 254)
    if wrong.any():
        raise UsageValueError(f"scales: {float(scales[wrong][0])!r}, but should be powers of two from 2^-126 to 2^127")
    padded = pad(exponents.to(torch.uint8), (0, -scales.shape[-1] % 4))
    return _column_major(padded.contiguous().view(torch.int32))


def from_packed_exponents(stored: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """fp32 scales (L, N, blocks); raises UsageValueError where so many do not fill these words, and for strides that
    are not to_column_major's."""
    _check_dtype("stored", stored, torch.int32)
    _check_size("stored", stored.shape[-1], -(-num_blocks // 4), f"{num_blocks} blocks, four to a word")
    _check_strides(stored)
    exponents = stored.contiguous().view(torch.uint8)[..., :num_blocks].to(torch.int32)
    return (exponents << 23).view(torch.float32)


def to_marlin(scales: torch.Tensor, *, single: bool) -> torch.Tensor:
    """Group scales (L, N, groups) as Marlin's kernels read them, (L, groups, N): rows in its order of 64, or of 32
    where there is a single group.

    single is whether the matrix that the kernel is handed has one group of columns, a rank's part of w2 if it is that:
    what tells are the columns K of this very matrix, never the rank's part of another axis. marlin_single says it.
    Raises UsageValueError for an N that is no multiple of 64 or 32.
    """
    order = _marlin_order(scales.shape[-2], single)
    return scales.mT.unflatten(-1, (-1, len(order)))[..., order].flatten(-2)


def from_marlin(stored: torch.Tensor, *, single: bool) -> torch.Tensor:
    """Group scales (L, N, groups)."""
    order = _marlin_order(stored.shape[-1], single)
    return stored.unflatten(-1, (-1, len(order)))[..., order.argsort()].flatten(-2).mT.contiguous()


def marlin_single(num_columns: int, group_size: int | None) -> bool:
    """Whether Marlin takes the columns of a matrix for a single group: None is a group of all of them."""
    return group_size is None or group_size >= num_columns


def to_interleaved(tensor: torch.Tensor) -> torch.Tensor:
    """Gate and up (L, 2, N, K) as rows that take turns, (L, 2N, K), as gpt-oss stores codes and scales; raises
    UsageValueError for another number of projections.

    Scales must have a row for each of the matrix: those of blocks of rows belong to one projection and stay apart.
    """
    _check_size("axis of gate and up", tensor.shape[-3], 2, "gate and up")
    return tensor.transpose(-3, -2).flatten(-3, -2)


def from_interleaved(stored: torch.Tensor) -> torch.Tensor:
    """Gate and up (L, 2, N, K), contiguous; raises UsageValueError for an odd number of rows."""
    if stored.shape[-2] % 2:
        raise UsageValueError(f"stored: {stored.shape[-2]} rows, but should be even: gate and up take turns")
    return stored.unflatten(-2, (-1, 2)).transpose(-3, -2).contiguous()


def _aligned(num_rows: int) -> int:
    """Rows of 4 bytes each, out to a multiple of 16 bytes."""
    per_line = TMA_BYTES // 4
    return -(-num_rows // per_line) * per_line


def _column_major(words: torch.Tensor) -> torch.Tensor:
    num_rows = words.shape[-2]
    return pad(words.mT, (0, _aligned(num_rows) - num_rows)).contiguous().mT[..., :num_rows, :]


def _check_strides(stored: torch.Tensor) -> None:
    wanted = (1, _aligned(stored.shape[-2]))
    if stored.stride()[-2:] != wanted:
        raise UsageValueError(f"stored: strides {stored.stride()[-2:]} of rows and blocks, but should be {wanted}")


def _marlin_order(num_rows: int, single: bool) -> torch.Tensor:
    order = SINGLE if single else GROUPED
    if num_rows % len(order):
        raise UsageValueError(f"{num_rows} rows, but should be a multiple of {len(order)} with "
                              f"{'a single group' if single else 'several groups'}")
    return torch.tensor(order)


def _check_dtype(name: str, tensor: torch.Tensor, wanted: torch.dtype) -> None:
    if tensor.dtype != wanted:
        raise UsageTypeError(f"{name}: dtype {tensor.dtype}, but should be {wanted}")


def _check_size(name: str, held: int, wanted: int, of: str) -> None:
    raise_faults(name, [f"{held} elements, but should be {wanted} of {of}"] if held != wanted else [])
