"""Right layers over encoded experts that are unlike the plain one: other quotients, stores, orders and layouts."""

from dataclasses import replace

import torch

from moe_ref.contract.capabilities import Products
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.quantised import QuantisedWeights
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.vocabulary import Scheme, Stage
from tests.subjects.base import ALL_STAGES, ROUND_EACH_STAGE
from tests.subjects.parallel_call import ParallelCall, Routed, Served
from tests.subjects.parallel_variants import UNCOUNTED
from tests.subjects.quantised import PRODUCTS, HiddenOperands, Int8Rows, Matrix, Operand, QuantisedMoE


class Reciprocals(QuantisedMoE):
    """Multiplies by the reciprocals of scales and of the largest code, as kernels do that have no division to spare."""

    def quotient(self, rows_RK: torch.Tensor, scale_RK: torch.Tensor) -> torch.Tensor:
        return rows_RK * (1 / scale_RK)

    def scale_of(self, largest_RQ: torch.Tensor, products: Products) -> torch.Tensor:
        if products == "mxfp8":
            return super().scale_of(largest_RQ, products)
        return largest_RQ * torch.tensor(1 / (127 if products == "int8_row" else 448))


class Int8Reciprocals(Reciprocals, Int8Rows):
    """The same with int8 rows."""


class Fused(QuantisedMoE):
    """Activations are rounded to codes where they are made: nobody stores them, and codes alone are shown."""

    stored = {stage: form for stage, form in ROUND_EACH_STAGE.items() if stage is not Stage.ACT}
    shows = tuple(stage for stage in ALL_STAGES if stage is not Stage.ACT)


class HiddenFused(Fused):
    """The same with nothing shown of it."""

    shows_operands = False


class ScalesTogether(QuantisedMoE):
    """Both scales are multiplied first; blocks are added from the last one on."""

    def scaled(self, part_RN: torch.Tensor, scale_R1: torch.Tensor, scale_N: torch.Tensor) -> torch.Tensor:
        return part_RN * (scale_R1 * scale_N)

    def blocks(self, w: Encoded) -> list[slice]:
        return super().blocks(w)[::-1]


class ScaledOperands(QuantisedMoE):
    """Codes are multiplied with their scales before the product, in fp32, which is one sum over all columns."""

    products = {**PRODUCTS, Scheme.INT8: "int8_row"}

    def sum_of_blocks(self, codes_RK: torch.Tensor, scale_RK: torch.Tensor, w: Encoded) -> torch.Tensor:
        return (codes_RK * scale_RK) @ self.decoded(w).T


class SmallerSteps(QuantisedMoE):
    """Every block is added up in steps of 16 columns, and every step's sum is scaled by itself."""

    def blocks(self, w: Encoded) -> list[slice]:
        return [slice(first, min(first + 16, block.stop)) for block in super().blocks(w)
                for first in range(block.start, block.stop, 16)]


class ShuffledScales(QuantisedMoE):
    """Scales of groups are kept in a kernel's order, which is another one where the input axis has a single group."""

    def taken(self, call: ParallelCall, weights: QuantisedWeights) -> QuantisedWeights:
        held = {name: getattr(weights, name) for name in ("w13", "w2", "shared_w13", "shared_w2")}
        return replace(weights, **{name: self.shuffled(call, one) for name, one in held.items()
                                   if one is not None and grouped(one)})

    def shuffled(self, call: ParallelCall, w: Encoded) -> Encoded:
        """Even rows before odd ones, and one group after the other where there are several."""
        rows = torch.cat([w.scales[..., 0::2, :].float(), w.scales[..., 1::2, :].float()], -2)
        scales = self.interleaved(rows) if self.has_groups(call, w) else rows
        return replace(w, scales=scales.to(w.scales.dtype))

    def has_groups(self, call: ParallelCall, w: Encoded) -> bool:
        return w.scales.shape[-1] > 1

    def interleaved(self, scales: torch.Tensor) -> torch.Tensor:
        return scales.mT.reshape(scales.shape)

    def scales(self, w: Encoded) -> torch.Tensor:
        """As a kernel takes them for the scales of every row and group."""
        if not grouped(w):
            return super().scales(w)
        rows, groups = w.scales.shape
        row_N = torch.arange(rows)
        read = w.scales.float().reshape(groups, rows).T[row_N // 2 + row_N % 2 * (-(-rows // 2))]
        return super().scales(replace(w, scales=read.to(w.scales.dtype)))


class TravellingCodes(QuantisedMoE):
    """Rows that travel to their experts do so as codes and scales, which a kernel takes block by block."""

    promises = UNCOUNTED

    def dispatched(self, call: ParallelCall, group: Routed) -> Served:
        w13, products = Matrix(call.weights.w13, call.weights), self.products_of(call.weights.w13)
        if not call.travels or products in ("exact", "fp8_tensor"):
            return super().dispatched(call, group)
        scales_TQ = self.row_scales(group.x_TH.float(), products, w13)
        codes_TH = self.row_codes(group.x_TH.float(), self.over_columns(scales_TQ, group.x_TH.shape[1], w13), products)
        served = super().dispatched(call, replace(group, x_TH=torch.cat([codes_TH, scales_TQ], 1)))
        codes_RH, scales_RQ = served.x_RH.split([codes_TH.shape[1], scales_TQ.shape[1]], 1)
        read_RQ = self.swizzled(call, scales_RQ).view(scales_RQ.T.shape).T
        return replace(served, x_RH=torch.cat([codes_RH, read_RQ], 1))

    def swizzled(self, call: ParallelCall, scales_RQ: torch.Tensor) -> torch.Tensor:
        return scales_RQ.T.flatten()

    def operand(self, rows_RK: torch.Tensor, w: Matrix) -> Operand:
        num_columns = w.encoded.num_columns
        if rows_RK.shape[1] == num_columns:
            return super().operand(rows_RK, w)
        codes_RK, scales_RQ = rows_RK[:, :num_columns], rows_RK[:, num_columns:]
        self.keep(w, scales_RQ, codes_RK)
        return codes_RK, self.over_columns(scales_RQ, num_columns, w)


def grouped(w: Encoded) -> bool:
    """Whether every row has a scale for each of several groups."""
    return ENCODINGS[w.scheme].rows == 1 and ENCODINGS[w.scheme].columns is not None


RIGHT = {one.__name__: one for one in (
    QuantisedMoE, Int8Rows, HiddenOperands, Reciprocals, Int8Reciprocals, Fused, HiddenFused, ScalesTogether,
    ScaledOperands, SmallerSteps, ShuffledScales,
    TravellingCodes)}

reciprocals, int8_reciprocals, fused, hidden_fused = Reciprocals(), Int8Reciprocals(), Fused(), HiddenFused()
scales_together, scaled_operands, smaller_steps = ScalesTogether(), ScaledOperands(), SmallerSteps()
shuffled_scales, travelling_codes = ShuffledScales(), TravellingCodes()
