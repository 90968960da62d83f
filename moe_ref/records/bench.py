"""A run of `moe-ref bench` as typed JSON lines: a `bench` line, a `limit` line per limit, a `timing` line per subject,
layer, number of tokens and operation, an `end` line. Imports no torch.
"""

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from moe_ref.records.runs import last_run
from moe_ref.records.schema import SCHEMA, Count, EndLine, Number


class BenchLine(msgspec.Struct, frozen=True, kw_only=True, tag="bench", tag_field="type"):
    """First line: what is timed and where. labels: what numbers of tokens stand for. evidence: whether the times say
    anything, which those of a CPU do not.
    """

    schema: int = SCHEMA
    run: str
    started: str
    subjects: list[str]
    models: list[str]
    tp: list[Count]
    tokens: list[Count]
    operations: list[str]
    dtype: str
    seed: int
    preset: str
    labels: list[tuple[Count, str]]
    device: str
    evidence: bool
    environment: dict[str, str]
    tolerances_digest: str


class LimitLine(msgspec.Struct, frozen=True, kw_only=True, tag="limit", tag_field="type"):
    """What the device reached in this run. name: copy (bytes read and written) or product (operations); seconds: median
    and quartiles.
    """

    schema: int = SCHEMA
    run: str
    name: str
    per_s: Number
    words: str
    seconds: tuple[Number, Number, Number]
    repetitions: Count


class KernelResult(msgspec.Struct, frozen=True, kw_only=True):
    """A kernel, or on a CPU an operator, in one call; part: of the layer, "" where nothing says which."""

    name: str
    part: str
    starts: Number
    seconds: Number


class PartResult(msgspec.Struct, frozen=True, kw_only=True):
    """All kernels of a part in one call; flop and num_bytes: the least that it needs, 0 where no formula has it."""

    name: str
    seconds: Number
    flop: Number = 0.0
    num_bytes: Number = 0.0


class TimingLine(msgspec.Struct, frozen=True, kw_only=True, tag="timing", tag_field="type"):
    """One subject on one shape. status: TIMED, WRONG (not timed, ratio above 1), CRASHED or NOT RUN. reason: why it has
    no times, or no kernels.

    NOT INSTALLED is of a subject as a whole. mode: graph or eager, and mode_reason why not a graph. seconds: median and
    quartiles. flop, num_bytes: the least that the operation needs. ratio: largest error over what is allowed. parts and
    kernels: of the profiler; the longest kernels alone, and parts of the forward pass.
    """

    schema: int = SCHEMA
    run: str
    subject: str
    model: str
    tp: Count
    tokens: Count
    operation: str
    status: str
    reason: str = ""
    rows: Count = 0
    visited: Count = 0
    flop: Number = 0.0
    num_bytes: Number = 0.0
    mode: str = ""
    mode_reason: str = ""
    seconds: tuple[Number, Number, Number] = ("nan", "nan", "nan")
    repetitions: Count = 0
    ratio: Number = "nan"
    parts: list[PartResult] = []
    kernels: list[KernelResult] = []


BenchRecordLine = BenchLine | LimitLine | TimingLine | EndLine


@dataclass
class BenchRun:
    """All lines of one run; limits by name."""

    header: BenchLine
    limits: dict[str, LimitLine] = field(default_factory=dict)
    timings: list[TimingLine] = field(default_factory=list)
    end: EndLine | None = None


def read_bench(path: Path) -> BenchRun:
    """The last run in a record file or in the folder that holds it; raises UsageValueError with file and line."""
    header, lines = last_run(path, BenchLine, BenchRecordLine, "bench")
    run = BenchRun(header)
    for line in lines:
        add_line(run, line)
    return run


def add_line(run: BenchRun, line: BenchRecordLine) -> None:
    """Put a line where it belongs."""
    if isinstance(line, LimitLine):
        run.limits[line.name] = line
    elif isinstance(line, TimingLine):
        run.timings.append(line)
    elif isinstance(line, EndLine):
        run.end = line
