"""Protects layers so large that an offset does not fit in 32 bits: a kernel that forgets it reads other numbers.

Memory that nobody touches costs nothing, so every launch here is real: the same rows lie once by themselves, and once
far into tensors of more than 2^31 elements. Both results must have the same bits. Numbers are small integers, so that
sums are exact in whatever order a tile has them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from moe_fast.architecture import assuming
from moe_fast.form import Form
from moe_fast.interpreter import IntegerOverflowError, checking, rewrite
from moe_fast.interpreter import launch as interpreter
from moe_fast.kernels import (
    act_gradient,
    align,
    bias_gradient,
    bias_product,
    combine,
    decoded_down,
    decoded_gate_up,
    down,
    down_gradient,
    drop,
    drop_gradient,
    gate_up,
    gather_sum,
    product,
    projection_gradient,
    round_columns,
    round_matrix,
    round_rows,
    route,
    row_gradient,
    scaled_dot,
    scaled_down,
    scaled_gate_up,
    scaled_projection_gradient,
    scaled_weight_gradient,
    select,
    select_gradient,
    take,
    weight_gradient,
)
from moe_fast.kernels.align import Alignment
from moe_fast.kernels.round_columns import Places, RoundedColumns
from moe_fast.kernels.round_rows import RoundedRows
from moe_fast.launch import recording
from moe_fast.tiles import Load, Tile, gemm_tile
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.spec import Capacity, Router
from moe_ref.contract.vocabulary import Scheme
from tests.test_compile import started

Tensor = torch.Tensor
Results = tuple[Tensor, ...]

BF16, FP32 = torch.bfloat16, torch.float32
ROWS, PITCH = 2**21, 1024
"""Rows before those that are looked at, and numbers from one row to the next: 2^31 numbers."""
TOKENS = 2**28
"""The same where a token has eight numbers, as in a router."""
PLACES = 2**27
"""Places before those that are looked at, of which every column has as many."""
NARROW = 130
"""Wider than the tiles of a small shape: an axis of it crosses their borders."""
RELU = Form("relu")


def sparse(*shape: int, dtype: torch.dtype) -> Tensor:
    """Pages of zeros that the system gives when they are touched."""
    return torch.empty(shape, dtype=dtype)


def integers(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """-2 to 2, the same for the same shape."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-2, 3, shape, generator=generator).to(dtype)


