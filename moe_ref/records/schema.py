"""One run as typed JSON lines: a `run` line, a `case` line per case, an `end` line. Imports no torch.

The schema number changes when a field changes its meaning or goes; readers refuse other numbers.
Numbers that JSON cannot hold (nan, inf, -inf) are written as those words. Lines hold no cycles, so the garbage
collector need not look through a hundred thousand of them.
"""

import math
from typing import Annotated

import msgspec
from msgspec import Meta

from moe_ref.records.error_map import ErrorMap

SCHEMA = 2

Number = float | Annotated[str, Meta(pattern=r"^(nan|-?inf)\Z")]
"""A float, or "nan", "inf", "-inf"."""

Ratio = Annotated[float, Meta(ge=0)] | Annotated[str, Meta(pattern=r"^(nan|inf)\Z")]
"""A number that is not negative."""

Count = Annotated[int, Meta(ge=0, le=2 ** 53)]
NumTiles = Annotated[int, Meta(ge=0, le=2 ** 16)]
"""So many are drawn; 64 columns each."""

Seconds = Annotated[float, Meta(ge=0, le=1e9)]


def to_number(value: float) -> Number:
    """A float as it is written into a record, with nine significant digits."""
    if math.isfinite(value):
        return float(f"{value:.9g}")
    return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")


def from_number(value: Number) -> float:
    """The float of a recorded number."""
    return float(value)


class Worst(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The element with the largest error / allowed of one stage; an axis that a stage lacks is None.

    rank: of the grid. row: of a parameter, all axes but the last flattened. slot: the k of top-k. column: index along
    the last axis. Rows and columns are counted in the unsharded tensor. tile: [start, stop) of the subject-independent
    64-column strip that holds it.
    """

    rank: int
    token: int | None = None
    row: int | None = None
    slot: int | None = None
    expert: int | None = None
    column: int | None = None
    got: Number
    want: Number
    allowed: Number


class Statistic(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A sum over many errors in predicted standard deviations, and what it may be; see measure/output_statistics.py.

    number: elements of rms, directions of the others. token, expert, rank: of the largest direction, where it is one's.
    """

    name: str
    value: Number
    allowed: Number
    number: Count = 0
    token: int | None = None
    expert: int | None = None
    rank: int | None = None


class StageResult(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """How one stage (group of fused stages, named by its last) compares with its own inputs' truth.

    ratio: largest error / allowed over all elements and ranks; above 1 fails. bound_ratio: of it, error / rigorous
    bound; what is above 1 in ratio alone is inside the bound, but farther off than declared arithmetic is likely to be.
    exact: ids and the like, ratio is then 0 or inf. bad_*: which tokens, experts, ranks and 64-column tiles hold an
    element above 1 (tokens: at most 8 named). sigmas: largest distance in predicted standard deviations, beyond the
    cell of what is stored. statistics: of the output as a whole. bias: mean of error * sign(want) / allowed. scale:
    best-fit factor got = scale * want. bits: effective ones, log2 of the root mean square of the truth over that of the
    error, not below 0; 0 in records that are older. error_map: of the first failing stage of a mismatch.
    """

    stage: str
    ratio: Ratio
    bound_ratio: Ratio = 0.0
    exact: bool = False
    num_checked: Count
    num_bad: Count
    worst: Worst | None = None
    num_bad_tokens: Count = 0
    bad_tokens: list[int] = []
    bad_experts: list[int] = []
    bad_ranks: list[int] = []
    bad_tiles: list[int] = []
    num_tiles: NumTiles = 0
    sigmas: Number = 0.0
    statistics: list[Statistic] = []
    bias: Number = 0.0
    scale: Number = 1.0
    bits: Number = 0.0
    note: str = ""
    error_map: ErrorMap | None = None

    @property
    def is_probe(self) -> bool:
        """Whether elements, not ids, had to be right to the bit."""
        return self.exact and self.worst is not None and self.worst.column is not None


class MutantLine(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """By what factor a mistake would exceed what is allowed, and the stage or statistic that would see it."""

    factor: Number
    where: str


class Implementation(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Who was judged: the name it was asked for by, its version, and the digest of its source files."""

    name: str
    version: str
    source_digest: str = ""


class CollectiveCount(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Calls, elements and bytes of one collective, per rank."""

    operation: str
    calls: Count
    num_elements: Count
    num_bytes: Count


class RunLine(msgspec.Struct, frozen=True, kw_only=True, tag="run", tag_field="type"):
    """First line: what is judged, on what, and which cases were chosen.

    environment: keys such as python, torch, triton, numpy, device, driver, cuda, nccl, cpu_count, commit.
    axis_pairs: "axis=value x axis=value" pairs covered by the chosen cases, as [covered, possible]. lane: of
    ci/lanes.yaml, "" outside of them. tolerances: every number of tolerances.yaml that was judged with, by its path in
    the file with dots between, {} in records that are older.
    """

    schema: int = SCHEMA
    run: str
    started: str
    implementation: Implementation
    tier: str
    cases: list[str]
    minimum_executed: Count
    axis_pairs: tuple[Count, Count]
    environment: dict[str, str]
    tolerances_digest: str
    oracle_version: str
    lane: str = ""
    tolerances: dict[str, Number] = {}


class SemanticLine(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """How a stage differs from layers that round where the contract says: check B, which attributes and never decides.

    subject_share, sibling_share: elements in which the subject differs from such layers, and they from each other.
    ratio: of the mean squares of these differences.
    """

    stage: str
    subject_share: Number
    sibling_share: Number
    ratio: Number


class DiagnosisLine(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The one fault that explains a mismatch: in words, the share of the error, and that of the next best fault."""

    fault: str
    share: Number
    next_share: Number


class CaseLine(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="case", tag_field="type"):
    """One judged case.

    reason: one line in words. first_stage: the first failing stage in data order. guard: what protected the run, e.g.
    {"poison": "nan, large", "inputs": "unchanged", "process": "child"}. numerics: the declared rounding contract.
    batches: how rows in other batches of the same tokens compare, by name, or why they were left out. mutants: mistakes
    that the case must be able to see, by name. signal: root mean square of the output over that of what its elements
    may be off. semantic: of a mismatch, what check B says. diagnosis: the fault that explains it, where one does.
    message: the whole failure message, at most ten lines.
    """

    schema: int = SCHEMA
    run: str
    case: str
    purpose: str
    implementation: Implementation
    ranks: str
    device: str
    verdict: str
    reason: str = ""
    first_stage: str | None = None
    stages: list[StageResult] = []
    collectives: list[CollectiveCount] = []
    guard: dict[str, str] = {}
    runs: Count = 0
    same_bits: bool | None = None
    batches: dict[str, str] = {}
    numerics: dict[str, str] = {}
    power: Number = 0.0
    mutants: dict[str, MutantLine] = {}
    signal: Number = 0.0
    semantic: list[SemanticLine] = []
    diagnosis: DiagnosisLine | None = None
    inputs_digest: str = ""
    subject_seconds: Seconds = 0.0
    oracle_seconds: Seconds = 0.0
    message: str = ""
    replay: str = ""


class EndLine(msgspec.Struct, frozen=True, kw_only=True, tag="end", tag_field="type"):
    """Last line of a run that was not cut short."""

    schema: int = SCHEMA
    run: str
    finished: str
    seconds: Seconds
    verdicts: dict[str, Count]
    executed: Count
    exit_code: int


Line = RunLine | CaseLine | EndLine
