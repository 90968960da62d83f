"""The rounding model: how far a right implementation may be from the real-arithmetic result, per element.

The bound is deterministic and componentwise: whatever the order of summation, |computed - exact| <= the bound. The
variance is the mean square of what is expected. Inputs are fp64 tensors of exact values and of gauges. docs/bounds.md
and docs/numerics.md have the derivations.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from moe_ref.contract.capabilities import E4M3_OPERANDS, Numerics
from moe_ref.contract.spec import Router
from moe_ref.contract.vocabulary import Dtype, Format
from moe_ref.numerics.accumulation import LOST, ROUNDING, Accumulation, running_sum, sorted_sum
from moe_ref.numerics.formats import power_of_two, unit_in_last_place
from moe_ref.numerics.gauges import Gauges
from moe_ref.numerics.narrow_sums import narrow_errors
from moe_ref.oracle.router import capped, softplus
from moe_ref.tolerances.load import Tolerances
from moe_ref.verify.bounds.rows import Rows, total_variance

ORACLE_UNIT = 2.0**-53
"""The oracle's own sums are in fp64; their error is part of every bound."""

FP32_UNIT = 2.0**-24
FLUSH = 2.0**-126
"""Smallest normal fp32 number: what flushing subnormals to zero can cost one operation."""

ON_GRID = 1.5
"""Sums of stored numbers have few bits too many, often one, and are ties half of the time.

The mean square of what is rounded is then up to an eighth of a unit squared, where it is a twelfth of any other number.
"""

_SMALL_PARTS = 2.0**-20
"""Relative error of a product of two numbers of two tf32 parts each.

Small times small is left out, at most 2^-22 or with cut operands 2^-20; both small parts are rounded, 2^-22.
"""


