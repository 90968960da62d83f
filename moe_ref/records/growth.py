"""A run of `moe-ref diverge` as typed JSON lines: a `diverge` line, a `growth` line per subject, a `difference` line
for every other than the first, an `end` line. Imports no torch.
"""

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from moe_ref.records.runs import last_run
from moe_ref.records.schema import SCHEMA, Count, EndLine, Number


class DivergeLine(msgspec.Struct, frozen=True, kw_only=True, tag="diverge", tag_field="type"):
    """First line: the problems, the subjects asked for, where they ran, and the hardware class that is predicted.

    sizes: rows, columns, experts, skew, tp, seed, and seeds, the number of draws that are measured as one.
    """

    schema: int = SCHEMA
    run: str
    started: str
    subjects: list[str]
    lengths: list[Count]
    sizes: dict[str, Number]
    dtype: str
    data: list[str]
    device: str
    hardware: str
    environment: dict[str, str]
    tolerances_digest: str


class PointResult(msgspec.Struct, frozen=True, kw_only=True):
    """One length; the fields of moe_ref.diverge.measure.Point."""

    terms: Count
    relative: Number
    bits: Number
    resolved: bool
    ratio: Number
    z: Number
    share: Number
    flips: Count
    flips_expected: Number
    one_bit: Number
    predicted: Number
    spread: Number


class BandResult(msgspec.Struct, frozen=True, kw_only=True):
    """The band of tolerances.yaml that the subject was held against."""

    exponent: tuple[Number, Number]
    bits: tuple[Number, Number]


class FindingResult(msgspec.Struct, frozen=True, kw_only=True):
    """What the error at the longest sum is made of; causes: the largest first."""

    terms: Count
    causes: list[str]
    relative: Number
    words: str
    evidence: str
    is_mistake: bool
    sigmas: Number
    bits: Number
    share: Number
    grid: str


class GrowthLine(msgspec.Struct, frozen=True, kw_only=True, tag="growth", tag_field="type"):
    """One subject. status: MEASURED, PREDICTED (a model in its place) or NOT RUN, with `reason`. stored: format of its
    result. curves: data class -> points. faults: why it is not as expected, in words; "" where all is well.
    """

    schema: int = SCHEMA
    run: str
    subject: str
    status: str
    reason: str = ""
    hardware: str = ""
    declared: str = ""
    stored: str = ""
    curves: dict[str, list[PointResult]] = {}
    exponent: Number = "nan"
    positive_exponent: Number = "nan"
    bits: tuple[Number, Number] = ("nan", "nan")
    growth_class: str = ""
    evidence: str = ""
    band: BandResult | None = None
    finding: FindingResult | None = None
    faults: list[str] = []
    seconds: float = 0.0


class DifferenceLine(msgspec.Struct, frozen=True, kw_only=True, tag="difference", tag_field="type"):
    """Why a subject differs from the first. answer: no, yes or loss, to "is it a bug?"; relative: rms, of the truth."""

    schema: int = SCHEMA
    run: str
    first: str
    second: str
    terms: Count
    relative: Number
    answer: str
    verdict: str


GrowthRecordLine = DivergeLine | GrowthLine | DifferenceLine | EndLine


@dataclass
class GrowthRun:
    """All lines of one run."""

    header: DivergeLine
    subjects: dict[str, GrowthLine] = field(default_factory=dict)
    differences: list[DifferenceLine] = field(default_factory=list)
    end: EndLine | None = None


def read_growth(path: Path) -> GrowthRun:
    """The last run in a record file or in the folder that holds it; raises UsageValueError with file and line."""
    header, lines = last_run(path, DivergeLine, GrowthRecordLine, "diverge")
    run = GrowthRun(header)
    for line in lines:
        add_line(run, line)
    return run


def add_line(run: GrowthRun, line: GrowthRecordLine) -> None:
    """Put a line where it belongs."""
    if isinstance(line, GrowthLine):
        run.subjects[line.subject] = line
    elif isinstance(line, DifferenceLine):
        run.differences.append(line)
    elif isinstance(line, EndLine):
        run.end = line
