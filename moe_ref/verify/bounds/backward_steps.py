"""The steps of a backward pass with the error of each: what its gradients are made of; see docs/bounds.md.

A rounding contract says where rows of the forward pass are stored, of the backward pass it says nothing: every row and
every elementwise product of it may be rounded to the coarsest format in which the forward stores rows. What is
kept wider is then right by a wider margin.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from moe_ref.contract.vocabulary import Format, Stage
from moe_ref.verify.bounds.rounding import FLUSH
from moe_ref.verify.bounds.rows import Rows
from moe_ref.verify.bounds.steps import Steps

_ROW_STAGES = (Stage.PERMUTE, Stage.GATE_UP, Stage.ACT, Stage.DOWN, Stage.SHARED, Stage.MERGED, Stage.REDUCED)


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

    def again(self, rows: Rows, times: int) -> Rows:
        """Rows that are stored `times` times more."""
        return Rows(rows.value, rows.bound + self.rounded(rows.largest, self.rows_in, times))

    def saved(self, rows: Rows, stage: Stage) -> Rows:
        """Rows of a stage as the backward pass has them: stored, if they were not already.

        Weights may join before or after the store, so that the smallest subnormals may be lost in another place.
        """
        is_stored = self.steps.stored_in(stage) == self.rows_in
        return Rows(rows.value, rows.bound + self.rounded(torch.zeros_like(rows.bound), self.rows_in, 1)) if (
            is_stored) else self.again(rows, 1)

    def product(self, one: Rows, other: Rows, times: int = 1) -> Rows:
        """one * other, element by element, and as many roundings."""
        error = one.value.abs() * other.bound + one.bound * other.largest
        return self.again(Rows(one.value * other.value, error), times)

    def coefficient(self, terms: int) -> float:
        """What a sum of so many products may lose, per unit of the sum of their absolute values."""
        return float(self.steps.model.summed(torch.ones((), dtype=torch.float64), max(1, terms)))

    def through(self, rows: Rows, weight_NM: torch.Tensor) -> Rows:
        """rows @ weight, (R, M), in the accumulator."""
        weight_NM = weight_NM.double()
        error_RN = rows.bound + self.coefficient(len(weight_NM)) * rows.largest
        return Rows(rows.value @ weight_NM, error_RN @ weight_NM.abs() + len(weight_NM) * FLUSH)

    def outer(self, one: Rows, other: Rows) -> Rows:
        """one^T @ other, (N, M): the sum over rows in the accumulator; exactly 0 where there is no row."""
        terms = len(one.value)
        error_RN = one.bound + self.coefficient(terms) * one.largest
        bound = error_RN.T @ other.largest
        if bool(other.bound.any()):
            bound = bound + one.value.abs().T @ other.bound
        return Rows(one.value.T @ other.value, bound + terms * FLUSH)

    def down_columns(self, rows: Rows) -> Rows:
        """The sum over rows in the accumulator, (N,)."""
        terms, dim = len(rows.value), 0
        error = rows.bound + self.coefficient(terms) * rows.largest
        return Rows(rows.value.sum(dim), error.sum(dim) + terms * FLUSH)

    def dot(self, one: Rows, other: Rows) -> Rows:
        """Sums of one * other along the last axis, (R, 1), each product stored."""
        gauge = (one.largest * other.largest).sum(-1, keepdim=True)
        error = (one.value.abs() * other.bound + one.bound * other.largest).sum(-1, keepdim=True)
        terms = one.value.shape[-1]
        error = error + self.coefficient(terms) * gauge + self.rounded(gauge, self.rows_in, 1)
        return Rows((one.value * other.value).sum(-1, keepdim=True), error + terms * FLUSH)

    def finished(self, rows: Rows, leaf: Format | None = None) -> Rows:
        """A gradient as it is returned, in the format of its leaf, perhaps by way of fp32; what is exactly 0 stays so.

        Where torch casts fp64 to a 16-bit format, it rounds to fp32 first.
        """
        leaf, bound = leaf or self.leaf, rows.bound
        if leaf in (Format.FP16, Format.BF16):
            bound = bound + self.rounded(rows.largest, Format.FP32, 1)
        stored = self.steps.model.rounded(rows.value.abs() + bound, leaf)
        return Rows(rows.value, torch.where(rows.largest == 0, 0.0, bound + stored))
