"""What a subject makes of its operands before it multiplies: exact arithmetic, which the oracle executes."""

from dataclasses import dataclass

import torch

from moe_ref.contract.vocabulary import Format
from moe_ref.numerics.formats import Mode, round_to


@dataclass(frozen=True)
class Conversion:
    """Operands rounded to `stored`, None: as they are. scaled: rows are first scaled by powers of two to its range."""

    stored: Format | None = None
    mode: Mode = "nearest"
    scaled: bool = False

    @property
    def words(self) -> str:
        """As it is called in tables: "operands as they are", "tf32 operands", "tf32 operands, cut off"."""
        if self.stored is None:
            return "operands as they are"
        # Both have 11 significant bits; they differ beyond fp16's range only.
        alike = " (or fp16, which looks the same)" * (self == Conversion(Format.TF32))
        return f"{self.stored} operands{alike}" + ", cut off" * (self.mode == "truncate")

    def codes(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The format's numbers, fp64, and the exponents (rows, 1) of the powers of two that they are scaled by."""
        exponents = torch.zeros(*values.shape[:-1], 1, dtype=torch.int32)
        if self.scaled:
            # 2^8 below the 448 of e4m3: the largest entry of a row lies in [128, 256).
            exponents = torch.frexp(values.abs().amax(-1, keepdim=True)).exponent - 8
        if self.stored is None:
            return values, exponents
        return round_to(torch.ldexp(values, -exponents), self.stored, self.mode), exponents

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """The numbers that are multiplied, fp64, of fp64 values."""
        codes, exponents = self.codes(values)
        return torch.ldexp(codes, exponents)


AS_THEY_ARE = Conversion()

COUNTERFACTUALS = (
    AS_THEY_ARE, Conversion(Format.TF32), Conversion(Format.TF32, "truncate"), Conversion(Format.FP16),
    Conversion(Format.BF16), Conversion(Format.BF16, "truncate"), Conversion(Format.E4M3, scaled=True),
)
"""What attribution tries, the mildest first: of two that explain as much, the first is named."""
