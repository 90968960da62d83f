"""Accepted speeds of an implementation on a device: every time as a ratio to torch's in the same run."""

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec

from moe_ref.contract.errors import UsageValueError
from moe_ref.records.bench import BenchRun, TimingLine
from moe_ref.records.schema import Number, from_number, to_number
from moe_ref.report.baseline import BASELINE_FOLDER, device_class, slug
from moe_ref.report.bench import median, of_limit

SPEED_SCHEMA = 1
PEER = "torch:"
"""What the names of peers that are always at hand begin with."""

_VERSIONS = ("commit", "hardware", "torch", "triton", "driver", "cuda")


class SpeedEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One subject on one shape.

    ratio: its median time over that of `peer` in the same run, then the least and the most that the quartiles of both
    make of it. of_limit: least time at the limits that were measured in the run over the time taken; nan without them.
    """

    subject: str
    model: str
    tp: int
    tokens: int
    operation: str
    dtype: str
    mode: str
    peer: str
    ratio: tuple[Number, Number, Number]
    of_limit: Number

    @property
    def key(self) -> tuple[str, str, int, int, str, str, str]:
        """What has to be the same for two times to be compared."""
        return self.subject, self.model, self.tp, self.tokens, self.operation, self.dtype, self.mode

    @property
    def place(self) -> str:
        """As "experts of mixtral.8x7b tp 8 at 256 tokens"."""
        return f"{self.operation} of {self.model} tp {self.tp} at {self.tokens} tokens"


class SpeedBaseline(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of accepted speeds. evidence: whether its times say anything, which those of a CPU do not."""

    schema: int = SPEED_SCHEMA
    implementation: str
    device: str
    evidence: bool
    accepted: dict[str, str]
    entries: list[SpeedEntry]


def implementation_of(run: BenchRun) -> str:
    """Whom the run was made for: the subject that was named first."""
    return run.header.subjects[0] if run.header.subjects else ""


def speed_path(run: BenchRun, folder: Path = BASELINE_FOLDER) -> Path:
    """FOLDER/bench-<implementation>-<device>.json."""
    return folder / f"bench-{slug(implementation_of(run))}-{device_class(run.header)}.json"


def speed_baseline_of(run: BenchRun) -> SpeedBaseline:
    """What a run would become when it is accepted: right and timed subjects with a peer beside them."""
    header = run.header
    accepted = {"run": header.run, "started": header.started} | {
        name: header.environment.get(name, "") for name in _VERSIONS}
    found = [entry for line in run.timings if not line.subject.startswith(PEER) for entry in speed_of(run, line)]
    return SpeedBaseline(implementation=implementation_of(run), device=device_class(header), evidence=header.evidence,
                         accepted=accepted, entries=sorted(found, key=lambda entry: entry.key))


def speed_of(run: BenchRun, line: TimingLine, peer: str = "") -> Iterator[SpeedEntry]:
    """The entry of a timed line beside `peer`, by default the fastest of torch's; none where either was not timed.

    A line is timed only after it was compared with the truth, so that every entry is of a right result.
    """
    peers = [other for other in run.timings if _is_timed(other) and _shape(other) == _shape(line)
             and (other.subject == peer if peer else other.subject.startswith(PEER))]
    if not _is_timed(line) or not peers:
        return
    beside = min(peers, key=median)
    mine, theirs = ([from_number(one) for one in timing.seconds] for timing in (line, beside))
    ratio = (mine[0] / theirs[0], mine[1] / theirs[2], mine[2] / theirs[1])
    if not all(0 < one < float("inf") for one in ratio):
        return
    yield SpeedEntry(subject=line.subject, model=line.model, tp=line.tp, tokens=line.tokens, operation=line.operation,
                     dtype=run.header.dtype, mode=line.mode, peer=beside.subject,
                     ratio=(_rounded(ratio[0]), _rounded(ratio[1]), _rounded(ratio[2])),
                     of_limit=_rounded(of_limit(run, line.flop, line.num_bytes, mine[0])))


def _is_timed(line: TimingLine) -> bool:
    return line.status == "TIMED" and all(0 < from_number(one) < float("inf") for one in line.seconds)


def _shape(line: TimingLine) -> tuple[str, int, int, str]:
    return line.model, line.tp, line.tokens, line.operation


def _rounded(value: float) -> Number:
    """Three significant digits: quartiles are rarely closer."""
    return to_number(float(f"{value:.3g}"))


def format_speed(baseline: SpeedBaseline) -> str:
    """The file's text, one line per entry."""
    head = {name: getattr(baseline, name) for name in ("schema", "implementation", "device", "evidence", "accepted")}
    entries = ",\n    ".join(json.dumps(msgspec.to_builtins(entry)) for entry in baseline.entries)
    return json.dumps(head, indent=2)[:-2] + f',\n  "entries": [\n    {entries}\n  ]\n}}\n'


def read_speed(path: Path) -> SpeedBaseline:
    """The speeds in a file; raises UsageValueError with the file and what is wrong in it."""
    try:
        baseline = msgspec.json.decode(path.read_bytes(), type=SpeedBaseline)
    except (OSError, msgspec.DecodeError) as error:
        raise UsageValueError(f"{path}: {error}; `moe-ref accept BENCH` writes it") from error
    if baseline.schema != SPEED_SCHEMA:
        raise UsageValueError(f"{path}: schema {baseline.schema} of accepted speeds, but this version reads "
                              f"{SPEED_SCHEMA}; `moe-ref accept BENCH` writes it anew")
    for entry in baseline.entries:
        if not all(0 < from_number(one) < float("inf") for one in entry.ratio):
            raise UsageValueError(f"{path}: {entry.place}: ratio {list(entry.ratio)}, but should be positive numbers")
    return baseline
