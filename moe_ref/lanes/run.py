"""One lane: its command within its minutes, what it executed, its report, and lane.json that says so."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from moe_ref.contract.errors import UsageValueError
from moe_ref.lanes.count import count_executed
from moe_ref.lanes.device import find_device
from moe_ref.lanes.schema import Lane
from moe_ref.records.lanes import LANE_FILE, LaneRecord, write_lane
from moe_ref.records.store import FILE_NAME, read_run

TOO_FEW = 4
_GRACE_SECONDS = 30.0
"""Between asking a command to end and ending it: records are closed meanwhile."""
_MOE_REF = [sys.executable, "-m", "moe_ref"]


def run_lane(name: str, lane: Lane, folder: Path, tell: Callable[[str], None]) -> LaneRecord:
    """Run it, leave lane.json in `folder` whatever happens, and return what that holds.

    Raises UsageValueError where the folder holds a lane already: its record would be counted as this one's.
    """
    if (folder / LANE_FILE).exists():
        raise UsageValueError(f"{folder / LANE_FILE} is there already; give another --record folder")
    started, found = time.monotonic(), find_device(lane.device)
    begun = datetime.now(UTC).isoformat(timespec="seconds")
    code, why, head = TOO_FEW, found.missing, list[str]()
    if not found.missing:
        folder.mkdir(parents=True, exist_ok=True)
        code, why = _run_command(name, lane, folder)
        code, head = _report(lane, folder, code, tell)
    executed = count_executed(lane.counts.what, folder)
    reasons = [why] * bool(why)
    if executed < lane.counts.minimum and not found.missing:
        reasons.append(f"lane {name} executed {executed} of at least {lane.counts.minimum} {lane.counts.what}")
        code = code or TOO_FEW
    verdict = "not_run" if found.missing else "fail" if code else "pass"
    if code and not reasons:
        reasons.append(f"exit code {code}")
    record = LaneRecord(lane=name, started=begun, verdict=verdict, reason="; ".join(reasons), device=found.words,
                        counted=lane.counts.what, executed=executed, minimum=lane.counts.minimum,
                        seconds=round(time.monotonic() - started, 1), minutes=lane.minutes, exit_code=code, head=head)
    write_lane(folder, record)
    return record


def words_of(record: LaneRecord) -> str:
    """The lane in one line, verdict first."""
    verdict = {"pass": "PASS", "fail": "FAIL", "not_run": "NOT RUN"}[record.verdict]
    reason = f": {record.reason}" if record.reason else ""
    return (f"{verdict}  lane {record.lane}, {record.executed} of at least {record.minimum} {record.counted}, "
            f"{record.seconds:.0f} s of {record.minutes} min{reason}")


def command_of(lane: Lane, folder: Path) -> list[str]:
    """The words of the command; nothing in them is read by a shell."""
    filled = {"{record}": str(folder), "{minimum}": str(lane.counts.minimum), "{python}": sys.executable}
    words = shlex.split(lane.command)
    for place, value in filled.items():
        words = [word.replace(place, value) for word in words]
    return _MOE_REF + words[1:] if words[0] == "moe-ref" else words


def _run_command(name: str, lane: Lane, folder: Path) -> tuple[int, str]:
    """Exit code, and why it was ended early."""
    # A group of its own, so that an end reaches whatever the command has started.
    try:
        process = subprocess.Popen(command_of(lane, folder), env=os.environ | {"MOE_LANE": name}, process_group=0)
    except OSError as error:
        return 3, f"could not be started: {error}"
    try:
        return process.wait(lane.minutes * 60), ""
    except subprocess.TimeoutExpired:
        _end(process)
        return TOO_FEW, f"ended after {lane.minutes} minutes, its limit"
    except KeyboardInterrupt:
        _end(process)
        return 130, "interrupted"


def _end(process: subprocess.Popen) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue


def _report(lane: Lane, folder: Path, code: int, tell: Callable[[str], None]) -> tuple[int, list[str]]:
    """Pages of a lane of cases, the exit code with theirs, and head lines, also of a report the command has made."""
    out = folder / "report"
    if lane.counts.what == "cases" and (folder / FILE_NAME).exists():
        done = subprocess.run([*_MOE_REF, "report", str(folder), "--out", str(out),
                               *_baseline(lane, folder, tell)], check=False)
        code = code or done.returncode
        tell(f"report: {out.resolve() / 'index.html'}")
    try:
        head = json.loads((out / "report.json").read_text(encoding="utf-8"))["head"]
    except (OSError, ValueError, KeyError, TypeError):
        return code, []
    return code, [str(line) for line in head]


def _baseline(lane: Lane, folder: Path, tell: Callable[[str], None]) -> list[str]:
    """Of this device, where one was accepted: a runner of a new kind has none at first."""
    from moe_ref.report.baseline import baseline_path

    if not lane.baseline:
        return []
    try:
        path = baseline_path(read_run(folder), Path(lane.baseline))
    except UsageValueError as error:
        tell(f"no baseline: {error}")
        return []
    if not path.exists():
        tell(f"no baseline {path} was accepted yet: `moe-ref accept {folder}` makes it")
        return []
    return ["--baseline", str(path)]