class Near:
    """The rows by themselves. width: of rows whose width is free."""

    def __init__(self, width: int) -> None:
        self.width = width

    def rows(self, tensor: Tensor, before: int = 0, pitch: int = 0) -> Tensor:
        """A tensor by routed row, or by expert's position."""
        return tensor

    def tokens(self, tensor: Tensor) -> Tensor:
        """A tensor by token, two rows to each."""
        return tensor

    def many(self, tensor: Tensor, fewer: int = 0) -> Tensor:
        """A contiguous tensor by token of a router."""
        return tensor

    def numbers(self, rows: Tensor) -> Tensor:
        """A table by row that holds numbers of rows."""
        return rows

    def view(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that may have any strides."""
        return tensor

    def alignment(self) -> Alignment:
        """Eight rows of four tokens over three experts."""
        return align.align(torch.tensor([[0, 2], [1, 2], [2, 0], [1, 0]]), torch.arange(3), 16)

    def places(self) -> Places:
        """Of three experts, sixteen each."""
        return Places(16 * torch.arange(4, dtype=torch.int32), 48)

    def along(self, codes_NP: Tensor) -> Tensor:
        """Codes by place."""
        return codes_NP


class FarRows(Near):
    """The rows are the last of many."""

    def rows(self, tensor: Tensor, before: int = ROWS, pitch: int = PITCH) -> Tensor:
        inner = tensor[0].numel() if tensor.dim() > 1 else 1
        far = sparse(before + len(tensor), max(inner, pitch) if tensor.dim() > 1 else 1, dtype=tensor.dtype)
        far = far[:, :inner].unflatten(1, tensor.shape[1:]) if tensor.dim() > 1 else far[:, 0]
        far[before:] = tensor
        return far

    def tokens(self, tensor: Tensor) -> Tensor:
        return self.rows(tensor, ROWS // 2, 2 * PITCH)

    def many(self, tensor: Tensor, fewer: int = 0) -> Tensor:
        return self.rows(tensor, TOKENS - fewer, 0)

    def numbers(self, rows: Tensor) -> Tensor:
        return self.rows(torch.where(rows >= 0, rows + ROWS, rows), pitch=0)

    def alignment(self) -> Alignment:
        near = super().alignment()
        return replace(near, local_ids_R=self.rows(near.local_ids_R), sorted_rows_R=self.numbers(near.sorted_rows_R),
                       offsets=near.offsets + ROWS, block_row=near.block_row + ROWS,
                       block_row_end=near.block_row_end + ROWS)

    def places(self) -> Places:
        near = super().places()
        return Places(near.starts + PLACES, near.count + PLACES)

    def along(self, codes_NP: Tensor) -> Tensor:
        far = sparse(len(codes_NP), PLACES + codes_NP.shape[1], dtype=codes_NP.dtype)
        far[:, PLACES:] = codes_NP
        return far


class FarStride(Near):
    """One axis of one tensor reaches past 2^31; the stride of it is no more than a kernel is told in 32 bits."""

    def __init__(self, name: str, axis: int) -> None:
        super().__init__(NARROW)
        self.name, self.axis = name, axis

    def view(self, name: str, tensor: Tensor) -> Tensor:
        if name != self.name:
            return tensor
        size = tensor.shape[self.axis]
        stride = 2**31 // (size - 1) + 16
        others = torch.empty([1 if axis == self.axis else length for axis, length in enumerate(tensor.shape)])
        strides = [stride if axis == self.axis else other for axis, other in enumerate(others.stride())]
        far = sparse((size - 1) * stride + others.numel(), dtype=tensor.dtype).as_strided(tensor.shape, strides)
        return far.copy_(tensor)


def tile_of(out_features: int, in_features: int) -> Tile:
    """That of a few rows."""
    return gemm_tile(torch.device("cpu"), BF16, Load(1), out_features, in_features, kernel="down")


def ends(*results: Tensor) -> Results:
    """The rows that are looked at, of results by row."""
    return tuple(result[-8:] for result in results)


def run_gate_up(at: Near) -> Results:
    x_TH = at.view("x_TH", at.tokens(integers(4, NARROW)))
    w13_EGIH = at.view("w13_EGIH", integers(3, 2, at.width, NARROW))
    bias_EGI = at.view("w13_bias_EGI", integers(3, 2, at.width))
    return ends(gate_up.gate_up(x_TH, w13_EGIH, bias_EGI, None, at.alignment(), 2, RELU, tile_of(at.width, NARROW)))


def run_down(at: Near) -> Results:
    act_RI = at.view("act_RI", at.rows(integers(8, at.width)))
    w2_EHI = at.view("w2_EHI", integers(3, at.width, at.width))
    bias_EH = at.view("w2_bias_EH", integers(3, at.width))
    weights_R = at.rows(integers(8, dtype=FP32))
    return ends(down.down(act_RI, w2_EHI, bias_EH, weights_R, at.alignment(), tile_of(at.width, at.width)))


def encoded(at: Near, name: str, *shape: int, far_blocks: int = 0) -> Encoded:
    """Numbers from -8 to 7 under scales of 1 and 2, by a group for every column; so many scales before those of use."""
    generator, (*leading, num_rows, num_columns) = torch.Generator().manual_seed(sum(shape)), shape
    codes = torch.randint(0, 256, (*leading, num_rows, num_columns // 2), generator=generator).to(torch.uint8)
    scales = sparse(*leading, num_rows, far_blocks + 5, dtype=BF16)
    scales[..., far_blocks:] = torch.randint(1, 3, (*leading, num_rows, 5), generator=generator).to(BF16)
    groups = torch.randint(0, 5, (*leading, num_columns), generator=generator).to(torch.int32) + far_blocks
    return Encoded(scheme=Scheme.GPTQ_ORDER_32, codes=at.view(name, codes), scales=scales, num_columns=num_columns,
                   groups=groups)


def run_decoded_gate_up(at: Near, far_blocks: int = 0) -> Results:
    x_TH, width = at.view("x_TH", at.tokens(integers(4, NARROW))), at.width
    w13 = encoded(at, "w13_EGIH", 3, 2, width, NARROW, far_blocks=far_blocks)
    bias_EGI = at.view("w13_bias_EGI", integers(3, 2, width))
    return ends(decoded_gate_up.decoded_gate_up(x_TH, w13, bias_EGI, None, at.alignment(), 2, RELU,
                                                tile_of(width, NARROW)))


def run_decoded_down(at: Near, far_blocks: int = 0) -> Results:
    act_RI, width = at.view("act_RI", at.rows(integers(8, at.width))), at.width
    w2 = encoded(at, "w2_EHI", 3, width, width, far_blocks=far_blocks)
    bias_EH, weights_R = at.view("w2_bias_EH", integers(3, width)), at.rows(integers(8, dtype=FP32))
    return ends(decoded_down.decoded_down(act_RI, w2, bias_EH, weights_R, at.alignment(), tile_of(width, width)))


def run_round_rows(at: Near) -> Results:
    """Of rows in expert order, by blocks; and of tokens, under the scale of each row's expert. One part of columns."""
    alignment, rows_RK = at.alignment(), at.view("rows_RK", at.rows(integers(8, at.width)))
    tokens_TH, scale_E = at.view("tokens_TH", at.tokens(integers(4, at.width))), torch.tensor([1.0, 0.5, 2.0])
    found = (round_rows.round_rows(rows_RK, Scheme.FP8_BLOCK, 0, None, alignment),
             round_rows.round_rows(tokens_TH, Scheme.FP8_TENSOR, 0, scale_E, alignment, 2))
    return ends(*(one.codes_RK[-8:, -512:].float() for one in found), found[0].scales_RB[:, -4:])


def run_round_matrix(at: Near) -> Results:
    """By rows, and by columns of both projections: of these the two that the last program makes."""
    w_EGNK = at.view("w_EGNK", integers(3, 2, 8, NARROW))
    found = round_matrix.rounded_rows(at.rows(integers(8, at.width))[None, None]), round_matrix.rounded_columns(w_EGNK)
    return tuple(one.flatten(0, -2)[-2:].float() for rounded in found for one in (rounded.codes, rounded.scales))


def run_round_columns(at: Near) -> Results:
    """Of rows in expert order, and of weighted tokens."""
    width = at.width + 16  # columns times rows are more than 2^31
    rows_RN = at.view("rows_RN", at.rows(integers(8, width)))
    tokens_TN = at.view("tokens_TN", at.tokens(integers(4, width)))
    alignment = at.alignment()
    places = round_columns.places_of(alignment, 3)
    weights_R = at.rows(integers(8, dtype=FP32))
    found = (round_columns.round_columns(rows_RN, None, places, 3, alignment),
             round_columns.round_columns(tokens_TN, weights_R, places, 3, alignment, 2))
    return tuple(one for rounded in found for one in (first_codes(rounded, alignment, places), rounded.scales_EN))


def first_codes(rounded: RoundedColumns, alignment: Alignment, places: Places) -> Tensor:
    """Those of rows, without what lies between experts."""
    sizes = alignment.offsets[:4].diff().tolist()
    return torch.cat([rounded.codes_NP[:, start:start + size].float()
                      for start, size in zip(places.starts.tolist(), sizes, strict=False)], 1)


def rounded(codes_RK: Tensor, num_rows: int, by_token: bool) -> RoundedRows:
    """Codes of rows, of which the last have other scales than 1 in blocks of 32."""
    scales_BR = sparse(-(-codes_RK.shape[1] // 32), len(codes_RK), dtype=FP32)
    scales_BR[:, -num_rows:] = integers(len(scales_BR), num_rows, dtype=FP32).exp2()
    return RoundedRows(codes_RK, scales_BR.T, by_token)


def in_e4m3(at: Near, name: str, *shape: int) -> Encoded:
    """-2 to 2 under powers of two of 32 columns; codes and scales may have any strides."""
    scales = integers(*shape[:-1], -(-shape[-1] // 32), dtype=FP32).add(127).to(torch.uint8)
    return Encoded(scheme=Scheme.MXFP8, codes=at.view(name, integers(*shape, dtype=torch.float8_e4m3fn)),
                   scales=at.view(f"{name}_scales", scales), num_columns=shape[-1])


def run_scaled_gate_up(at: Near) -> Results:
    """A token has twice as many columns as a row, since there are half as many tokens."""
    codes_TH = at.tokens(integers(4, 2 * at.width, dtype=torch.float8_e4m3fn))
    w13 = in_e4m3(at, "w13_EGIH", 3, 2, at.width, 2 * at.width)
    bias_EGI, tile = at.view("w13_bias_EGI", integers(3, 2, at.width)), tile_of(at.width, 2 * at.width)
    return ends(scaled_gate_up.scaled_gate_up(rounded(codes_TH, 4, True), BF16, w13, bias_EGI, at.alignment(), 2,
                                              RELU, replace(tile, block_k=32)))


def run_scaled_down(at: Near) -> Results:
    codes_RI = at.rows(integers(8, at.width, dtype=torch.float8_e4m3fn))
    w2 = in_e4m3(at, "w2_EHI", 3, at.width, at.width)
    bias_EH, weights_R = at.view("w2_bias_EH", integers(3, at.width)), at.rows(integers(8, dtype=FP32))
    return ends(scaled_down.scaled_down(rounded(codes_RI, 8, False), BF16, w2, bias_EH, weights_R, at.alignment(),
                                        replace(tile_of(at.width, at.width), block_k=32)))


def run_scaled_dot(at: Near) -> Results:
    codes_RI = at.rows(integers(8, at.width, dtype=torch.float8_e4m3fn))
    w2, tokens_TH = in_e4m3(at, "w2_EHI", 3, NARROW, at.width), at.view("tokens_TH", at.tokens(integers(4, NARROW)))
    bias_EH = at.view("w2_bias_EH", integers(3, NARROW))
    return ends(scaled_dot.scaled_dot(rounded(codes_RI, 8, False), w2, bias_EH, tokens_TH, at.alignment(), 2,
                                      replace(tile_of(NARROW, at.width), block_k=32)))


def run_scaled_projection_gradient(at: Near) -> Results:
    codes_TH = at.tokens(integers(4, 2 * at.width, dtype=torch.float8_e4m3fn))
    w13 = in_e4m3(at, "w13_EGIH", 3, 2, at.width, 2 * at.width)
    grad_RI = at.view("grad_act_RI", at.rows(integers(8, at.width)))
    bias_EGI = at.view("w13_bias_EGI", integers(3, 2, at.width))
    return ends(*scaled_projection_gradient.scaled_projection_gradient(
        grad_RI, rounded(codes_TH, 4, True), w13, bias_EGI, at.alignment(), 2, RELU,
        replace(tile_of(at.width, 2 * at.width), block_k=32)))


def run_scaled_weight_gradient(at: Near) -> Results:
    """Codes of rows lie side by side for each feature: many places before those that are looked at."""
    places = at.places()
    rows, tokens = (RoundedColumns(at.along(integers(width, 48, dtype=torch.float8_e4m3fn)),
                                   integers(3, width, dtype=FP32)) for width in (2 * 20, 24))
    result_EGIH = at.view("result_EGIH", torch.zeros(3, 2, 20, 24, dtype=BF16))
    scaled_weight_gradient.scaled_weight_gradient(rows, tokens, result_EGIH, places)
    return (result_EGIH,)


def run_act_gradient(at: Near) -> Results:
    x_TH, grad_TH = (at.view(name, at.tokens(integers(4, NARROW))) for name in ("x_TH", "grad_TH"))
    w13_EGIH = at.view("w13_EGIH", integers(3, 2, at.width, NARROW))
    bias_EGI = at.view("w13_bias_EGI", integers(3, 2, at.width))
    w2_EHI = at.view("w2_EHI", integers(3, NARROW, at.width))
    weights_R = at.rows(integers(8, dtype=FP32))
    return ends(*act_gradient.act_gradient(x_TH, grad_TH, w13_EGIH, bias_EGI, w2_EHI, weights_R, at.alignment(), 2,
                                           RELU, Load(1)))


def run_row_gradient(at: Near) -> Results:
    grad_gate_up_RGI, w13_EGIH = at.rows(integers(8, 2, at.width)), integers(3, 2, at.width, at.width)
    return ends(row_gradient.row_gradient(grad_gate_up_RGI, at.view("w13_EGIH", w13_EGIH), at.alignment(),
                                          tile_of(at.width, at.width)))


def run_projection_gradient(at: Near) -> Results:
    grad_RI = at.view("grad_act_RI", at.rows(integers(8, at.width)))
    x_TH = at.view("x_TH", at.tokens(integers(4, NARROW)))
    w13_EGIH = at.view("w13_EGIH", integers(3, 2, at.width, NARROW))
    bias_EGI = at.view("w13_bias_EGI", integers(3, 2, at.width))
    weights_R, form = at.rows(integers(8, dtype=FP32)), replace(RELU, weight_on_input=True)
    return ends(*projection_gradient.projection_gradient(grad_RI, x_TH, w13_EGIH, bias_EGI, weights_R, at.alignment(),
                                                         2, form, tile_of(at.width, NARROW)))


def run_down_gradient(at: Near) -> Results:
    grad_TH = at.view("grad_TH", at.tokens(integers(4, NARROW)))
    act_RI = at.view("act_RI", at.rows(integers(8, at.width)))
    w2_EHI = at.view("w2_EHI", integers(3, NARROW, at.width))
    return ends(*down_gradient.down_gradient(grad_TH, act_RI, w2_EHI, at.rows(integers(8, dtype=FP32)),
                                             at.alignment(), 2, tile_of(at.width, NARROW)))


def run_weight_gradient(at: Near) -> Results:
    rows_RGI = at.view("rows_RGI", at.rows(integers(8, 2, 20)))
    tokens_TH = at.view("tokens_TH", at.tokens(integers(4, 24)))
    result_EGIH = at.view("result_EGIH", torch.zeros(3, 2, 20, 24, dtype=BF16))
    weight_gradient.weight_gradient(rows_RGI, tokens_TH, result_EGIH, at.alignment(), 2)
    return (result_EGIH,)


def run_bias_gradient(at: Near) -> Results:
    rows_RN = at.view("rows_RN", at.rows(integers(8, NARROW)))
    grad_TH = at.view("grad_TH", at.tokens(integers(4, NARROW)))
    weights_R = at.rows(integers(8, dtype=FP32))
    return (bias_gradient.bias_gradient(rows_RN[:, None], 3, at.alignment())[:, 0],
            bias_gradient.weighted_bias_gradient(grad_TH, weights_R, 3, at.alignment(), 2))


def run_bias_product(at: Near) -> Results:
    grad_TH = at.view("grad_TH", at.tokens(integers(4, NARROW)))
    return ends(bias_product.bias_product(grad_TH, at.view("bias_EH", integers(3, NARROW)),
                                          at.alignment().local_ids_R, 2))


def run_combine(at: Near) -> Results:
    down_RH, shared_TH = at.rows(integers(8, NARROW)), at.tokens(integers(4, NARROW))
    merged_TH = at.tokens(torch.zeros(4, NARROW, dtype=BF16))
    local_ids_R, bias_H = at.rows(torch.tensor([0, 2, -1, 1, 1, 0, 2, -1], dtype=torch.int32)), integers(NARROW)
    merged_TH = at.view("merged_TH", merged_TH)
    combine.combine(at.view("down_RH", down_RH), at.view("shared_TH", shared_TH), local_ids_R, len(merged_TH), 2,
                    bias_H=at.view("bias_H", bias_H), merged_TH=merged_TH)
    return (merged_TH[-4:],)


def run_take(at: Near) -> Results:
    source_R = at.numbers(torch.tensor([3, -1, 0, 7, 7, 1, -1, 2]))
    return ends(take.take(at.view("rows_RH", at.rows(integers(8, at.width))), source_R))


def run_gather_sum(at: Near) -> Results:
    place_TK = at.numbers(torch.tensor([3, -1, 0, 7, 7, 1, -1, 2])).view(-1, 1)
    rows_RH, bias_H = at.rows(integers(8, at.width)), integers(at.width)
    return ends(gather_sum.gather_sum(at.view("rows_RH", rows_RH), place_TK, at.view("bias_H", bias_H)))


def run_product(at: Near) -> Results:
    left_MK, right_NK = at.rows(integers(8, NARROW)), integers(at.width, NARROW)
    result_MN = product.product(at.view("left_MK", left_MK), at.view("right_NK", right_NK), BF16, integers(at.width))
    return ends(result_MN[:, -(at.width % 64 or 64):])


def run_select(at: Near) -> Results:
    router = Router(num_experts=8, top_k=8, score="sigmoid", renormalize=True, selection_bias="score",
                    learned_scale="expert")
    logits_TE, shared_TS = (at.view(name, at.many(integers(8, 8, dtype=FP32))) for name in ("logits_TE", "shared_TS"))
    return ends(*select.select(logits_TE[None], shared_TS, torch.arange(8.0), torch.arange(8.0), router))


def run_route(at: Near) -> Results:
    """With the selection in one kernel, however few tokens there are."""
    x_TH, router_EH = at.view("x_TH", at.many(integers(8, 8))), integers(8, 8)
    router = Router(num_experts=8, top_k=8, score="sigmoid", renormalize=True)
    with patch.object(route, "ENOUGH_TILES_INTERPRETED", 1):
        ids_TK, weights_TK, _, logits_TE = route.route(x_TH, router_EH, None, None, None, None, router)
    return ends(ids_TK, weights_TK, logits_TE)


def run_select_gradient(at: Near) -> Results:
    router = Router(num_experts=8, top_k=8, score="sigmoid", renormalize=True, learned_scale="expert")
    grad_TK, grad_TS, logits_TE, shared_TS = (
        at.view(name, at.many(integers(8, 8, dtype=FP32))) for name in ("grad_TK", "grad_TS", "logits_TE", "shared_TS"))
    ids_TK = at.many((torch.arange(8)[:, None] + torch.arange(8)).remainder(8).to(torch.int32))
    return ends(*select_gradient.select_gradient(grad_TK, grad_TS, logits_TE, shared_TS, torch.arange(8.0), ids_TK,
                                                 router))


def run_drop(at: Near) -> Results:
    """Slots are numbered in 32 bits, as its docstring says: here to the end of what a loop over them can count."""
    router = Router(num_experts=8, top_k=8, renormalize=True,
                    capacity=Capacity(tokens=2, sequence_length=4, renormalize_after=True))
    ids_TK = (torch.arange(32)[:, None] + torch.arange(8)).remainder(8).to(torch.int32)
    scores_TK, shared_TS = integers(32, 8, dtype=FP32).abs() + 1, integers(32, 8, dtype=FP32)
    given = (at.many(tensor, fewer=96) for tensor in (ids_TK, scores_TK, shared_TS))
    return ends(*drop.drop(*given, None, router))


def run_drop_gradient(at: Near) -> Results:
    router = Router(num_experts=8, top_k=8, renormalize=True, learned_scale="expert")
    grad_TK, grad_TS = (at.view(name, at.many(integers(8, 8, dtype=FP32))) for name in ("grad_TK", "grad_TS"))
    scores_TK, shared_TS = (at.many(integers(8, 8, dtype=FP32).abs() + 1) for _ in range(2))
    ids_TK = at.many((torch.arange(8)[:, None] + torch.arange(8)).remainder(9).sub(1).to(torch.int32))
    return ends(*drop_gradient.drop_gradient(grad_TK, grad_TS, ids_TK, scores_TK, shared_TS, torch.arange(8.0),
                                             router))


@dataclass(frozen=True)
class Case:
    """A kernel by its host function. strided: its tensors that may have any strides, with the axes that may be far.

    by_token: its grid covers all tokens or rows, of which the last program alone is run.
    """

    run: Callable[[Near], Results]
    strided: str = ""
    by_token: bool = False


CASES = {
    "gate_up_kernel": Case(run_gate_up, "x_TH:01 w13_EGIH:0123 w13_bias_EGI:012"),
    "down_kernel": Case(run_down, "act_RI:0 w2_EHI:012 w2_bias_EH:01"),
    "decoded_gate_up_kernel": Case(run_decoded_gate_up, "x_TH:01 w13_EGIH:0123 w13_bias_EGI:012"),
    "decoded_down_kernel": Case(run_decoded_down, "act_RI:0 w2_EHI:012 w2_bias_EH:01"),
    "round_rows_kernel": Case(run_round_rows, "rows_RK:01 tokens_TH:01", by_token=True),
    "scaled_gate_up_kernel": Case(run_scaled_gate_up, "w13_EGIH:0123 w13_EGIH_scales:0123 w13_bias_EGI:012"),
    "scaled_down_kernel": Case(run_scaled_down, "w2_EHI:012 w2_EHI_scales:012 w2_bias_EH:01"),
    "round_matrix_kernel": Case(run_round_matrix, "w_EGNK:0123", by_token=True),
    "round_columns_kernel": Case(run_round_columns, "rows_RN:01 tokens_TN:01"),
    "scaled_dot_kernel": Case(run_scaled_dot, "w2_EHI:012 w2_EHI_scales:012 w2_bias_EH:01 tokens_TH:01"),
    "scaled_projection_gradient_kernel": Case(
        run_scaled_projection_gradient,
        "grad_act_RI:01 w13_EGIH:0123 w13_EGIH_scales:0123 w13_bias_EGI:012"),
    "scaled_weight_gradient_kernel": Case(run_scaled_weight_gradient, "result_EGIH:0123"),
    "act_gradient_kernel": Case(run_act_gradient, "x_TH:01 grad_TH:01 w13_EGIH:0123 w13_bias_EGI:012 w2_EHI:012"),
    "row_gradient_kernel": Case(run_row_gradient, "w13_EGIH:0123"),
    "projection_gradient_kernel": Case(run_projection_gradient,
                                       "grad_act_RI:01 x_TH:01 w13_EGIH:0123 w13_bias_EGI:012"),
    "down_gradient_kernel": Case(run_down_gradient, "grad_TH:01 act_RI:01 w2_EHI:012"),
    "weight_gradient_kernel": Case(run_weight_gradient, "rows_RGI:01 tokens_TH:01 result_EGIH:0123"),
    "bias_gradient_kernel": Case(run_bias_gradient, "rows_RN:01 grad_TH:01"),
    "bias_product_kernel": Case(run_bias_product, "grad_TH:01 bias_EH:01", by_token=True),
    "combine_kernel": Case(run_combine, "down_RH:0 shared_TH:0 bias_H:0 merged_TH:0", by_token=True),
    "take_kernel": Case(run_take, "rows_RH:01", by_token=True),
    "gather_sum_kernel": Case(run_gather_sum, "rows_RH:01 bias_H:0", by_token=True),
    "product_kernel": Case(run_product, "left_MK:01 right_NK:01", by_token=True),
    "select_kernel": Case(run_select, "logits_TE:01 shared_TS:0", by_token=True),
    "route_kernel": Case(run_route, "x_TH:0", by_token=True),
    "select_gradient_kernel": Case(run_select_gradient, "grad_TK:0 grad_TS:0 logits_TE:01 shared_TS:0", by_token=True),
    "drop_kernel": Case(run_drop, by_token=True),
    "drop_gradient_kernel": Case(run_drop_gradient, "grad_TK:0 grad_TS:0", by_token=True),
}
"""Strides between the slots of a token, and of vectors by expert, are taken to be small."""

TABLES_ALONE = {"few_rows_kernel", "count_kernel", "layout_kernel", "scatter_kernel", "order_kernel"}
"""Their tables are numbered by routed row, in 32 bits: align refuses more."""

STRIDES = [(kernel, name, int(axis)) for kernel, case in CASES.items()
           for name, _, axes in (one.partition(":") for one in case.strided.split()) for axis in axes]


def test_every_kernel_is_here() -> None:
    assert CASES.keys() | TABLES_ALONE == started()


@pytest.mark.parametrize(("num_rows", "num_experts", "most"), [
    (2**31 - 2**16 + 1, 8, 2**31 - 2**16), (2**30, 256, 2**30 - 16 * 128), (2**31, 1, 2**31 - 2**16)])
def test_more_rows_than_tables_can_number_are_refused(num_rows: int, num_experts: int, most: int) -> None:
    """No number of a table is beyond 2^31: rows, and a count for each chunk of them and each expert."""
    ids_TK, hosted_E = torch.empty(num_rows, 1, device="meta"), torch.empty(num_experts, device="meta")
    said = f"{num_rows} routed rows of {num_experts} experts at once, but should be at most {most}"
    with pytest.raises(UsageValueError, match=said):
        align.align(ids_TK, hosted_E, 16)
    with assuming("sm_90"), recording(lambda *_: None):
        assert align.align(ids_TK[:most], hosted_E, 16).sorted_rows_R.numel() == most


@pytest.fixture(autouse=True)
def _sparse_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing touches what is not computed: races are not recorded, and zeros of fresh pages are not written."""
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
        pytest.skip("this system lends no more memory than it has (vm.overcommit_memory is 2)")
    zeros = torch.zeros

    def fresh_zeros(*shape: int, **options: Any) -> Tensor:
        return (torch.empty if torch.Size(shape).numel() >= 2**31 else zeros)(*shape, **options)

    monkeypatch.setattr(torch, "zeros", fresh_zeros)
    with checking(bounds=True, races=False, overflow=True):
        yield


@cache
def near_results(kernel: str, width: int) -> Results:
    return CASES[kernel].run(Near(width))


def far_rows(kernel: str, monkeypatch: pytest.MonkeyPatch) -> Results:
    """With the last program alone where the others have nothing to compute."""
    if CASES[kernel].by_token:
        monkeypatch.setattr(interpreter, "itertools", SimpleNamespace(product=_last))
    return CASES[kernel].run(FarRows(PITCH))


def _last(*axes: range) -> Iterator[tuple[int, ...]]:
    yield tuple(axis[-1] for axis in axes)


def test_the_last_rows_that_tables_can_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last 128 of them are counted and placed; the table of blocks, one program over all chunks, is left out."""
    ids_T1, launch = sparse(align.MOST_ROWS, 1, dtype=torch.int32), align.launch
    ids_T1[-128:, 0] = torch.arange(128) % 8

    def without_layout(kernel: object, *grid: object, **arguments: Any) -> None:
        if kernel is align.layout_kernel:
            arguments["offsets"].copy_(16 * torch.arange(9))
        else:
            launch(kernel, *grid, **arguments)

    monkeypatch.setattr(align, "launch", without_layout)
    monkeypatch.setattr(interpreter, "itertools", SimpleNamespace(product=_last))
    found = align.align(ids_T1, torch.arange(8), 16)
    assert found.local_ids_R[-128:].tolist() == [row % 8 for row in range(128)]
    first = align.MOST_ROWS - 128
    assert found.sorted_rows_R[:128].tolist() == [first + row for row in sorted(range(128), key=lambda row: row % 8)]


@pytest.mark.parametrize("kernel", CASES)
def test_far_rows(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, routed rows and results of a long prefill."""
    wanted = near_results(kernel, PITCH)
    assert all(bool(one.any()) for one in wanted)
    found = far_rows(kernel, monkeypatch)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize(("kernel", "name", "axis"), STRIDES)
def test_far_strides(kernel: str, name: str, axis: int) -> None:
    """Experts of a large layer, and every other axis, in whatever order a view has them."""
    found = CASES[kernel].run(FarStride(name, axis))
    assert all(torch.equal(one, other) for one, other in zip(found, near_results(kernel, NARROW), strict=True))


@pytest.mark.parametrize(("run", "rows"), [(run_decoded_gate_up, 3 * 2 * NARROW), (run_decoded_down, 3 * NARROW)])
def test_far_scales(run: Callable[..., Results], rows: int) -> None:
    """Scales have no strides of their own: there are 2^31 of them before the last experts'."""
    wanted, found = (run(Near(NARROW), far_blocks=before) for before in (0, 2**31 // (rows - 1)))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kernel", [kernel for kernel in CASES if kernel != "drop_kernel"])
def test_offsets_of_32_bits_are_seen(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison has to fail for the same kernel without its casts to 64 bits."""
    function = getattr(import_module(f"moe_fast.kernels.{kernel.removesuffix('_kernel')}"), kernel)
    narrow = SimpleNamespace(fn=function.fn, src=function.src.replace(".to(tl.int64)", ""), raw_src=function.raw_src,
                             starting_line_number=function.starting_line_number)
    monkeypatch.setitem(rewrite._REWRITTEN, function.fn, rewrite._rewrite(narrow, interpreter._as_tensor))
    with pytest.raises(IntegerOverflowError, match=f"kernel {kernel}, .* int32 overflow in mul"):
        far_rows(kernel, monkeypatch)
