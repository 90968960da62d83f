"""A readable torch layer over encoded weights, every step on its own so that it can be replaced.

Codes are read bit by bit, by code of its own. Weight-only schemes round decoded weights to the dtype of the model;
the others multiply codes of both operands, block by block of their scales.
"""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

from moe_ref.contract.capabilities import Numerics, Products
from moe_ref.contract.comm import Groups
from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.features import Feature
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.quantised import QuantisedWeights
from moe_ref.contract.schemes import ENCODINGS, Codes, Scales
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Dtype, Format, Scheme, Stage
from tests.subjects.base import ALL_STAGES, Call, TorchMoE

PRODUCTS: dict[Scheme, Products] = {Scheme.FP8_TENSOR: "fp8_tensor", Scheme.FP8_ROW: "fp8_row",
                                    Scheme.FP8_BLOCK: "fp8_block", Scheme.MXFP8: "mxfp8"}
"""Schemes whose rows are rounded to 8 bits; of the others weights are decoded."""

EXACT = (Scheme.INT8, Scheme.NVFP4)
"""Schemes whose codes, or codes times scales of blocks, are exact in 16 bits: scales of rows join the sum."""

COLUMNS = {"fp8_block": 128, "mxfp8": 32}
OPERAND_STAGES = (Stage.PERMUTE_SCALES, Stage.PERMUTE_CODES, Stage.ACT_SCALES, Stage.ACT_CODES)


@dataclass(frozen=True)
class Held:
    """What the steps of TorchMoE read of encoded weights; `matrices` by expert, -1 for the shared one."""

    weights: QuantisedWeights

    @property
    def w13_EGIH(self) -> SimpleNamespace:
        return SimpleNamespace(shape=self.weights.w13.shape)

    def __getattr__(self, name: str) -> object:
        return getattr(self.weights, name)

    def expert(self, e: int) -> tuple[Encoded, Encoded, None, None]:
        return self.weights.w13.at(e), self.weights.w2.at(e), None, None

    def shared_expert(self) -> tuple[Encoded | None, Encoded | None, None, None]:
        return self.weights.shared_w13, self.weights.shared_w2, None, None


