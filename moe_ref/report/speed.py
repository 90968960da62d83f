"""Times of a benchmark beside the accepted ones: slower and faster, each as a ratio to torch in the same run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_ref.contract.errors import UsageValueError
from moe_ref.records.bench import BenchRun
from moe_ref.records.schema import Number, from_number
from moe_ref.report.baseline import device_class
from moe_ref.report.bench import NO_EVIDENCE
from moe_ref.report.speed_baseline import (
    PEER,
    SpeedBaseline,
    SpeedEntry,
    implementation_of,
    read_speed,
    speed_of,
    speed_path,
)
from moe_ref.report.words import one_line

SLOWER_FACTOR = 1.25
"""Change of a ratio to torch that is told, and only where the quartiles of the two runs lie apart.

Dividing by torch's time in the same run takes out what moves both: clocks, power, driver, another load. What is left is
the noise of four medians, whose quartiles are recorded, and what moves one of the two alone, such as where its buffers
came to lie; the factor leaves room for that and is below what a lost tile shape or fusion costs."""


@dataclass(frozen=True)
class SpeedChange:
    """One subject on one shape whose ratio to `peer` went from `before` to `now`; of_limit: share of the roofline."""

    subject: str
    place: str
    dtype: str
    mode: str
    peer: str
    before: float
    now: float
    limit_before: Number
    limit_now: Number

    @property
    def words(self) -> str:
        """As "2.0x slower beside torch:loop: experts of mixtral.8x7b tp 8 at 256 tokens, 0.50 -> 1.00 of its time"."""
        factor = self.now / self.before
        change = f"{factor:.1f}x slower" if factor > 1 else f"{1 / factor:.1f}x faster"
        return (f"{change} beside {one_line(self.peer, 40)}: {one_line(self.place, 120)}, {self.before:.2f} -> "
                f"{self.now:.2f} of its time")


@dataclass(frozen=True)
class Speed:
    """A benchmark beside accepted speeds, the largest changes first.

    evidence: whether both were timed where times say something. missing: (place, why) of accepted speeds that were not
    taken again. num_compared: how many were.
    """

    implementation: str
    accepted: str
    evidence: bool
    num_compared: int
    slower: tuple[SpeedChange, ...]
    faster: tuple[SpeedChange, ...]
    missing: tuple[tuple[str, str], ...]

    @property
    def mark(self) -> str:
        """What has to stand beside every number of a benchmark that is no evidence."""
        return "" if self.evidence else f" ({NO_EVIDENCE})"


def compare_speeds(runs: Sequence[BenchRun], folder: Path) -> tuple[tuple[Speed, ...], tuple[str, ...]]:
    """Every run beside the accepted speeds of its implementation on its device in a folder; notes where there are none.

    Raises UsageValueError for what `compare_speed` refuses and for files that cannot be read.
    """
    found, notes = [], []
    for run in runs:
        path = speed_path(run, folder)
        if path.exists():
            found.append(compare_speed(run, read_speed(path)))
        else:
            notes.append(f"no accepted speeds of {one_line(implementation_of(run), 80)} in {path.name}: nothing says "
                         "whether it is slower; `moe-ref accept BENCH` makes them")
    return tuple(found), tuple(notes)


def compare_speed(run: BenchRun, baseline: SpeedBaseline) -> Speed:
    """A run beside accepted speeds; raises UsageValueError where implementation, device or hardware class differ."""
    for what, mine, theirs in (
            ("implementation", implementation_of(run), baseline.implementation),
            ("device class", device_class(run.header), baseline.device),
            ("hardware class", run.header.environment.get("hardware", ""), baseline.accepted.get("hardware", ""))):
        if mine and theirs and mine != theirs:
            raise UsageValueError(f"{what} {mine!r} of benchmark {run.header.run} cannot be compared with {theirs!r} "
                                  "of the accepted speeds; accept a benchmark of the same")
    pairs, missing = [], []
    for before in baseline.entries:
        now = _again(run, before)
        if isinstance(now, str):
            missing.append((f"{before.subject}: {before.place}, {before.dtype}", now))
        else:
            pairs.append((before, now))
    slower = [_change(*pair) for pair in pairs if _is_slower(*pair)]
    faster = [_change(*pair) for pair in pairs if _is_slower(pair[1], pair[0])]
    return Speed(implementation=baseline.implementation, accepted=baseline.accepted.get("started", "unknown date")[:10],
                 evidence=run.header.evidence and baseline.evidence, num_compared=len(pairs),
                 slower=tuple(sorted(slower, key=lambda change: -change.now / change.before)),
                 faster=tuple(sorted(faster, key=lambda change: change.now / change.before)), missing=tuple(missing))


def share(limit: Number) -> str:
    """A share of the roofline in words."""
    number = from_number(limit)
    return "-" if number != number else f"{number:.0%}"


def _again(run: BenchRun, before: SpeedEntry) -> SpeedEntry | str:
    """The same subject on the same shape beside the same peer, or why there is none."""
    if run.header.dtype != before.dtype:
        return f"timed in {run.header.dtype}"
    shape = (before.subject, before.model, before.tp, before.tokens, before.operation)
    lines = [line for line in run.timings
             if (line.subject, line.model, line.tp, line.tokens, line.operation) == shape]
    if not lines:
        return "not in this run"
    if lines[0].status != "TIMED":
        return f"{lines[0].status}: {one_line(lines[0].reason, 120) or 'no reason recorded'}"
    if lines[0].mode != before.mode:
        return f"timed as {lines[0].mode or 'nothing'}, not as {before.mode}: {one_line(lines[0].mode_reason, 120)}"
    return next(speed_of(run, lines[0], before.peer), f"{before.peer or PEER} was not timed beside it")


def _is_slower(before: SpeedEntry, now: SpeedEntry) -> bool:
    """Beyond the factor, and apart by the quartiles of both."""
    (was, _, most_before), (is_now, least_now, _) = (
        [from_number(one) for one in entry.ratio] for entry in (before, now))
    return is_now > SLOWER_FACTOR * was and least_now > most_before


def _change(before: SpeedEntry, now: SpeedEntry) -> SpeedChange:
    return SpeedChange(subject=now.subject, place=now.place, dtype=now.dtype, mode=now.mode, peer=now.peer,
                       before=from_number(before.ratio[0]), now=from_number(now.ratio[0]),
                       limit_before=before.of_limit, limit_now=now.of_limit)