@dataclass(frozen=True)
class RoundingModel:
    """Bounds for one hardware class of tolerances.yaml ("cpu", "cuda", "sm90") and one accumulation format.

    operands: the format of what long products multiply, which decides the accumulator that hardware has for it: fp32
    operands are multiplied and added one by one, others in steps. three_products: fp32 operands made of two tf32
    numbers each. promoted_after: products whose sum leaves the matrix unit for a register of the accumulation format;
    None: the whole sum is the unit's.
    """

    tolerances: Tolerances
    device: str
    accumulate: Format
    operands: Format = Format.BF16
    three_products: bool = False
    promoted_after: int | None = None

    @classmethod
    def of(cls, tolerances: Tolerances, hardware: str, numerics: Numerics, dtype: Dtype) -> "RoundingModel":
        """The model of a contract: what is multiplied has the dtype of the case, or tf32 if that is narrower."""
        if dtype is not Dtype.FP32 or numerics.products not in ("tf32", "tf32x3"):
            return cls(tolerances, hardware, numerics.accumulate, Format(dtype.value))
        return cls(tolerances, hardware, numerics.accumulate, Format.TF32, numerics.products == "tf32x3")

    def of_experts(self, numerics: Numerics) -> "RoundingModel":
        """The model of the products of experts alone, whose operands may be codes in e4m3."""
        if numerics.products not in E4M3_OPERANDS or numerics.promoted_after == 1:
            return self
        coded = replace(self, operands=Format.E4M3, promoted_after=numerics.promoted_after)
        return coded if coded.accumulation.truncates else self

    @cached_property
    def in_register(self) -> "RoundingModel":
        """The model of additions that are not the matrix unit's: of scales, biases and sums of it."""
        return replace(self, operands=Format.FP32, promoted_after=None) if self.operands is Format.E4M3 else self

    @cached_property
    def is_narrow(self) -> bool:
        """Whether the matrix unit keeps fewer bits of a sum than the accumulation format has."""
        return self.operands is Format.E4M3 and self.accumulation.unit > self.in_register.accumulation.unit

    @property
    def unit(self) -> float:
        """Unit roundoff of a long sum, with the device's factor."""
        entry = self.tolerances.file.formats[self.accumulate]
        return self.tolerances.file.hardware[self.device].factor_of(self.operands) * 2.0**-entry.significand_bits

    def summed(self, gauge: torch.Tensor, terms: int) -> torch.Tensor:
        """Error of a sum of `terms` products with sum of absolute products `gauge`, in any order."""
        if self.operands is Format.E4M3 and self.accumulation.truncates:
            held = self._lost_in_unit(min(terms, self.promoted_after or terms))
            lost = held + gamma(terms, self.in_register.unit) * (1 + held)
            return (lost + gamma(terms, ORACLE_UNIT)) * gauge + terms * FLUSH
        terms_added = 3 * terms if self.three_products else terms
        lost = gamma(terms_added, self.unit) * (1 + self.operand_error) + self.operand_error
        return (lost + gamma(terms, ORACLE_UNIT)) * gauge + terms * FLUSH

    def _lost_in_unit(self, terms: int) -> float:
        """What a sum of so many products loses in a matrix unit that cuts off, per unit of their absolute sum.

        No partial sum is larger than that, since cutting makes nothing larger: losses do not grow with those before,
        and the result is off by no more than itself and the absolute sum together.
        """
        products, kept, bits = self.tolerances.file.hardware[self.device].step_of(self.operands)
        steps = -(-terms // products)
        return min(2.0, steps * (2.0 ** (1 - bits) + (products + 1) * 2.0**-kept))

    @cached_property
    def accumulation(self) -> Accumulation:
        """How the errors of a long sum are expected to be."""
        unit = 2.0**-self.tolerances.file.formats[self.accumulate].significand_bits
        hardware = self.tolerances.file.hardware[self.device]
        if self.accumulate is not Format.FP32 or self.operands is Format.FP32:
            return Accumulation(unit)
        products, kept, bits = hardware.step_of(self.operands)
        return Accumulation(max(unit, 2.0**-bits), hardware.truncates, products, kept)

    @property
    def operand_error(self) -> float:
        """What one product may be off by, relative to it, since its operands are made tf32; 0 where they are not."""
        if self.operands is not Format.TF32:
            return 0.0
        if self.three_products:
            # The product of the small parts is left out, and each small part is rounded once.
            return _SMALL_PARTS
        one = 2.0**-11 if self.tolerances.file.hardware[self.device].tf32_operands == "nearest" else 2.0**-10
        return 2 * one + one**2

    def operand_variance(self, sums: Gauges) -> torch.Tensor | float:
        """Expected square of what making operands tf32 costs a sum of products."""
        if self.operands is not Format.TF32:
            return 0.0
        if self.three_products:
            # Cut parts lose half of that on average, all in one direction.
            return (_SMALL_PARTS / 2 * sums.value).square() + self.evaluated(_SMALL_PARTS * sums.squares.sqrt())
        unit = 2.0**-11
        rounded = 2 * ROUNDING * unit**2 * sums.squares
        if self.tolerances.file.hardware[self.device].tf32_operands == "nearest":
            return rounded
        # Both operands lose LOST 2 u of themselves on average, so the sum loses twice that of its value.
        return rounded + (2 * LOST * 2 * unit * sums.value).square()

    def drift(self, sums: Gauges, terms: int) -> torch.Tensor | None:
        """The part of that error which has one direction, towards zero, and so adds up between elements; None: none."""
        cut_operands = self.operands is Format.TF32 and (
            self.three_products or self.tolerances.file.hardware[self.device].tf32_operands == "truncate")
        if not self.accumulation.truncates and not cut_operands:
            return None
        added = self.accumulation.drift(sums, 3 * terms if self.three_products else terms)
        if not cut_operands:
            return added
        lost = _SMALL_PARTS / 2 if self.three_products else 2 * LOST * 2 * 2.0**-11
        return added - lost * sums.value

    def summed_variance(self, sums: Gauges, terms: int) -> torch.Tensor:
        """Expected square of the error of a sum of `terms` products, the oracle's own included."""
        added = self.accumulation.variance(sums, 3 * terms if self.three_products else terms)
        return added + self.operand_variance(sums) + ROUNDING * ORACLE_UNIT**2 * max(1, terms) * sums.path

    def product_errors(self, a_MK: torch.Tensor, w_NK: torch.Tensor, sums: Gauges, terms: int,
                       start: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
        """summed_variance and drift of a @ w^T, whose gauges are `sums`, with what operands of 8 bits need besides.

        start: how far inside a block of `promoted_after` products the first one lies.
        """
        if not self.is_narrow:
            return self.summed_variance(sums, terms), self.drift(sums, terms)
        size = a_MK.shape[1]
        added = self.in_register.summed_variance(sums, terms)
        variance, drift = narrow_errors(a_MK, w_NK, self.accumulation, self.promoted_after or max(1, size), start)
        return added + variance, drift

    def stored_variance(self, value: torch.Tensor, stored: Format | None) -> torch.Tensor:
        """Expected square of the error of one store: uniform over a unit in the last place; 0 if kept in registers."""
        if stored is None:
            return torch.zeros_like(value)
        # A value that is not finite has no unit; its bound is infinite, or it is not judged.
        unit = unit_in_last_place(torch.nan_to_num(value, nan=0.0), stored)
        return unit.square() / 12 + FLUSH**2

    def additions_variance(self, total: torch.Tensor, squares: torch.Tensor, addends: int,
                           summed_in: Format, largest_first: bool = False) -> torch.Tensor:
        """Expected square of the roundings of a running sum in a format, averaged over the orders of its addends.

        largest_first: addends may come in the order of their size. The last sum is the total, whose unit is known.
        """
        entry = self.tolerances.file.formats[summed_in]
        floor = addends * (2.0 ** (entry.min_exponent - entry.significand_bits) + FLUSH) ** 2
        if addends < 2:
            return torch.zeros_like(total) + floor
        rounded = (sorted_sum if largest_first else running_sum)(total, squares, addends)
        last = torch.maximum(ROUNDING * 4.0**-entry.significand_bits * total.square(),
                             self.stored_variance(total, summed_in))
        earlier = ROUNDING * 4.0**-entry.significand_bits * (rounded - total.square()).clamp(min=0.0)
        return ON_GRID * (earlier + last) + floor

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
        half = power_of_two(exponent - entry.significand_bits - 1) + FLUSH
        # Beyond the largest finite value an infinity is right too, so nothing bounds the error.
        return torch.where(magnitude < entry.max, half, torch.inf)

    def largest(self, stored: Format | None) -> float:
        """Largest finite value of a stored format."""
        return math.inf if stored is None else self.tolerances.file.formats[stored].max

    def elementwise(self, inner: Format | None) -> tuple[float, float]:
        """Unit roundoff of elementwise steps, and what underflow can cost; `inner` is a format they round to."""
        if inner is None:
            return self.evaluation_unit, FLUSH
        entry = self.tolerances.file.formats[inner]
        # Half the distance of subnormals, for each of the four steps that an activation has at most.
        underflow = 4 * (FLUSH + 2.0 ** (entry.min_exponent - entry.significand_bits))
        return max(2.0**-entry.significand_bits, self.evaluation_unit), underflow

    def evaluated(self, error: torch.Tensor) -> torch.Tensor:
        """Variance of an evaluation that is off by at most `error`: a quarter of that is its usual error."""
        return (error / 4).square()

    def softcap_error(self, rows: Rows, cap: float, inner: Format | None) -> torch.Tensor:
        """Error of evaluating cap * tanh(. / cap): absolute in the cap, since tanh may be made of a sigmoid."""
        evaluated = self.tolerances.file.evaluations.softcap.units * self.evaluation_unit * cap
        if inner is None:
            return torch.full_like(rows.value, evaluated)
        # Rounded to the format, division, tanh and product: once each, relative to a value of at most the cap.
        return evaluated + 5 * self.elementwise(inner)[0] * rows.largest.clamp(max=cap)

    def capped(self, logits: Rows, router: Router) -> Rows:
        """Logits after their scale and cap; both keep or shrink an error but for the factor of the scale."""
        value, propagated = capped(logits.value, router), logits.bound * router.logit_scale
        evaluated = torch.zeros_like(propagated)
        if router.logit_scale != 1.0:
            evaluated = evaluated + 2 * self.evaluation_unit * router.logit_scale * logits.largest
        if router.logit_softcap:
            evaluated = evaluated + self.softcap_error(logits, router.logit_softcap, None)
        variance = None if logits.variance is None else router.logit_scale**2 * logits.variance
        return Rows(value, propagated + evaluated, total_variance(variance, self.evaluated(evaluated)))

    def score_units(self, logits_TE: torch.Tensor, router: Router) -> torch.Tensor:
        """Relative evaluation error of every score from capped logits, in absolute terms of the unit, (T, E)."""
        base, unit = self.tolerances.file.evaluations.score.units, self.evaluation_unit
        if router.score == "softmax":
            spread = logits_TE.amax(-1, keepdim=True) - logits_TE
            return (base + logits_TE.shape[1] + 2 * spread) * unit
        units = (base + logits_TE.abs()) * unit
        if router.score == "sqrt_softplus":
            # log(1 + exp(l)) written so is off by two units of 1, whose root changes by no more than theirs.
            lost = 2 * unit / softplus(logits_TE).clamp(min=1e-300)
            units = units + torch.minimum(lost, lost.sqrt())
        return units

    @property
    def evaluation_unit(self) -> float:
        """Unit of elementwise functions: fp32, or fp64 for an implementation that accumulates in it."""
        return ORACLE_UNIT if self.accumulate is Format.FP64 else FP32_UNIT

    def weight_units(self, score_units_TK: torch.Tensor, router: Router,
                     shared_units_TS: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Relative error of routing weights (T, K) and of shared weights (T, S) from that of the scores in them.

        A denominator that is clamped or has an epsilon is off by no more than the largest score's relative error.
        """
        products = (2 + 2 * (router.learned_scale is not None)) * self.evaluation_unit
        both = score_units_TK if shared_units_TS is None else torch.cat([score_units_TK, shared_units_TS], -1)
        units = both
        if router.renormalize:
            largest_T1 = both.amax(-1, keepdim=True)
            quotient = (units + largest_T1) / (1 - largest_T1) + (both.shape[1] + 4) * self.evaluation_unit
            units = torch.where(largest_T1 < 1, quotient, torch.inf)
        units = units + products
        top_k = score_units_TK.shape[1]
        return units[:, :top_k], None if shared_units_TS is None else units[:, top_k:]


def gamma(terms: int, unit: float) -> float:
    """gamma_n = n u / (1 - n u), Higham 2002, lemma 3.1; raises OverflowError when n u reaches 1."""
    if terms * unit >= 1:
        raise OverflowError(f"a sum of {terms} terms has no bound at unit roundoff {unit}")
    return terms * unit / (1 - terms * unit)
