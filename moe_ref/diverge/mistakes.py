"""Which mistake of indexing or scaling a residual is made of, and where it sits."""

from dataclasses import dataclass

import torch

from moe_ref.contract.vocabulary import Format
from moe_ref.diverge.conversion import Conversion
from moe_ref.diverge.truth import Bench
from moe_ref.numerics.formats import unit_in_last_place

BLOCK = 32
"""Terms that are looked at together: a dropped tile of a kernel is some of these."""

EXPLAINED = 0.98
"""Least rho^2 of a hypothesis with the residual."""

_BAD = 8.0
_PRESENT = 0.6


@dataclass(frozen=True)
class Fit:
    """Regression of a residual on what a hypothesis predicts: share of its square that is explained, and the factor."""

    rho2: float
    beta: float


@dataclass(frozen=True)
class Region:
    """Rows and columns with errors far above rounding. whole: hardly any is free of them; filled: share of bad ones."""

    rows: torch.Tensor
    columns: torch.Tensor
    whole: bool
    filled: float
    words: str


@dataclass(frozen=True)
class Mistake:
    """A hypothesis that explains the residual within its region."""

    words: str
    fit: Fit
    region: Region


def regress(residual: torch.Tensor, wanted: torch.Tensor, noise: float = 0.0) -> Fit:
    """residual = beta * wanted + rest. noise: sum of squares that stores are known to add. rho2 is 0 for zeros."""
    product, square = float((residual * wanted).sum()), float(wanted.square().sum())
    total = float(residual.square().sum()) - noise
    return Fit(min(1.0, product**2 / (square * total)), product / square) if square and total > 0 else Fit(0.0, 0.0)


def locate(sigmas_RN: torch.Tensor, bench: Bench) -> Region:
    """The rows and columns that hold errors above 8 predicted sigmas, in words: experts, rows and columns."""
    bad_RN = sigmas_RN.abs() > _BAD
    rows, columns = bad_RN.any(1).nonzero()[:, 0], bad_RN.any(0).nonzero()[:, 0]
    few_rows, few_columns = len(rows) <= 0.9 * len(bad_RN), len(columns) <= 0.9 * bad_RN.shape[1]
    words = []
    if few_rows:
        held = [(e, stop - start) for e, start, stop in bench.operands.groups()
                if bool(((rows >= start) & (rows < stop)).any())]
        words.append(f"expert{'s' * (len(held) > 1)} {runs([e for e, _ in held])}")
        if len(rows) < 0.9 * sum(load for _, load in held):
            words.append(f"rows {runs(rows.tolist())}")
    if few_columns:
        words.append(f"columns {runs(columns.tolist())}")
    filled = float(bad_RN[rows][:, columns].double().mean()) if len(rows) else 0.0
    return Region(rows, columns, not few_rows and not few_columns, filled, ", ".join(words) or "everywhere")


def runs(numbers: list[int]) -> str:
    """Integers with runs of neighbours as "16-31"."""
    words: list[str] = []
    first = 0
    for place, number in enumerate(numbers):
        if place + 1 == len(numbers) or numbers[place + 1] != number + 1:
            words.append(str(number) if place == first else f"{numbers[first]}-{number}")
            first = place + 1
    return ", ".join(words)


def find_mistake(error_RN: torch.Tensor, region: Region, bench: Bench, conversion: Conversion,
                 stored: Format) -> Mistake | None:
    """The mistake that explains at least 98 % of the error's square in the region; None where none does.

    error_RN: from the truth of the converted operands, with the rounding of the store in it.
    """
    search = _Search(error_RN, region, bench, conversion, stored)
    words, fit = max([*search.missing_terms(), *search.other_operands(), search.scale()], key=lambda one: one[1].rho2)
    return Mistake(words, fit, region) if fit.rho2 >= EXPLAINED else None


class _Search:
    """Hypotheses within a region, each with its fit."""

    def __init__(self, error_RN: torch.Tensor, region: Region, bench: Bench, conversion: Conversion,
                 stored: Format) -> None:
        self.bench, self.region = bench, region
        self.x_RK, self.w_ENK = bench.converted(conversion)
        self.error = error_RN[region.rows][:, region.columns]
        self.truth_RN = bench.truth(conversion).value_RN[region.rows]
        self.value = self.truth_RN[:, region.columns]
        self.noise = float(unit_in_last_place(self.value, stored).square().sum()) / 12
        self.parts = [(e, rows) for e, start, stop in bench.operands.groups()
                      if len(rows := region.rows[(region.rows >= start) & (region.rows < stop)])]

    def fit(self, wanted: torch.Tensor) -> Fit:
        return regress(self.error, wanted, self.noise)

    def product(self, terms: slice = slice(None), shift: int = 0) -> torch.Tensor:
        """Sums over some terms, with the weights of the expert `shift` places on."""
        shifted_ENK = self.w_ENK.roll(-shift, 0) if shift else self.w_ENK
        return torch.cat([self.x_RK[rows, terms] @ shifted_ENK[e][self.region.columns, terms].T
                          for e, rows in self.parts])

    def scale(self) -> tuple[str, Fit]:
        fit = self.fit(self.value)
        missing = abs(fit.beta + 1) < 2.0**-10
        return "the result is missing" if missing else f"the result is scaled by {1 + fit.beta:.6g}", fit

    def missing_terms(self) -> list[tuple[str, Fit]]:
        """Blocks of terms that, taken away or added once more, make the error."""
        terms = self.bench.problem.terms
        blocks = [slice(start, min(start + BLOCK, terms)) for start in range(0, terms, BLOCK)]
        factors = torch.tensor([regress(self.error, self.product(block)).beta for block in blocks])
        found = []
        for sign, verb in ((-1, "are missing"), (1, "are added twice")):
            chosen = (sign * factors > _PRESENT).nonzero()[:, 0].tolist()
            if 0 < len(chosen) < len(blocks):
                wanted = sum((self.product(blocks[place]) for place in chosen), torch.zeros_like(self.error))
                all_terms = [term for place in chosen for term in range(blocks[place].start, blocks[place].stop)]
                found.append((f"terms {runs(all_terms)} of the sum {verb}", self.fit(wanted)))
        return found

    def other_operands(self) -> list[tuple[str, Fit]]:
        """Another expert's weights, or another column of the same."""
        found, num_experts = [], len(self.w_ENK)
        for shift in range(1, num_experts):
            pairs = ", ".join(f"{(e + shift) % num_experts} in place of {e}" for e, _ in self.parts)
            found.append((f"weights of expert {pairs}", self.fit(self.product(shift=shift) - self.value)))
        got = self.error + self.value
        # Which column of the truth each wrong column is most like.
        taken = ((got / got.norm(dim=0)).T @ (self.truth_RN / self.truth_RN.norm(dim=0))).argmax(1)
        if bool((taken != self.region.columns).all()):
            pairs = ", ".join(f"{column} holds {other}" for column, other in
                              list(zip(self.region.columns.tolist(), taken.tolist(), strict=True))[:4])
            found.append((f"columns are exchanged: {pairs}" + ", ..." * (len(taken) > 4),
                          self.fit(self.truth_RN[:, taken] - self.value)))
        return found
