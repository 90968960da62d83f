"""What tolerances.yaml holds, section by section, as frozen structures."""

from typing import Annotated, Literal

import msgspec

from moe_ref.contract.vocabulary import Dtype, Format, Stage
from moe_ref.tolerances.base import (
    Bits,
    Count,
    Entry,
    NoMismatches,
    Positive,
    Probability,
    Range,
    Struct,
    Text,
)
from moe_ref.tolerances.hardware import HARDWARE, HardwareEntry, HardwareName
from moe_ref.tolerances.published import PublishedEntry


class FormatEntry(Entry, frozen=True):
    """A floating-point format: significand bits with the hidden one, smallest normal exponent, largest value."""

    significand_bits: Bits
    min_exponent: Annotated[int, msgspec.Meta(ge=-1022, le=0)]
    max: Positive


class EvaluationEntry(Entry, frozen=True):
    """units of 2^-24 that evaluating a function may cost."""

    units: Positive


class Evaluations(Struct, frozen=True):
    """Elementwise functions."""

    activation: EvaluationEntry
    score: EvaluationEntry
    softcap: EvaluationEntry


class MaximumEntry(Entry, frozen=True):
    """An upper limit."""

    max: Positive


class Limits(Struct, frozen=True):
    """What every element's error / allowed may reach."""

    ratio: MaximumEntry


class ExactCheck(Entry, frozen=True):
    """Inputs of which every partial sum is exact: equal bits."""

    mismatches: NoMismatches


class DeterminismCheck(Entry, frozen=True):
    """The same bits in repeated runs and, if promised, in other batches of the same tokens."""

    mismatches: NoMismatches


class StageCheck(Entry, frozen=True):
    """Distance to the rounding cell, in sigmas, at most sigmas_factor * tau(elements, alpha)."""

    sigmas_factor: Annotated[float, msgspec.Meta(ge=1.0, le=100.0)]
    alpha: Probability


class OutputCheck(Entry, frozen=True):
    """Errors of the output in sigmas.

    The largest and each of the filters at most sigmas_factor * tau(count, alpha), the root mean square at most what
    errors whose sigmas are rms_base times the predicted ones exceed with probability alpha.
    """

    sigmas_factor: Annotated[float, msgspec.Meta(ge=1.0, le=100.0)]
    alpha: Probability
    rms_base: Annotated[float, msgspec.Meta(ge=1.0, le=100.0)]
    filters: tuple[Literal["sign", "slots", "ranks"], ...]


class SemanticCheck(Entry, frozen=True):
    """Squared difference to the oracle that rounds as declared, over the expected one; gate: whether it decides."""

    gate: Literal[False]


class Checks(Struct, frozen=True):
    """What is decided beyond the rigorous bound."""

    exact: ExactCheck
    determinism: DeterminismCheck
    stage: StageCheck
    output: OutputCheck
    semantic: SemanticCheck


class MutantEntry(Entry, frozen=True):
    """By what factor a planted fault must exceed the threshold of the check that it is bound to."""

    factor: Annotated[float, msgspec.Meta(ge=1.0, le=1e6)]


class FloorEntry(Entry, frozen=True):
    """Least rms(value) / rms(threshold) of a token's output, the median of tokens."""

    floor: Positive


class PowerGuard(Struct, frozen=True):
    """What a case must be able to see for its pass to mean something."""

    zeros: MutantEntry
    k_tile: MutantEntry
    w_1ulp: MutantEntry
    tp_partial: MutantEntry
    store_rz: MutantEntry
    floors: dict[Dtype, FloorEntry]


Slope = Annotated[float, msgspec.Meta(ge=-4.0, le=4.0)]


class GrowthRules(Entry, frozen=True):
    """What tells classes of error growth apart: docs/diverge.md, "Classes".

    long: exponents are fitted from this length on; short: up to this length positive sums do not stagnate. one_sided:
    signed share at which all errors have one sign. nearest_bits: least level of fp32; narrow_bits: largest level of a
    narrow accumulator. flat, growing: largest and least exponents. averaging: how many times larger, in roots of summed
    squares, errors of rounded operands may be on positive data than on symmetric data.
    """

    long: Count
    short: Count
    one_sided: Annotated[float, msgspec.Meta(ge=-1.0, le=0.0)]
    nearest_bits: Positive
    narrow_bits: Positive
    flat: Slope
    averaging: Positive
    growing: Slope


class GrowthDrift(Entry, frozen=True):
    """How far a curve may move from the accepted one."""

    exponent: Positive
    bits: Positive


class GrowthBand(Entry, frozen=True):
    """Where the curve of one subject has to stay, on symmetric data in a format, on any of these hardware classes.

    exponent: of the relative error over rules.long and more terms; bits: effective bits at every such length.
    """

    subject: Text
    dtype: Format
    hardware: Annotated[tuple[HardwareName, ...], msgspec.Meta(min_length=1)]
    exponent: Range
    bits: Range


class Growth(Struct, frozen=True):
    """How errors may grow with the length of sums."""

    rules: GrowthRules
    drift: GrowthDrift
    bands: tuple[GrowthBand, ...]


StoredIn = Literal["dtype", "fp64", "fp32", "fp16", "bf16"]
"""A format, or that of the case."""


class ContractEntry(Entry, frozen=True):
    """contract.capabilities.Numerics in words; rounding: of every store, to nearest with ties to even."""

    purpose: Text
    storage: dict[Stage, StoredIn]
    accumulate: StoredIn
    reduce: StoredIn
    weight_at: Literal["down", "merge", "act"]
    activation: StoredIn | None
    merge: StoredIn | None
    rounding: Literal["nearest"]


class TolerancesFile(Struct, frozen=True):
    """The whole file; schema 1."""

    schema: Literal[1]
    formats: dict[Format, FormatEntry]
    hardware: dict[str, HardwareEntry]
    evaluations: Evaluations
    limits: Limits
    checks: Checks
    power_guard: PowerGuard
    growth: Growth
    contracts: dict[str, ContractEntry]
    published: dict[str, PublishedEntry]

    def faults(self) -> dict[str, list[str]]:
        """By section, what is there and should not be, and the other way round."""
        floors = [f"floors.{name}" for name in self.power_guard.floors]
        compared = {"formats": (self.formats, Format), "hardware": (self.hardware, HARDWARE),
                    "power_guard": (floors, [f"floors.{name}" for name in Dtype])}
        return {section: [f"{section}: {name} is missing" for name in wanted if name not in there]
                + [f"{section}: {name} is unknown" for name in there if name not in wanted]
                for section, (there, wanted) in compared.items()}
