"""A grouped matrix product: rows sorted by expert, each expert with its own weights, at one length of its sums."""

from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import torch

from moe_ref.contract.errors import (
    UsageValueError,
    kind_faults,
    number_faults,
    positive_faults,
    raise_faults,
    size_faults,
)
from moe_ref.contract.vocabulary import Dtype, Format
from moe_ref.diverge.conversion import Conversion
from moe_ref.inputs.build import OUTLIER_EVERY, OUTLIER_FACTOR, TOKEN_AMPLITUDE, WEIGHT_AMPLITUDE, inverse_root
from moe_ref.inputs.philox import grid_tensor

DTYPES = (Format.FP32, Format.FP16, Format.BF16, Format.E4M3)
"""Formats that operands are drawn in; numbers of e4m3, scaled by rows, are held in bf16."""


class GrowthData(StrEnum):
    """`unit`: symmetric; `positive`: the absolute values of those, so that partial sums have one sign; `outlier`: one
    channel of x in 64 is scaled by 64.
    """

    UNIT = "unit"
    POSITIVE = "positive"
    OUTLIER = "outlier"


@dataclass(frozen=True, kw_only=True)
class GroupedProblem:
    """Sizes, input format and data of a grouped product y_RN = x_RK @ w_EKN; its words name it in inputs and records.

    skew: loads fall as 1 / (e + 1)^skew. tp: ranks that the sums are split over, partial sums added in rank order.
    UsageValueError on sizes below 1, or fewer terms than ranks.
    """

    terms: int
    rows: int = 32
    columns: int = 32
    experts: int = 4
    skew: float = 1.0
    tp: int = 1
    dtype: Format = Format.FP32
    data: GrowthData = GrowthData.UNIT
    seed: int = 0

    def __post_init__(self) -> None:
        faults = positive_faults(terms=self.terms, rows=self.rows, columns=self.columns, experts=self.experts,
                                 tp=self.tp)
        faults += size_faults(0, seed=self.seed) + number_faults("skew", self.skew, least=0.0)
        faults += [] if self.dtype in DTYPES else [f"dtype={self.dtype!r}, but should be one of {', '.join(DTYPES)}"]
        faults += kind_faults("data", self.data, GrowthData, "a GrowthData")
        raise_faults("a grouped product", faults)
        if self.tp > self.terms:
            raise UsageValueError(f"a grouped product: tp={self.tp}, but should be at most its {self.terms} terms")

    @property
    def words(self) -> str:
        """The text that its random numbers are drawn from; tp has no part in it, since it only cuts."""
        return (f"grouped-k{self.terms}.m{self.rows}.n{self.columns}.e{self.experts}.skew{self.skew:g}-{self.dtype}-"
                f"{self.data}-seed{self.seed}")

    @property
    def loads(self) -> tuple[int, ...]:
        """Rows of every expert: shares of `rows` by popularity, what is left over going to the first."""
        popularity = [1.0 / (e + 1) ** self.skew for e in range(self.experts)]
        loads = [int(self.rows * share / sum(popularity)) for share in popularity]
        for e in range(self.rows - sum(loads)):
            loads[e % self.experts] += 1
        return tuple(loads)

    @property
    def cuts(self) -> tuple[tuple[int, int], ...]:
        """Terms [start, stop) of every rank."""
        return tuple((self.terms * rank // self.tp, self.terms * (rank + 1) // self.tp) for rank in range(self.tp))


@dataclass(frozen=True)
class Operands:
    """x_RK with rows sorted by expert, w_ENK (out, in), ends_E (int32): the row after each expert's last."""

    x_RK: torch.Tensor
    w_ENK: torch.Tensor
    ends_E: torch.Tensor

    def groups(self) -> list[tuple[int, int, int]]:
        """(expert, first row, row after the last) of every expert that has rows."""
        ends = self.ends_E.tolist()
        return [(e, start, stop) for e, (start, stop) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
                if stop > start]

    def rank_part(self, start: int, stop: int) -> "Operands":
        """Terms [start, stop), as one tensor-parallel rank holds them."""
        return Operands(self.x_RK[:, start:stop].contiguous(), self.w_ENK[:, :, start:stop].contiguous(), self.ends_E)


def build_operands(problem: GroupedProblem) -> Operands:
    """Operands of a problem on the CPU, every number representable in its dtype; a pure function of the problem."""
    shape, held = (problem.columns, problem.terms), Dtype.BF16 if problem.dtype is Format.E4M3 else Dtype(problem.dtype)
    x_RK = grid_tensor(problem.words, "x", (problem.rows, problem.terms), held, TOKEN_AMPLITUDE)
    amplitude = WEIGHT_AMPLITUDE * inverse_root(problem.terms)
    w_ENK = torch.stack([grid_tensor(problem.words, "w", shape, held, amplitude, e) for e in range(problem.experts)])
    if problem.dtype is Format.E4M3:
        narrow = Conversion(Format.E4M3, scaled=True)
        x_RK, w_ENK = (narrow(tensor.double()).to(tensor.dtype) for tensor in (x_RK, w_ENK))
    if problem.data is GrowthData.POSITIVE:
        x_RK, w_ENK = x_RK.abs_(), w_ENK.abs_()
    if problem.data is GrowthData.OUTLIER:
        x_RK[:, 17 % problem.terms::OUTLIER_EVERY] *= OUTLIER_FACTOR
    return Operands(x_RK, w_ENK, torch.tensor(problem.loads, dtype=torch.int64).cumsum(0).to(torch.int32))


def ladder(text: str) -> tuple[int, ...]:
    """Lengths of sums: "64:16384" doubles from the first to the last, "256,2048,14336" names them.

    UsageValueError where they are no integers of at least 1, or do not rise.
    """
    try:
        if ":" in text:
            first, last = (int(part) for part in text.split(":"))
            lengths = [first]
            while 0 < 2 * lengths[-1] <= last:
                lengths.append(2 * lengths[-1])
            if lengths[-1] != last:
                lengths.append(last)
        else:
            lengths = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageValueError(f"lengths {text!r}, but should be as 64:16384 or 256,2048,14336") from error
    if lengths[0] < 1 or any(longer <= one for one, longer in pairwise(lengths)):
        raise UsageValueError(f"lengths {text!r}, but should be integers of at least 1 that rise")
    return tuple(lengths)
