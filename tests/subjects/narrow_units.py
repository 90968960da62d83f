"""Layers over codes in e4m3 whose products are those of a matrix unit that keeps few bits of a sum, bit by bit."""

from dataclasses import replace
from functools import cached_property

import torch

from moe_ref.contract.capabilities import E4M3_OPERANDS
from moe_ref.contract.vocabulary import Format
from moe_ref.numerics.tensor_core import TensorCore, matmul, tensor_core
from moe_ref.tolerances.load import load_tolerances
from tests.subjects.fp8_training import Fp8Training, Quantiser
from tests.subjects.mistaken_scales import ScaleOfNextBlock, ScaleOfNextRow
from tests.subjects.quantised import HiddenOperands, QuantisedMoE

PRODUCTS_OF_ONE_SUM = {"mxfp8": 32, "fp8_block": 128}
"""Where scales change along a sum, so that it leaves the unit there."""


class NarrowUnit(QuantisedMoE):
    """Right, on an H100. promotes: products whose sum joins a register in fp32, where scales stay; 0: none.

    declares: the same, as its contract has it; None: what it does.
    """

    promotes = 128
    declares: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.CAPABILITIES = replace(self.CAPABILITIES, schemes={
            scheme: {dtype: replace(one, promoted_after=self.declared_after(one.products))
                     for dtype, one in numerics.items()}
            for scheme, numerics in self.CAPABILITIES.schemes.items()})

    def declared_after(self, products: str) -> int | None:
        if products not in E4M3_OPERANDS:
            return None
        return PRODUCTS_OF_ONE_SUM.get(products) or self.declares or self.promotes or None

    @cached_property
    def core(self) -> TensorCore:
        unit = tensor_core(load_tolerances().file.hardware["sm90"], Format.E4M3)
        return replace(unit, promote_every=self.promotes)

    def block_sum(self, codes_RK: torch.Tensor, numbers_NK: torch.Tensor) -> torch.Tensor:
        return matmul(codes_RK.double(), numbers_NK.T.double(), self.core).float()


class OneSum(NarrowUnit):
    """The whole sum is the unit's, as in kernels that hand it their accumulator: right, where it is declared."""

    promotes = 0


class Hidden(NarrowUnit, HiddenOperands):
    """Shows no codes."""


class HiddenOneSum(OneSum, HiddenOperands):
    """Shows no codes, and leaves no sum before its end."""


class UnitOfQuantiser(Quantiser):
    """Products of codes in the unit, forward and backward."""

    promotes = 128

    def product(self, a_MK: torch.Tensor, w_NK: torch.Tensor, is_backward: bool) -> torch.Tensor:
        scale_M1, scale_N1 = self.scales(a_MK, is_backward), self.scales(w_NK, is_backward)
        codes_MK, codes_NK = self.codes(a_MK, scale_M1, is_backward), self.codes(w_NK, scale_N1, is_backward)
        core = replace(tensor_core(load_tolerances().file.hardware["sm90"], Format.E4M3), promote_every=self.promotes)
        return matmul(codes_MK.double(), codes_NK.T.double(), core).float() * scale_M1 * scale_N1.T


class WholeSums(UnitOfQuantiser):
    """Without promotion."""

    promotes = 0


class Training(Fp8Training):
    """Trains in 8 bits on the unit."""

    quantiser = UnitOfQuantiser

    def __init__(self) -> None:
        super().__init__()
        self.CAPABILITIES = replace(self.CAPABILITIES, numerics={
            dtype: replace(one, promoted_after=self.quantiser.promotes or None)
            for dtype, one in self.CAPABILITIES.numerics.items()})


class TrainingInOneSum(Training):
    """The same, without promotion."""

    quantiser = WholeSums


# Mistakes.


class DeclaredShorter(OneSum):
    """Declares sums of 128 products, and adds up all of them."""

    declares = 128


class NextRow(ScaleOfNextRow, NarrowUnit):
    """A weight's scale is that of the next row."""


class NextRowOneSum(ScaleOfNextRow, OneSum):
    """The same without promotion."""


class NextBlock(ScaleOfNextBlock, NarrowUnit):
    """A weight's scale is that of the next block."""


class BlockMissing(NarrowUnit):
    """The last 32 products of a sum are left out."""

    def block_sum(self, codes_RK: torch.Tensor, numbers_NK: torch.Tensor) -> torch.Tensor:
        kept = max(1, codes_RK.shape[1] - 32)
        return super().block_sum(codes_RK[:, :kept], numbers_NK[:, :kept])


class BlockMissingOneSum(BlockMissing, OneSum):
    """The same without promotion."""


class BF16Register(NarrowUnit):
    """The register that sums of the unit join is in bf16."""

    def block_sum(self, codes_RK: torch.Tensor, numbers_NK: torch.Tensor) -> torch.Tensor:
        total_RN = torch.zeros(len(codes_RK), len(numbers_NK))
        for first in range(0, codes_RK.shape[1], 32):
            at = slice(first, first + 32)
            total_RN = (total_RN + super().block_sum(codes_RK[:, at], numbers_NK[:, at])).bfloat16().float()
        return total_RN


class BF16RegisterOneSum(BF16Register, OneSum):
    """The same, of a contract whose whole sum is the unit's."""
