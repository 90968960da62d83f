"""lane.json: what became of one lane of ci/lanes.yaml. Imports no torch."""

from pathlib import Path
from typing import Literal

import msgspec

from moe_ref.contract.errors import UsageValueError

LANE_SCHEMA = 1
LANE_FILE = "lane.json"


class LaneRecord(msgspec.Struct, frozen=True, kw_only=True, tag="lane", tag_field="type"):
    """One run of a lane.

    device: what it ran on, "" where it did not. executed, minimum: of what `counted` says. minutes: its limit. reason:
    why it failed or did not run, in words. head: the head lines of its report, where it has one.
    """

    schema: int = LANE_SCHEMA
    lane: str
    started: str
    verdict: Literal["pass", "fail", "not_run"]
    reason: str = ""
    device: str = ""
    counted: str
    executed: int
    minimum: int
    seconds: float
    minutes: int
    exit_code: int
    head: list[str] = []


def write_lane(folder: Path, record: LaneRecord) -> None:
    """Write lane.json into a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    text = msgspec.json.format(msgspec.json.encode(record), indent=1)
    (folder / LANE_FILE).write_bytes(text + b"\n")


def read_lane(path: Path) -> LaneRecord:
    """The record at `path`; raises UsageValueError that names the file."""
    try:
        record = msgspec.json.decode(path.read_bytes(), type=LaneRecord)
    except (OSError, msgspec.MsgspecError) as error:
        raise UsageValueError(f"{path}: {error}") from error
    if record.schema != LANE_SCHEMA:
        raise UsageValueError(f"{path}: schema {record.schema}, but this version reads {LANE_SCHEMA}")
    return record
