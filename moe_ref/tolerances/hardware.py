"""How a class of hardware adds up long sums of products."""

from typing import Annotated, Literal, get_args

import msgspec

from moe_ref.contract.vocabulary import Format
from moe_ref.tolerances.base import Bits, Count, Entry, FractionBits

HardwareName = Literal["cpu", "cuda", "sm80", "sm90", "sm100"]
"""Classes that tolerances.yaml holds; cuda stands for a device that none of the others is known to be."""
HARDWARE: tuple[str, ...] = get_args(HardwareName)


class HardwareEntry(Entry, frozen=True):
    """One class.

    factor: what multiplies n 2^-24 in the rigorous bound, for fp32 and 16-bit operands. truncates: whether the sum of
    one step is cut off, not rounded to nearest. products_per_step: how many products of 16-bit operands are added at
    once, with the sum before them. kept_bits: fraction bits that addends keep below the exponent of the largest of a
    step; 0: they are not aligned. significand_bits: of the sum, the hidden one included. tf32_operands: how the
    hardware itself makes tf32 of fp32. tf32_*, fp8_*: the same for such operands; what tf32 lacks is as for 16 bits.
    """

    factor: Annotated[float, msgspec.Meta(ge=1.0, le=16.0)]
    truncates: bool
    products_per_step: Count
    kept_bits: FractionBits
    significand_bits: Bits
    tf32_products_per_step: Count
    tf32_operands: Literal["nearest", "truncate"]
    fp8_products_per_step: Count
    fp8_kept_bits: FractionBits
    fp8_significand_bits: Bits

    def __post_init__(self) -> None:
        if self.truncates and not (self.kept_bits and self.fp8_kept_bits):
            raise ValueError("truncates, but kept_bits and fp8_kept_bits should be at least 1 then")
        if self.factor < (least := self.factor_of(Format.BF16)):
            raise ValueError(f"factor {self.factor:g}, but products_per_step, kept_bits and significand_bits need "
                             f"at least {least:g}")

    def step_of(self, operands: Format) -> tuple[int, int, int]:
        """Products per step, kept bits and significand bits for operands of a format."""
        if operands in (Format.E4M3, Format.E5M2):
            return self.fp8_products_per_step, self.fp8_kept_bits, self.fp8_significand_bits
        products = self.tf32_products_per_step if operands is Format.TF32 else self.products_per_step
        return products, self.kept_bits, self.significand_bits

    def factor_of(self, operands: Format) -> float:
        """What multiplies n 2^-24 in the bound of a sum of n products: docs/bounds.md, "The device factor"."""
        if not self.truncates or operands in (Format.FP32, Format.FP64):
            return 1.0
        products, kept, significand = self.step_of(operands)
        whole_steps = 2.0**24 / products * (2.0 ** (1 - significand) + (products + 1) * 2.0**-kept)
        # A sum of two products may lose two units in its one cut.
        return max(1.0, whole_steps)
