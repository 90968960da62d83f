"""Tiles of operands that a tensor descriptor can fetch, or addresses: one load in a kernel, chosen when it is compiled.

From sm_90 on the tensor memory accelerator (TMA) brings a tile of a regular tensor to shared memory by itself: no
addresses in registers, no masks. What a descriptor reads past the end of an axis is 0, as with a mask. Rows that are
gathered by token have no descriptor.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_fast.tiles import Tile

ALIGNED_BYTES = 16
"""Of the first element and of every stride but the last: what cuTensorMapEncodeTiled asks for."""


@triton.jit
def weights_at(w, expert, n, k, stride_E, stride_N, stride_K, LOADS: tl.constexpr):
    """Addresses of the (k, n) elements of an expert's weights; an offset of 0 where a descriptor is asked instead."""
    if LOADS == "addresses":
        # Experts and features times their strides can pass 2^31, in whatever order a view has them.
        wide_n, wide_k = n.to(tl.int64), k.to(tl.int64)
        return w + expert.to(tl.int64) * stride_E + wide_n[None, :] * stride_N + wide_k[:, None] * stride_K
    else:
        return tl.full((), 0, tl.int64)


@triton.jit
def weight_tile(w, w_at, mask, expert, g, first_n, first_k, LOADS: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_K: tl.constexpr):
    """(BLOCK_K, BLOCK_N) of w[expert, g] transposed, from first_n and first_k, or where w_at is; 0 outside."""
    if LOADS == "addresses":
        return tl.load(w_at, mask=mask, other=0.0)
    elif LOADS == "rows":
        return w.load([expert, g, first_n, first_k]).reshape(BLOCK_N, BLOCK_K).T
    else:
        return w.load([expert, g, first_k, first_n]).reshape(BLOCK_K, BLOCK_N)


@triton.jit
def rows_at(rows, position, k, stride_R, LOADS: tl.constexpr):
    """Addresses of the (position, k) elements; an offset of 0 where a descriptor is asked instead."""
    if LOADS == "addresses":
        return rows + position.to(tl.int64)[:, None] * stride_R + k[None, :]
    else:
        return tl.full((), 0, tl.int64)


@triton.jit
def row_tile(rows, at, mask, first_row, g, first_k, LOADS: tl.constexpr, BLOCK_M: tl.constexpr,
             BLOCK_K: tl.constexpr):
    """(BLOCK_M, BLOCK_K) of rows[first_row:, g, first_k:], or where `at` is; 0 outside of the tensor.

    A descriptor also brings rows past a block's own, which its kernel must not use.
    """
    if LOADS == "addresses":
        return tl.load(at, mask=mask, other=0.0)
    else:
        return rows.load([first_row, g, first_k]).reshape(BLOCK_M, BLOCK_K)


def weight_operand(w_EGNK: torch.Tensor, tile: Tile) -> tuple[torch.Tensor | TensorDescriptor, str]:
    """The weights as a kernel takes them, and its LOADS: "rows" or "columns", whichever lie side by side, or
    "addresses" where the tile wants no descriptors or strides allow none.
    """
    if tile.descriptors and describable(w_EGNK):
        return TensorDescriptor.from_tensor(w_EGNK, [1, 1, tile.block_n, tile.block_k]), "rows"
    if tile.descriptors and describable(w_EGKN := w_EGNK.transpose(2, 3)):
        return TensorDescriptor.from_tensor(w_EGKN, [1, 1, tile.block_k, tile.block_n]), "columns"
    return w_EGNK, "addresses"


def row_operand(rows_RGK: torch.Tensor, tile: Tile) -> tuple[torch.Tensor | TensorDescriptor, str]:
    """Rows in expert order as a kernel takes them, and its LOADS."""
    if tile.descriptors and describable(rows_RGK):
        return TensorDescriptor.from_tensor(rows_RGK, [tile.block_m, 1, tile.block_k]), "rows"
    return rows_RGK, "addresses"


def describable(tensor: torch.Tensor) -> bool:
    """Whether a descriptor can be made of it: cuTensorMapEncodeTiled, CUDA driver API."""
    size, (*strides, last) = tensor.element_size(), tensor.stride()
    aligned = all(stride * size % ALIGNED_BYTES == 0 and stride > 0 for stride in strides)
    # Of a meta tensor the address is that of its first element in its storage.
    return last == 1 and aligned and tensor.storage_offset() * size % ALIGNED_BYTES == 0 and \
        tensor.data_ptr() % ALIGNED_BYTES == 0 and 0 not in tensor.shape
