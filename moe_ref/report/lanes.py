"""Lanes that an event should have run, against the records that they left: what is missing is never green."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from moe_ref.contract.errors import UsageValueError
from moe_ref.lanes.count import count_executed
from moe_ref.lanes.schema import Counts
from moe_ref.lanes.select import Choice
from moe_ref.records.lanes import LANE_FILE, LaneRecord, read_lane
from moe_ref.records.schema import RunLine
from moe_ref.records.store import FILE_NAME, Run, read_run
from moe_ref.report.markdown import Section, block, cell
from moe_ref.report.words import one_line, plural, printable

FAILED, HARNESS_ERROR, TOO_FEW = 1, 3, 4
_NOTHING = "first nothing failed"
HEAD_LIMIT = 600
"""Characters of a head line that a lane has recorded."""
_WORDS = {"pass": "PASS", "fail": "FAIL", "not_run": "NOT RUN"}
LOST, LEFT_OUT = "LOST", "left out"
_ORDER = ("FAIL", "NOT RUN", LOST, "PASS", LEFT_OUT)


@dataclass(frozen=True)
class LaneRow:
    """What became of one lane.

    verdict: PASS, FAIL, NOT RUN (its device was not there), LOST (it left no record), or `left out` by the event.
    executed, seconds: None where nothing was recorded. head: the head lines of its own report.
    """

    name: str
    verdict: str
    counts: Counts
    minutes: int
    device: str = ""
    executed: int | None = None
    seconds: float | None = None
    reason: str = ""
    exit_code: int = 0
    head: tuple[str, ...] = ()

    @property
    def is_red(self) -> bool:
        return self.verdict not in ("PASS", LEFT_OUT)


def lane_rows(choices: Sequence[Choice], folders: Sequence[Path]) -> tuple[LaneRow, ...]:
    """A row per lane, in the order of the file; `folders` are searched for records, at any depth."""
    found: dict[str, list[Path]] = {}
    for name, folder in _found(folders):
        found.setdefault(name, []).append(folder)
    return tuple(_row(choice, found.get(choice.name, [])) for choice in choices)


def _files(folders: Sequence[Path], name: str) -> list[Path]:
    return sorted({path for folder in folders for path in (folder.rglob(name) if folder.is_dir() else [folder])
                   if path.name == name and path.is_file()})


def _lane_of_run(path: Path) -> str | None:
    """The lane that the first line of a record names; None where that is no run of `moe-ref verify`."""
    with path.open("rb") as file:
        try:
            return msgspec.json.decode(file.readline(), type=RunLine).lane
        except msgspec.DecodeError:
            return None


def _found(folders: Sequence[Path]) -> list[tuple[str, Path]]:
    """(lane, folder of its record): of lane.json, and of runs that `verify --lane` has left without one."""
    named = []
    for path in _files(folders, LANE_FILE):
        try:
            named.append((read_lane(path).lane, path.parent))
        except UsageValueError:
            # Named by its folder, so that it is not taken for lost.
            named.append((path.parent.name.removeprefix("lane-"), path.parent))
    # What lies below a lane.json is of that lane, whatever it is called in there.
    whole = {folder for _, folder in named}
    runs = [(_lane_of_run(path), path.parent) for path in _files(folders, FILE_NAME)
            if not whole & {path.parent, *path.parents}]
    return named + [(name, folder) for name, folder in runs if name]


def _row(choice: Choice, folders: list[Path]) -> LaneRow:
    """Of several records of one lane a red one speaks: a second attempt does not hide the first."""
    lane = choice.lane
    row = LaneRow(choice.name, LOST, lane.counts, lane.minutes)
    if not folders:
        reason = choice.reason or "should have run on this event and left no record"
        return replace(row, verdict=LOST if choice.runs else LEFT_OUT, reason=reason)
    rows = [_of_folder(row, folder) for folder in folders]
    return next((one for one in rows if one.is_red), rows[-1])


def _of_folder(row: LaneRow, folder: Path) -> LaneRow:
    try:
        if (folder / LANE_FILE).exists():
            return _of_record(row, read_lane(folder / LANE_FILE))
        return _of_run(row, read_run(folder), folder)
    except UsageValueError as error:
        return replace(row, verdict="FAIL", reason=one_line(str(error), 200), exit_code=HARNESS_ERROR)


def _of_record(row: LaneRow, record: LaneRecord) -> LaneRow:
    """By the minimum of the file: a record that a change has made may say another."""
    verdict, reason, code = _WORDS[record.verdict], record.reason, record.exit_code
    if verdict == "PASS" and record.executed < row.counts.minimum:
        verdict, reason, code = "FAIL", _too_few(row, record.executed), TOO_FEW
    return replace(row, verdict=verdict, reason=reason, exit_code=code, device=record.device, executed=record.executed,
                   seconds=record.seconds, head=tuple(record.head))


def _of_run(row: LaneRow, run: Run, folder: Path) -> LaneRow:
    """Of a run with that lane's name, made without `moe-ref lanes run`."""
    executed = count_executed("cases", folder)
    code = run.end.exit_code if run.end else TOO_FEW
    failed = "" if not code else f"exit code {code}" if run.end else "cut short"
    few = executed < row.counts.minimum
    reason = "; ".join([failed] * bool(failed) + [_too_few(row, executed)] * few)
    return replace(row, verdict="FAIL" if reason else "PASS", reason=reason, exit_code=code or TOO_FEW * few,
                   executed=executed, device=run.header.environment.get("device", ""),
                   seconds=run.end.seconds if run.end else None)


