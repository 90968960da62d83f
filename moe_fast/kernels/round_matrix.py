"""Plain weights as 8-bit codes, a scale for each row along the sum of a product: rows as they are, or columns."""

import torch
import triton
import triton.language as tl

from moe_fast.kernels.round_rows import code_under, magnitude, scale_of
from moe_fast.launch import launch
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.vocabulary import Scheme

_BLOCK, _BLOCK_INTERPRETED, _WARPS = (64, 64), (64, 512), 4


@triton.jit
def round_matrix_kernel(matrix, codes, scales, num_parts, num_rows, num_outer, num_inner, stride_E, stride_P, stride_N,
                        stride_A, stride_B, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """codes[e, p, n, k] = e4m3(matrix[e, p, n, a, b] / scales[e, p, n]), k = a * num_inner + b; codes lie by k."""
    blocks, num_columns = tl.cdiv(num_rows, BLOCK_N), num_outer * num_inner
    group = tl.program_id(0) // blocks
    n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = n < num_rows
    first = (group // num_parts).to(tl.int64) * stride_E + (group % num_parts).to(tl.int64) * stride_P
    rows_at = matrix + first + n.to(tl.int64)[:, None] * stride_N
    row = group.to(tl.int64) * num_rows + n
    largest = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, num_columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        along = (k // num_inner).to(tl.int64) * stride_A + (k % num_inner).to(tl.int64) * stride_B
        tile = tl.load(rows_at + along[None, :], mask=in_rows[:, None] & (k < num_columns)[None, :], other=0.0)
        largest = tl.maximum(largest, tl.max(magnitude(tile.to(tl.float32)), axis=1))
    scale = scale_of(largest, False)
    tl.store(scales + row, scale, mask=in_rows)
    for start in range(0, num_columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = in_rows[:, None] & (k < num_columns)[None, :]
        along = (k // num_inner).to(tl.int64) * stride_A + (k % num_inner).to(tl.int64) * stride_B
        tile = tl.load(rows_at + along[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(codes + row[:, None] * num_columns + k[None, :], code_under(tile, scale[:, None]), mask=inside)


def rounded_rows(w_EGNK: torch.Tensor) -> Encoded:
    """Codes (E, G, N, K) and scales (E, G, N, 1) of weights of any strides: what a sum over K multiplies."""
    return _rounded(w_EGNK[:, :, :, None])


def rounded_columns(w_EGNK: torch.Tensor) -> Encoded:
    """Codes (E, K, G * N) and scales (E, K, 1): what a sum over the rows of all G multiplies; rounded anew."""
    rounded = _rounded(w_EGNK.permute(0, 3, 1, 2)[:, None])
    return rounded.mapped(lambda one: one[:, 0])


def _rounded(matrix_EPNAB: torch.Tensor) -> Encoded:
    """Codes (E, P, N, A * B), contiguous."""
    (num_experts, num_parts, num_rows, num_outer, num_inner), device = matrix_EPNAB.shape, matrix_EPNAB.device
    num_columns = num_outer * num_inner
    codes = torch.empty(num_experts, num_parts, num_rows, num_columns, dtype=torch.uint8, device=device)
    scales = torch.empty(num_experts, num_parts, num_rows, 1, dtype=torch.float32, device=device)
    block_n, block_k = _BLOCK_INTERPRETED if device.type == "cpu" else _BLOCK
    launch(round_matrix_kernel, (num_experts * num_parts * triton.cdiv(num_rows, block_n),), device,
           matrix=matrix_EPNAB, codes=codes, scales=scales, num_parts=num_parts, num_rows=num_rows, num_outer=num_outer,
           num_inner=num_inner, **{f"stride_{axis}": stride for axis, stride in zip("EPNAB", matrix_EPNAB.stride(),
                                                                                   strict=True)},
           BLOCK_N=block_n, BLOCK_K=block_k, num_warps=_WARPS)
    return Encoded(scheme=Scheme.FP8_ROW, codes=codes.view(torch.float8_e4m3fn), scales=scales, num_columns=num_columns)