class QuantisedMoE(TorchMoE):
    """Every scheme. products: of which scheme rows are rounded, and how; shows_operands: their codes and scales."""

    products = PRODUCTS
    shows_operands = True
    features = (Feature.DENSE, Feature.SHARED_EXPERT, Feature.RESIDUAL)

    def __init__(self) -> None:
        self.shows = ALL_STAGES + OPERAND_STAGES if self.shows_operands else ALL_STAGES
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

    def moe(self, x_TH: torch.Tensor, weights: QuantisedWeights, spec: MoESpec, parallel: Parallel | None = None,
            groups: Groups | None = None, *, logits_TE: torch.Tensor | None = None,
            residual_TH: torch.Tensor | None = None, trace: Trace | None = None) -> torch.Tensor:
        names = {torch_dtype: name for name, torch_dtype in TORCH_DTYPES.items()}
        numerics = self.CAPABILITIES.schemes[weights.scheme][Dtype(names[x_TH.dtype])]
        call = Call(x_TH, Held(weights), spec, groups or Groups(), trace, numerics, self.shows)  # pyrefly: ignore
        self.operands: dict[Stage, dict[int, torch.Tensor]] = {}
        self.rows_of: list[torch.Tensor] = []
        ids_TK, weights_TK = self.route(call, logits_TE)
        merged_TH = self.merge(call, ids_TK, weights_TK)
        if trace is not None and self.operands and self.shows_operands:
            self.show_operands(call, ids_TK)
        return self.finish(call, merged_TH, residual_TH)

    def show_operands(self, call: Call, ids_TK: torch.Tensor) -> None:
        """In (token, slot) order, from one expert after the other."""
        for stage, by_expert in self.operands.items():
            width = next(iter(by_expert.values())).shape[1]
            whole = torch.zeros(ids_TK.numel(), width)
            for expert, rows in by_expert.items():
                whole[(ids_TK.flatten() == expert).nonzero().flatten()] = rows
            call.trace.record(stage, whole)

    # Products.

    def gate_up(self, call: Call, x_RH: torch.Tensor, w13: Encoded, expert: int) -> torch.Tensor:
        rows = self.operand(call, x_RH.float(), w13, Stage.PERMUTE, expert)
        return torch.stack([self.product(call, rows, w13.at(half)) for half in (0, 1)], 1)

    def down(self, call: Call, act_RI: torch.Tensor, w2: Encoded, expert: int) -> torch.Tensor:
        return self.product(call, self.operand(call, act_RI.float(), w2, Stage.ACT, expert), w2)

    def operand(self, call: Call, rows_RK: torch.Tensor, w: Encoded, stage: Stage, expert: int
                ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes as numbers, and the scale of every column; the rows and 1 where nothing is rounded."""
        products = call.numerics.products
        if products == "exact":
            return rows_RK, torch.ones(())
        fixed = self.fixed_scale(call.weights, stage, expert) if products == "fp8_tensor" else None
        scales_RQ, size = self.row_scales(rows_RK, products, w.column_start, fixed), COLUMNS.get(products)
        column_K = torch.arange(rows_RK.shape[1]) + w.column_start
        scale_RK = scales_RQ[:, column_K // size] if size else scales_RQ.expand_as(rows_RK)
        codes_RK = self.row_codes(rows_RK, scale_RK, products)
        if expert >= 0:
            named = dict(zip((f"{stage}_scales", f"{stage}_codes"), (scales_RQ, codes_RK), strict=True))
            for name, one in named.items():
                self.operands.setdefault(Stage(name), {})[expert] = one
        return codes_RK, scale_RK

    def fixed_scale(self, weights: QuantisedWeights, stage: Stage, expert: int) -> torch.Tensor:
        first = stage is Stage.PERMUTE
        if expert < 0:
            return weights.shared_w13_input_scale if first else weights.shared_w2_input_scale
        return (weights.w13_input_scale_E if first else weights.w2_input_scale_E)[expert]

    def row_scales(self, rows_RK: torch.Tensor, products: Products, start: int,
                   fixed: torch.Tensor | None) -> torch.Tensor:
        """(R, blocks) fp32."""
        if fixed is not None:
            return fixed.expand(len(rows_RK), 1)
        size = COLUMNS.get(products)
        start = start if size else 0
        size = size or max(1, rows_RK.shape[1])
        padded = torch.nn.functional.pad(rows_RK.abs(), (start, -(start + rows_RK.shape[1]) % size))
        largest_RQ = padded.unflatten(1, (-1, size)).amax(-1)
        scales = largest_RQ / (127 if products == "int8_row" else 448)
        if products == "mxfp8":
            scales = torch.exp2(torch.ceil(torch.log2(scales)))
        return torch.where(scales < 2.0**-126, 1.0, scales)

    def row_codes(self, rows_RK: torch.Tensor, scale_RK: torch.Tensor, products: Products) -> torch.Tensor:
        if products == "int8_row":
            return torch.round(rows_RK / scale_RK).clamp(-127, 127)
        return (rows_RK / scale_RK).clamp(-448, 448).to(torch.float8_e4m3fn).float()

    def product(self, call: Call, rows: tuple[torch.Tensor, torch.Tensor], w: Encoded) -> torch.Tensor:
        """rows @ w^T, (R, N): decoded weights, or sums of codes times scales for every block of columns."""
        codes_RK, scale_RK = rows
        if call.numerics.products == "exact":
            if w.scheme is Scheme.INT8:
                return codes_RK @ self.numbers(w).T * self.scales(w)[:, 0]
            second = 1.0 if w.second_scale is None else w.second_scale
            return codes_RK @ self.decoded(w).to(call.x_TH.dtype).float().T * second
        size = ENCODINGS[w.scheme].columns or max(1, w.num_columns)
        total_RN = torch.zeros(len(codes_RK), w.shape[0])
        numbers_NK, scale_NK = self.numbers(w), self.scales(w)
        for start in range(-(w.column_start if ENCODINGS[w.scheme].columns else 0), w.num_columns, size):
            block = slice(max(start, 0), min(start + size, w.num_columns))
            part_RN = codes_RK[:, block] @ numbers_NK[:, block].T
            total_RN += part_RN * scale_RK[:, block][:, :1] * scale_NK[:, block][:, 0]
        return total_RN

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