def _too_few(row: LaneRow, executed: int) -> str:
    return f"lane {row.name} executed {executed} of at least {row.counts.minimum} {row.counts.what}"


def with_lanes(head: Sequence[str], code: int, rows: Sequence[LaneRow]) -> tuple[tuple[str, ...], int]:
    """Head lines and exit code of a report that also answers for these lanes.

    The code is the report's own where it has one; then 1 where a lane failed, 3 where its record is broken, 4 where it
    executed too few, did not run or was lost.
    """
    if not rows:
        return tuple(head), code
    red = [row for row in rows if row.is_red]
    codes = {row.exit_code for row in red if row.verdict == "FAIL"}
    others = FAILED if codes - {HARNESS_ERROR, TOO_FEW} else HARNESS_ERROR if HARNESS_ERROR in codes else TOO_FEW
    code = code or (others if red else 0)
    verdict = "; ".join([*_red_words(red), head[0][6:]])
    ran = sum(row.verdict in ("PASS", "FAIL") for row in rows)
    wanted = sum(row.verdict != LEFT_OUT for row in rows)
    count = f"{head[2]}; {ran} of {plural(wanted, 'lane')} ran"
    first = head[3]
    if red and first.startswith(_NOTHING):
        worst = in_order(rows)[0]
        first = (f"first lane {worst.name}: {one_line(worst.reason, 200)}; repro: bash ci/lane {worst.name}; "
                 f"in the cases {first.removeprefix('first ')}")
    return (f"{'FAIL' if code else 'PASS'}  {verdict}", head[1], count, first, *head[4:]), code


def _red_words(red: Sequence[LaneRow]) -> list[str]:
    """'lanes LOST: cpu, score', with the reason where there is one lane of a verdict."""
    words = []
    for verdict in dict.fromkeys(row.verdict for row in red):
        rows = [row for row in red if row.verdict == verdict]
        reason = f" ({one_line(rows[0].reason, 120)})" if len(rows) == 1 and rows[0].reason else ""
        words.append(f"lane{'s' * (len(rows) > 1)} {verdict}: {', '.join(row.name for row in rows)}{reason}")
    return words


def lane_section(rows: Sequence[LaneRow]) -> Section:
    """The table of lanes as Markdown; red ones first."""
    return Section("Lanes", ("lane", "device", "verdict", "executed", "time", "reason"),
                   [tuple(map(cell, words_of(row))) for row in in_order(rows)], 60)


def head_section(rows: Sequence[LaneRow]) -> Section:
    """What the reports of lanes say first, the failing ones' before the others'."""
    return Section("Reports of lanes", (), [(f"**{cell(row.name)}**\n\n{block(_lines(row.head))}\n",)
                                            for row in in_order(rows) if row.head], 20)


def _lines(head: Sequence[str]) -> str:
    return "\n".join(printable(line)[:HEAD_LIMIT] for line in head)


def in_order(rows: Sequence[LaneRow]) -> list[LaneRow]:
    """Lanes that failed, that did not run, that are green, that the event left out."""
    return sorted(rows, key=lambda row: _ORDER.index(row.verdict))


def words_of(row: LaneRow) -> tuple[str, ...]:
    """Lane, device, verdict, executed of minimum, seconds of minutes, reason."""
    executed = "-" if row.executed is None else f"{row.executed} {row.counts.what} (minimum {row.counts.minimum})"
    seconds = "-" if row.seconds is None else f"{row.seconds:.0f} s of {row.minutes} min"
    return row.name, row.device, row.verdict, executed, seconds, row.reason


def lane_document(rows: Sequence[LaneRow]) -> list[dict[str, object]]:
    """The rows under `lanes` of report.json."""
    return [{"lane": row.name, "verdict": row.verdict, "device": row.device, "counted": row.counts.what,
             "executed": row.executed, "minimum": row.counts.minimum, "seconds": row.seconds, "minutes": row.minutes,
             "reason": row.reason} for row in in_order(rows)]
