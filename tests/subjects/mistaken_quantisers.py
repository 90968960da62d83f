"""Layers whose rows are rounded to codes in a wrong way, or whose products of codes are, after defects that shipped."""

from dataclasses import replace

import torch

from moe_ref.contract.capabilities import Products
from tests.subjects.quantised import HiddenOperands, Matrix, QuantisedMoE


class ScaleOfTheTensor(QuantisedMoE):
    """One scale for all rows of an expert."""

    def scale_of(self, largest_RQ: torch.Tensor, products: Products) -> torch.Tensor:
        largest = largest_RQ.max() if largest_RQ.numel() else largest_RQ
        return super().scale_of(largest.expand_as(largest_RQ), products)


class ScaleOfTheRow(QuantisedMoE):
    """One scale for all blocks of a row."""

    def scale_of(self, largest_RQ: torch.Tensor, products: Products) -> torch.Tensor:
        return super().scale_of(largest_RQ.amax(1, keepdim=True).expand_as(largest_RQ), products)


class ScalesRoundedDown(QuantisedMoE):
    """Powers of two below the quotient, so that the largest numbers of a block saturate."""

    def scale_of(self, largest_RQ: torch.Tensor, products: Products) -> torch.Tensor:
        return torch.exp2(torch.floor(torch.log2(largest_RQ / 448)))


class FixedScaleMissing(QuantisedMoE):
    """A scale of 1 in place of the one that was chosen for the expert's rows."""

    def row_scales(self, rows_RK: torch.Tensor, products: Products, w: Matrix) -> torch.Tensor:
        return super().row_scales(rows_RK, products, replace(w, input_scale=torch.ones(())))


class NotSaturating(QuantisedMoE):
    """Numbers above the largest code become NaN."""

    def row_codes(self, rows_RK: torch.Tensor, scale_RK: torch.Tensor, products: Products) -> torch.Tensor:
        past = self.quotient(rows_RK, scale_RK).abs() > 448
        return torch.where(past, torch.nan, super().row_codes(rows_RK, scale_RK, products))


class CodesCutOff(QuantisedMoE):
    """Codes are rounded towards zero."""

    def row_codes(self, rows_RK: torch.Tensor, scale_RK: torch.Tensor, products: Products) -> torch.Tensor:
        nearest, quotient = super().row_codes(rows_RK, scale_RK, products), self.quotient(rows_RK, scale_RK)
        below = (nearest.to(torch.float8_e4m3fn).view(torch.uint8) - 1).view(torch.float8_e4m3fn).float()
        return torch.where(nearest.abs() > quotient.abs(), below, nearest)


class RoundedTwice(QuantisedMoE):
    """The quotient is stored in bf16 before it becomes a code."""

    def quotient(self, rows_RK: torch.Tensor, scale_RK: torch.Tensor) -> torch.Tensor:
        return super().quotient(rows_RK, scale_RK).bfloat16().float()


class RowsAsE5M2(QuantisedMoE):
    """Rows are rounded to e5m2."""

    def row_codes(self, rows_RK: torch.Tensor, scale_RK: torch.Tensor, products: Products) -> torch.Tensor:
        return self.quotient(rows_RK, scale_RK).clamp(-448, 448).to(torch.float8_e5m2).float()


class BlocksBeginWithTheShard(HiddenOperands):
    """Blocks of the activation begin with the rank's columns, where its weights begin inside a block."""

    def operand(self, rows_RK: torch.Tensor, w: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
        return super().operand(rows_RK, replace(w, encoded=replace(w.encoded, column_start=0)))


class NotPromoted(QuantisedMoE):
    """Sums of products of codes stay in an accumulator of 13 bits, as of tensor cores, over all columns."""

    def block_sum(self, codes_RK: torch.Tensor, numbers_NK: torch.Tensor) -> torch.Tensor:
        total_RN = torch.zeros(len(codes_RK), len(numbers_NK))
        for start in range(0, codes_RK.shape[1], 32):
            block = slice(start, start + 32)
            total_RN = cut_to_13_bits(total_RN + codes_RK[:, block] @ numbers_NK[:, block].T)
        return total_RN


def cut_to_13_bits(numbers: torch.Tensor) -> torch.Tensor:
    mantissa, exponent = torch.frexp(numbers)
    return torch.ldexp(torch.trunc(mantissa * 2**13) / 2**13, exponent)
