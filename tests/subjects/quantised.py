"""A readable torch layer over encoded weights, every step on its own so that it can be replaced.

Codes are read bit by bit, by code of its own. Weight-only schemes round decoded weights to the dtype of the model;
the others multiply codes of both operands, block by block of their scales.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from moe_ref.contract.capabilities import Numerics, Products
from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.quantised import QuantisedWeights
from moe_ref.contract.schemes import ENCODINGS, Codes, Scales
from moe_ref.contract.vocabulary import Dtype, Format, Scheme, Stage
from moe_ref.contract.weights import ExpertWeights
from tests.subjects.parallel import ParallelMoE
from tests.subjects.parallel_call import ParallelCall, Served

PRODUCTS: dict[Scheme, Products] = {Scheme.FP8_TENSOR: "fp8_tensor", Scheme.FP8_ROW: "fp8_row",
                                    Scheme.FP8_BLOCK: "fp8_block", Scheme.MXFP8: "mxfp8"}
"""Schemes whose rows are rounded to 8 bits; of the others weights are decoded."""

EXACT = (Scheme.INT8, Scheme.NVFP4)
"""Schemes whose codes, or codes times scales of blocks, are exact in 16 bits: scales of rows join the sum."""

COLUMNS = {"fp8_block": 128, "mxfp8": 32}
OPERAND_STAGES = (Stage.PERMUTE_SCALES, Stage.PERMUTE_CODES, Stage.ACT_SCALES, Stage.ACT_CODES)
SHARED = -1
"""Stands for the shared expert."""


class Sizes(NamedTuple):
    """The shape of a matrix of every expert, where a tensor stands in plain layers."""

    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.shape[0]


@dataclass(frozen=True)
class Held:
    """Encoded weights as the steps of a plain layer read them; operands: rows as they were multiplied, by expert."""

    weights: QuantisedWeights
    dtype: torch.dtype
    operands: dict[Stage, dict[int, torch.Tensor]] = field(default_factory=dict)

    @property
    def w13_EGIH(self) -> Sizes:
        return Sizes(self.weights.w13.shape)

    @property
    def w2_EHI(self) -> Sizes:
        return Sizes(self.weights.w2.shape)

    def __getattr__(self, name: str) -> object:
        return getattr(self.weights, name)

    def expert(self, e: int) -> ExpertWeights:
        held = self.weights
        scales = (None if one is None else one[e] for one in (held.w13_input_scale_E, held.w2_input_scale_E))
        biases = (None if one is None else one[e] for one in (held.w13_bias_EGI, held.w2_bias_EH))
        return ExpertWeights(*self.matrices(e, (held.w13.at(e), held.w2.at(e)), tuple(scales)), *biases)

    def shared_expert(self) -> ExpertWeights | None:
        held = self.weights
        if held.shared_w13 is None or held.shared_w2 is None:
            return None
        scales = (held.shared_w13_input_scale, held.shared_w2_input_scale)
        return ExpertWeights(*self.matrices(SHARED, (held.shared_w13, held.shared_w2), scales),
                             held.shared_w13_bias_GI, held.shared_w2_bias_H)

    def matrices(self, expert: int, encoded: tuple[Encoded, ...], scales: tuple) -> list["Matrix"]:
        return [Matrix(one, self, expert, rows_of, scale) for one, rows_of, scale
                in zip(encoded, (Stage.PERMUTE, Stage.ACT), scales, strict=True)]


@dataclass(frozen=True)
class Matrix:
    """A matrix of one expert, what rows it takes, and their fixed scale if they have one."""

    encoded: Encoded
    held: Held
    expert: int = SHARED
    rows_of: Stage = Stage.PERMUTE
    input_scale: torch.Tensor | None = None


Operand = tuple[torch.Tensor, torch.Tensor]
"""Codes of rows as numbers, and the scale of every column; the rows and 1 where nothing is rounded."""


class QuantisedMoE(ParallelMoE):
    """Every scheme. products: of which scheme rows are rounded, and how; shows_operands: their codes and scales."""

    products = PRODUCTS
    shows_operands = True

    def __init__(self) -> None:
        plain = type(self).shows
        self.shows = plain + OPERAND_STAGES if self.shows_operands else plain
        super().__init__()

        def numerics(scheme: Scheme, dtype: Dtype) -> Numerics:
            plain = self.CAPABILITIES.numerics[dtype]
            if scheme in self.products:
                return replace(plain, products=self.products[scheme])
            if scheme in EXACT:
                return plain
            return replace(plain, decoded=Format(dtype.value))

        self.CAPABILITIES = replace(self.CAPABILITIES, numerics={}, schemes={
            scheme: {dtype: numerics(scheme, dtype) for dtype in Dtype}
            for scheme in Scheme if scheme is not Scheme.PLAIN})

    def declared(self, x_TH: torch.Tensor, weights: QuantisedWeights) -> Numerics:
        names = {torch_dtype: name for name, torch_dtype in TORCH_DTYPES.items()}
        return self.CAPABILITIES.schemes[weights.scheme][Dtype(names[x_TH.dtype])]

    def loaded(self, call: ParallelCall) -> ParallelCall:
        return replace(call, weights=Held(self.taken(call, call.weights), call.x_TH.dtype))

    def taken(self, call: ParallelCall, weights: QuantisedWeights) -> QuantisedWeights:
        """What a rank keeps of the weights that it is handed."""
        return weights

    def expert_rows_of(self, call: ParallelCall, served: Served) -> torch.Tensor:
        down_RH = super().expert_rows_of(call, served)
        if call.trace is not None and self.shows_operands and self.products_of(call.weights.w13) != "exact":
            for stage, width in self.widths(call.weights).items():
                whole = torch.zeros(len(served.expert_R), width)
                for expert, rows in call.weights.operands.get(stage, {}).items():
                    whole[served.expert_R == expert] = rows
                call.trace.record(stage, whole)
        return down_RH

    def widths(self, held: Held) -> dict[Stage, int]:
        """Columns of the codes of both products' rows, and of their scales."""
        size = COLUMNS.get(self.products_of(held.w13))
        inner = [w.column_start + w.num_columns for w in (held.w13, held.w2)]
        scales = [-(-stop // size) if size else 1 for stop in inner]
        return dict(zip(OPERAND_STAGES, (scales[0], held.w13.num_columns, scales[1], held.w2.num_columns), strict=True))

    # Products.

    def project(self, x_RH: torch.Tensor, expert: ExpertWeights) -> torch.Tensor:
        w13, bias_GI = expert.w13_GIH, expert.w13_bias_GI
        rows = self.operand(x_RH, w13)
        halves = [replace(w13, encoded=w13.encoded.at(half)) for half in range(len(w13.encoded.codes))]
        gate_up = torch.stack([self.product(rows, half) for half in halves], 1)
        return gate_up if bias_GI is None else gate_up + bias_GI.float()

    def product_back(self, act_RI: torch.Tensor, w2: Matrix) -> torch.Tensor:
        return self.product(self.operand(act_RI, w2), w2)

    def products_of(self, w: Encoded) -> Products:
        return self.products.get(w.scheme, "exact")

    def operand(self, rows_RK: torch.Tensor, w: Matrix) -> Operand:
        products = self.products_of(w.encoded)
        if products == "exact":
            return rows_RK, torch.ones(())
        scales_RQ = self.row_scales(rows_RK, products, w)
        scale_RK = self.over_columns(scales_RQ, rows_RK.shape[1], w)
        codes_RK = self.row_codes(rows_RK, scale_RK, products)
        self.keep(w, scales_RQ, codes_RK)
        return codes_RK, scale_RK

    def over_columns(self, scales_RQ: torch.Tensor, num_columns: int, w: Matrix) -> torch.Tensor:
        size = COLUMNS.get(self.products_of(w.encoded))
        column_K = torch.arange(num_columns) + w.encoded.column_start
        return scales_RQ[:, column_K // size] if size else scales_RQ.expand(-1, num_columns)

    def keep(self, w: Matrix, scales_RQ: torch.Tensor, codes_RK: torch.Tensor) -> None:
        """For the trace, of routed rows."""
        if w.expert != SHARED:
            for name, one in (("scales", scales_RQ), ("codes", codes_RK)):
                w.held.operands.setdefault(Stage(f"{w.rows_of}_{name}"), {})[w.expert] = one

    def row_scales(self, rows_RK: torch.Tensor, products: Products, w: Matrix) -> torch.Tensor:
        """(R, blocks) fp32."""
        if products == "fp8_tensor":
            return w.input_scale.expand(len(rows_RK), 1)
        size, start = COLUMNS.get(products), w.encoded.column_start
        start, size = (start, size) if size else (0, max(1, rows_RK.shape[1]))
        blocks = max(1, -(-(start + rows_RK.shape[1]) // size))
        padded = torch.nn.functional.pad(rows_RK.abs(), (start, blocks * size - start - rows_RK.shape[1]))
        scales = self.scale_of(padded.unflatten(1, (-1, size)).amax(-1), products)
        return torch.where(scales < 2.0**-126, 1.0, scales)

    def scale_of(self, largest_RQ: torch.Tensor, products: Products) -> torch.Tensor:
        scales = largest_RQ / (127 if products == "int8_row" else 448)
        return torch.exp2(torch.ceil(torch.log2(scales))) if products == "mxfp8" else scales

    def row_codes(self, rows_RK: torch.Tensor, scale_RK: torch.Tensor, products: Products) -> torch.Tensor:
        quotient = self.quotient(rows_RK, scale_RK)
        if products == "int8_row":
            return torch.round(quotient).clamp(-127, 127)
        return quotient.clamp(-448, 448).to(torch.float8_e4m3fn).float()

    def quotient(self, rows_RK: torch.Tensor, scale_RK: torch.Tensor) -> torch.Tensor:
        return rows_RK / scale_RK

    def product(self, rows: Operand, w: Matrix) -> torch.Tensor:
        """rows @ w^T, (R, N): decoded weights, or sums of codes times scales for every block of columns."""
        (codes_RK, scale_RK), encoded = rows, w.encoded
        if not encoded.num_columns:
            return torch.zeros(len(codes_RK), encoded.shape[0])
        if self.products_of(encoded) != "exact":
            return self.sum_of_blocks(codes_RK, scale_RK, encoded)
        if encoded.scheme is Scheme.INT8:
            return codes_RK @ self.numbers(encoded).T * self.scales(encoded)[:, 0]
        second = 1.0 if encoded.second_scale is None else encoded.second_scale
        return codes_RK @ self.decoded(encoded).to(w.held.dtype).float().T * second

    def sum_of_blocks(self, codes_RK: torch.Tensor, scale_RK: torch.Tensor, w: Encoded) -> torch.Tensor:
        total_RN = torch.zeros(len(codes_RK), w.shape[0])
        numbers_NK, scale_NK = self.numbers(w), self.scales(w)
        for block in self.blocks(w):
            part_RN = self.block_sum(codes_RK[:, block], numbers_NK[:, block])
            total_RN = total_RN + self.scaled(part_RN, scale_RK[:, block][:, :1], scale_NK[:, block][:, 0])
        return total_RN

    def blocks(self, w: Encoded) -> list[slice]:
        """Columns under one scale."""
        size = ENCODINGS[w.scheme].columns
        if size is None:
            return [slice(0, w.num_columns)]
        return [slice(max(first, 0), min(first + size, w.num_columns))
                for first in range(-w.column_start, w.num_columns, size)]

    def block_sum(self, codes_RK: torch.Tensor, numbers_NK: torch.Tensor) -> torch.Tensor:
        """Sums of products of codes, in fp32."""
        return codes_RK @ numbers_NK.T

    def scaled(self, part_RN: torch.Tensor, scale_R1: torch.Tensor, scale_N: torch.Tensor) -> torch.Tensor:
        return part_RN * scale_R1 * scale_N

    # Weights.

    def decoded(self, w: Encoded) -> torch.Tensor:
        """(N, K) in fp32, exactly, without a second scale."""
        return self.numbers(w) * self.scales(w)

    def numbers(self, w: Encoded) -> torch.Tensor:
        """What codes stand for, less their zero points, (N, K)."""
        kind, codes = ENCODINGS[w.scheme].codes, w.codes
        if kind is Codes.INT8:
            return codes.float()
        if kind is Codes.E4M3:
            return floating(codes.view(torch.uint8), 4, 3, 7)
        low_high = torch.stack([codes & 0xF, (codes >> 4) & 0xF], 2).flatten(1)[:, :w.num_columns]
        if kind is Codes.E2M1:
            return floating(low_high, 2, 1, 1)
        zeros = torch.full((len(codes), 1), 8.0) if w.zeros is None else w.zeros.float()
        return low_high.float() - self.of_columns(zeros.expand(-1, w.scales.shape[1]), w)

    def scales(self, w: Encoded) -> torch.Tensor:
        """The scale of every element, (N, K) fp32."""
        kind = ENCODINGS[w.scheme].scales
        if kind is Scales.E8M0:
            scales = torch.pow(2.0, w.scales.double() - 127).float()
        elif kind is Scales.E4M3:
            scales = floating(w.scales.view(torch.uint8), 4, 3, 7)
        else:
            scales = w.scales.float()
        return self.of_columns(self.of_rows(scales, w), w)

    def of_rows(self, scales: torch.Tensor, w: Encoded) -> torch.Tensor:
        size = ENCODINGS[w.scheme].rows
        row_N = torch.arange(w.shape[0])
        return scales[(row_N + w.row_start) // size if size else row_N * 0]

    def of_columns(self, per_block: torch.Tensor, w: Encoded) -> torch.Tensor:
        size = ENCODINGS[w.scheme].columns
        if w.groups is not None:
            return per_block[:, w.groups.long()]
        column_K = torch.arange(w.num_columns)
        return per_block[:, (column_K + w.column_start) // size if size else column_K * 0]


def floating(bits: torch.Tensor, exponent_bits: int, fraction_bits: int, bias: int) -> torch.Tensor:
    """The numbers that small floating-point codes stand for, fp32, by the definition of their fields."""
    bits = bits.int()
    fraction, exponent = bits % 2**fraction_bits, (bits >> fraction_bits) % 2**exponent_bits
    sign = 1 - 2 * (bits >> (exponent_bits + fraction_bits))
    normal = (2**fraction_bits + fraction) * torch.pow(2.0, (exponent - bias - fraction_bits).float())
    subnormal = fraction * 2.0 ** (1 - bias - fraction_bits)
    return sign * torch.where(exponent == 0, subnormal, normal)


class Int8Rows(QuantisedMoE):
    """int8 weights with rows rounded to int8 (W8A8)."""

    products = {**PRODUCTS, Scheme.INT8: "int8_row"}


class HiddenOperands(QuantisedMoE):
    """Shows no codes."""

    shows_operands = False


quantised, int8_rows, hidden_operands = QuantisedMoE(), Int8Rows(), HiddenOperands()
