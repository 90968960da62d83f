"""What a planted fault is expected to do to a layer whose sums are exact, with nothing taken from the judged run."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from moe_ref.contract.vocabulary import Stage
from moe_ref.numerics.accumulation import LOST, ROUNDING
from moe_ref.simulated.fault import Fault, Matmul, Product
from moe_ref.simulated.faults import BLOCK, AccumulatedInBF16, AccumulatedInFP16, AccumulationTruncated


@dataclass(frozen=True)
class ExpectedSum(Fault):
    """The exact product and an error drawn from what rounding the running sum every `step` terms is expected to do.

    unit: unit roundoff of the sum. truncates: whether sums lose the mean of a cut at every step besides.
    """

    name: ClassVar[str] = "expected_sum"
    stage: ClassVar[Stage] = Stage.GATE_UP
    unit: float
    step: int
    truncates: bool = False

    def product(self, matmul: Matmul, a_RK: torch.Tensor, b_KN: torch.Tensor, of: Product) -> torch.Tensor:
        value_RN = torch.zeros(len(a_RK), b_KN.shape[1], dtype=torch.float64)
        squares_RN, sums_RN = torch.zeros_like(value_RN), torch.zeros_like(value_RN)
        for a_RS, b_SN in zip(a_RK.split(self.step, 1), b_KN.split(self.step), strict=True):
            value_RN = torch.addmm(value_RN, a_RS, b_SN)
            squares_RN += value_RN.square()
            sums_RN += value_RN
        drawn = torch.Generator().manual_seed(1000 * of.expert + 10 * of.rank + (of.stage is Stage.DOWN))
        noise_RN = torch.randn(value_RN.shape, dtype=torch.float64, generator=drawn)
        error_RN = noise_RN * (ROUNDING * self.unit**2 * squares_RN).sqrt()
        return value_RN + error_RN - LOST * 2 * self.unit * sums_RN * self.truncates


_SUMS: dict[type[Fault], ExpectedSum] = {
    AccumulatedInBF16: ExpectedSum(2.0**-8, BLOCK), AccumulatedInFP16: ExpectedSum(2.0**-11, 16),
    AccumulationTruncated: ExpectedSum(2.0**-24, 16, truncates=True)}


def expected(fault: Fault) -> Fault:
    """The fault as a layer with exact sums has it; what is drawn stands for the fault of a sum, all else is itself."""
    return _SUMS.get(type(fault), fault)
