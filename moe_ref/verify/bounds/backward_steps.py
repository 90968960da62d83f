"""The steps of a backward pass with the error of each: what its gradients are made of; see docs/bounds.md.

A rounding contract says where rows of the forward pass are stored, of the backward pass it says nothing: every row and
every elementwise product of it may be rounded to the coarsest format in which the forward stores rows. What is
kept wider is then right by a wider margin. The variance has all of these roundings too, each uniform and independent.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from moe_ref.contract.vocabulary import Format, Stage
from moe_ref.numerics.accumulation import ROUNDING
from moe_ref.numerics.gauges import Gauges, gauges
from moe_ref.numerics.magnitudes import nonnegative_product
from moe_ref.verify.bounds.operands import OperandRule, rounded_rows, scale_variance
from moe_ref.verify.bounds.rounding import FLUSH, RoundingModel
from moe_ref.verify.bounds.rows import Rows, exact
from moe_ref.verify.bounds.steps import SCALED, Steps

_ROW_STAGES = (Stage.PERMUTE, Stage.GATE_UP, Stage.ACT, Stage.DOWN, Stage.SHARED, Stage.MERGED, Stage.REDUCED)


def spread(rows: Rows) -> torch.Tensor:
    """The variance of rows, infinite where nothing is predicted."""
    return torch.full_like(rows.value, torch.inf) if rows.variance is None else rows.variance


def column_sums(products_RN: torch.Tensor) -> Gauges:
    """Gauges of the sums over the rows, (N,)."""
    found = gauges(products_RN.T, torch.ones(1, len(products_RN), dtype=torch.float64))
    return Gauges(found.value[:, 0], found.squares[:, 0], found.path[:, 0])


@dataclass(frozen=True)
class BackwardSteps:
    """Steps of the forward pass, and the format of the leaf that a gradient is returned in."""

    steps: Steps
    leaf: Format

    def coarsest(self, formats: Iterable[Format | None]) -> Format:
        """The format with the fewest significant bits, at most those of the accumulation format."""
        entries, numerics = self.steps.model.tolerances.file.formats, self.steps.numerics
        return min((numerics.accumulate, *(one for one in formats if one is not None)),
                   key=lambda one: entries[one].significand_bits)

    @property
    def rows_in(self) -> Format:
        """What a row may be rounded to."""
        numerics = self.steps.numerics
        return self.coarsest([numerics.merge, numerics.activation, *map(numerics.storage.get, _ROW_STAGES)])

    @property
    def joined_in(self) -> Format:
        """What sums of a leaf's gradients may be rounded to: over slots, over its uses, over ranks."""
        return self.coarsest([self.rows_in, self.leaf, self.steps.numerics.reduce])

    @property
    def weights_in(self) -> Format:
        """What gradients of routing weights and of gates may be rounded to."""
        numerics = self.steps.numerics
        return self.coarsest([self.rows_in, numerics.reduce, numerics.storage.get(Stage.WEIGHTS)])

    @property
    def logits_in(self) -> Format:
        """What gradients of logits may be rounded to."""
        storage = self.steps.numerics.storage
        return self.coarsest([storage.get(Stage.LOGITS), storage.get(Stage.WEIGHTS)])

    def rounded(self, gauge: torch.Tensor, stored: Format, times: int) -> torch.Tensor:
        """`times` stores of numbers no larger than the gauge, relative to it, since their binades are not known."""
        entry = self.steps.model.tolerances.file.formats[stored]
        relative = max(2.0**-entry.significand_bits, self.steps.model.evaluation_unit)
        growth = (1 + relative) ** times - 1
        error = growth * gauge + times * (FLUSH + 2.0 ** (entry.min_exponent - entry.significand_bits))
        return torch.where(gauge * (1 + growth) < entry.max, error, torch.inf)

    def stores(self, squares: torch.Tensor, stored: Format, times: int) -> torch.Tensor:
        """Expected square of what `times` stores lose together, of numbers with these squares."""
        entry = self.steps.model.tolerances.file.formats[stored]
        unit = max(2.0**-entry.significand_bits, self.steps.model.evaluation_unit)
        floor = FLUSH + 2.0 ** (entry.min_exponent - entry.significand_bits)
        return times * (ROUNDING * unit**2 * squares + floor**2)

    def joins(self, total: torch.Tensor, squares: torch.Tensor, addends: int, stored: Format) -> torch.Tensor:
        """Expected square of what is lost where addends with this sum of squares are stored and then added up."""
        added = self.steps.model.additions_variance(total, squares, addends, stored)
        return self.stores(squares, stored, 1) + added

    def again(self, rows: Rows, times: int) -> Rows:
        """Rows that are stored `times` times more."""
        return Rows(rows.value, rows.bound + self.rounded(rows.largest, self.rows_in, times),
                    spread(rows) + self.stores(rows.value.square(), self.rows_in, times))

    def saved(self, rows: Rows, stage: Stage) -> Rows:
        """Rows of a stage as the backward pass has them: stored, if they were not already.

        Weights may join before or after the store, so that the smallest subnormals may be lost in another place.
        """
        if self.steps.stored_in(stage) != self.rows_in:
            return self.again(rows, 1)
        nothing = torch.zeros_like(rows.bound)
        return Rows(rows.value, rows.bound + self.rounded(nothing, self.rows_in, 1),
                    spread(rows) + self.stores(nothing, self.rows_in, 1))

    def product(self, one: Rows, other: Rows, times: int = 1) -> Rows:
        """one * other, element by element, and as many roundings."""
        error = one.value.abs() * other.bound + one.bound * other.largest
        variance = one.value.square() * spread(other) + spread(one) * (other.value.square() + spread(other))
        return self.again(Rows(one.value * other.value, error, variance), times)

    def coefficient(self, terms: int, model: RoundingModel | None = None) -> float:
        """What a sum of so many products may lose, per unit of the sum of their absolute values."""
        return float((model or self.steps.model).summed(torch.ones((), dtype=torch.float64), max(1, terms)))

    @property
    def rule(self) -> OperandRule | None:
        """How both operands of an expert's product are rounded along its sum; None: they are not."""
        return self.steps.rule(None, True)

    def through(self, rows: Rows, weight_NM: torch.Tensor) -> Rows:
        """rows @ weight, (R, M), in the accumulator."""
        return self._product_of(rows, exact(weight_NM.T))

    def outer(self, one: Rows, other: Rows) -> Rows:
        """one^T @ other, (N, M): the sum over rows in the accumulator; exactly 0 where there is no row."""
        return self._product_of(*(rows.mapped(torch.Tensor.t) for rows in (one, other)))

    def _product_of(self, one_MK: Rows, other_NK: Rows) -> Rows:
        """one @ other^T, (M, N), of operands as they are multiplied."""
        if (rule := self.rule) is None:
            return self._summed(one_MK, other_NK, one_MK.value.shape[1])
        one, other = (rounded_rows(rows, rule, scale_apart=True) for rows in (one_MK, other_NK))
        product = self._summed(one, other, one.value.shape[1] + SCALED * bool(one.value.shape[1]))
        # What the scale of a row is off by is the same in all of its terms.
        scales = scale_variance(one_MK, rule) + scale_variance(other_NK, rule).T
        return replace(product, variance=spread(product) + scales * product.value.square())

    def _summed(self, one: Rows, other: Rows, terms: int) -> Rows:
        model = self.steps.experts_model
        error_MK = one.bound + self.coefficient(terms, model) * one.largest
        bound = error_MK @ other.largest.T
        sums = gauges(one.value, other.value, model.accumulation.truncates)
        variance = model.product_errors(one.value, other.value, sums, terms)[0] + nonnegative_product(
            spread(one), other.value, 2)
        if bool(other.bound.any()):
            bound = bound + one.value.abs() @ other.bound.T
            both = one.value.square() + spread(one)
            variance = variance + nonnegative_product(both, spread(other), 1)
        return Rows(sums.value, bound + terms * FLUSH, variance)

    def down_columns(self, rows: Rows) -> Rows:
        """The sum over rows in the accumulator, (N,)."""
        terms, sums = len(rows.value), column_sums(rows.value)
        error = rows.bound + self.coefficient(terms) * rows.largest
        variance = self.steps.model.summed_variance(sums, terms) + spread(rows).sum(0)
        return Rows(sums.value, error.sum(0) + terms * FLUSH, variance)

    def dot(self, one: Rows, other: Rows) -> Rows:
        """Sums of one * other along the last axis, (R, 1), each product stored."""
        gauge = (one.largest * other.largest).sum(-1, keepdim=True)
        error = (one.value.abs() * other.bound + one.bound * other.largest).sum(-1, keepdim=True)
        terms, products = one.value.shape[-1], one.value * other.value
        error = error + self.coefficient(terms) * gauge + self.rounded(gauge, self.rows_in, 1)
        sums = column_sums(products.T)
        variance = one.value.square() * spread(other) + spread(one) * (other.value.square() + spread(other))
        variance = (variance + self.stores(products.square(), self.rows_in, 1)).sum(-1, keepdim=True)
        return Rows(sums.value[:, None], error + terms * FLUSH,
                    variance + self.steps.model.summed_variance(sums, terms)[:, None])

    def finished(self, rows: Rows, leaf: Format | None = None) -> Rows:
        """A gradient as it is returned, in the format of its leaf, perhaps by way of fp32; what is exactly 0 stays so.

        Where torch casts fp64 to a 16-bit format, it rounds to fp32 first. Where a format may overflow nothing is
        predicted, nor is anything bounded.
        """
        leaf, bound, variance, model = leaf or self.leaf, rows.bound, spread(rows), self.steps.model
        if leaf in (Format.FP16, Format.BF16):
            bound = bound + self.rounded(rows.largest, Format.FP32, 1)
            variance = variance + model.stored_variance(rows.value, Format.FP32)
        bound = bound + model.rounded(rows.value.abs() + bound, leaf)
        variance = variance + model.stored_variance(rows.value, leaf)
        variance = torch.where(torch.isfinite(bound) & torch.isfinite(variance), variance, torch.inf)
        nothing = rows.largest == 0
        return Rows(rows.value, bound.masked_fill(nothing, 0.0), variance.masked_fill(nothing, 0.0))
