"""The rounding model: how far a right implementation may be from the real-arithmetic result, per element.

Deterministic and componentwise: whatever the order of summation, |computed - exact| <= the bound. Inputs
are fp64 tensors of exact values and of gauges (sums of absolute values); nothing here is statistical.
docs/bounds.md has the derivation.
"""

import math
from dataclasses import dataclass

import torch

from moe_ref.contract.spec import MLP, Router
from moe_ref.contract.vocabulary import Format
from moe_ref.verify.tolerances import Tolerances

ORACLE_UNIT = 2.0**-53
"""The oracle's own sums are in fp64; their error is part of every bound."""

FP32_UNIT = 2.0**-24
FLUSH = 2.0**-126
"""Smallest normal fp32 number: what flushing subnormals to zero can cost one operation."""

SLOPE = {"silu": 1.1, "gelu": 1.13, "gelu_tanh": 1.13}
"""Largest |derivative| of each activation: silu 1.0998 at g = 2.40, gelu 1.1290 at g = sqrt 2."""


@dataclass(frozen=True)
class RoundingModel:
    """Bounds for one device class ("cpu" or "cuda") and one accumulation format."""

    tolerances: Tolerances
    device: str
    accumulate: Format

    @property
    def unit(self) -> float:
        """Unit roundoff of a long sum, with the device's factor."""
        entry = self.tolerances.file.formats[self.accumulate]
        return self.tolerances.file.accumulators[self.device].factor * 2.0**-entry.significand_bits

    def summed(self, gauge: torch.Tensor, terms: int) -> torch.Tensor:
        """Error of a sum of `terms` products with sum of absolute products `gauge`, in any order."""
        return (gamma(terms, self.unit) + gamma(terms, ORACLE_UNIT)) * gauge + terms * FLUSH

    def rounded(self, magnitude: torch.Tensor, stored: Format | None) -> torch.Tensor:
        """Half an ulp of `stored` at `magnitude`, the largest value that may be rounded; 0 if kept in registers.

        Infinite where the magnitude passes the format's largest finite value.
        """
        if stored is None:
            return torch.zeros_like(magnitude)
        entry = self.tolerances.file.formats[stored]
        # frexp has magnitude in [2^(e-1), 2^e), where one ulp is 2^(e-p); half of it is 2^(e-p-1). It says e = 0 for 0.
        floor = entry.min_exponent + 1
        exponent = torch.where(magnitude == 0, floor, torch.frexp(magnitude).exponent.clamp(min=floor))
        half = torch.ldexp(torch.ones_like(magnitude), exponent - entry.significand_bits - 1) + FLUSH
        # Beyond the largest finite value an infinity is right too, so nothing bounds the error.
        return torch.where(magnitude < entry.max, half, torch.inf)

    def largest(self, stored: Format | None) -> float:
        """Largest finite value of a stored format."""
        return math.inf if stored is None else self.tolerances.file.formats[stored].max

    def activated(self, gate: torch.Tensor, up: torch.Tensor, act: torch.Tensor, gate_bound: torch.Tensor,
                  up_bound: torch.Tensor, mlp: MLP) -> torch.Tensor:
        """Error of activation(gate) * up before it is stored, from the errors of gate and up.

        First order plus the cross term with the largest slope, plus the evaluation in fp32. silu's error is
        relative to its value and grows with the exponent's argument; gelu cancels for negative gates, so its
        error is relative to |gate * up|.
        """
        slope = SLOPE[mlp.activation]
        value = act.abs() if mlp.activation == "silu" else (gate * up).abs()
        activation = torch.where(up == 0, gate.abs(), (act / up).abs())
        propagated = slope * gate_bound * (up.abs() + up_bound) + activation * up_bound
        units = self.tolerances.file.evaluations.activation.units + gate.abs()
        # The sigmoid of a large negative gate is flushed, or its exponential overflows: it may be 0 below 2^-126.
        flushed = FLUSH * (1 + gate.abs()) * (1 + up.abs())
        return propagated + units * self.evaluation_unit * (value + propagated) + flushed

    def score_units(self, logits_TE: torch.Tensor, router: Router) -> torch.Tensor:
        """Relative evaluation error of every score, in absolute terms of the unit, (T, E)."""
        base = self.tolerances.file.evaluations.score.units
        if router.score == "softmax":
            spread = logits_TE.amax(-1, keepdim=True) - logits_TE
            return (base + logits_TE.shape[1] + 2 * spread) * self.evaluation_unit
        return (base + logits_TE.abs()) * self.evaluation_unit

    @property
    def evaluation_unit(self) -> float:
        """Unit of elementwise functions: fp32, or fp64 for an implementation that accumulates in it."""
        return ORACLE_UNIT if self.accumulate is Format.FP64 else FP32_UNIT

    def weight_units(self, score_units_TK: torch.Tensor, router: Router) -> torch.Tensor:
        """Relative error of routing weights from that of the selected scores, (T, K)."""
        units = score_units_TK
        if router.renormalize:
            units = units + units.amax(-1, keepdim=True) + (router.top_k + 4) * self.evaluation_unit
        return units + 2 * self.evaluation_unit


def gamma(terms: int, unit: float) -> float:
    """gamma_n = n u / (1 - n u), Higham 2002, lemma 3.1; raises OverflowError when n u reaches 1."""
    if terms * unit >= 1:
        raise OverflowError(f"a sum of {terms} terms has no bound at unit roundoff {unit}")
    return terms * unit / (1 - terms * unit)
