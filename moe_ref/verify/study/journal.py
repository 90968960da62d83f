"""Results of the study of false alarms: one JSON line per draw, appended and synchronised, continued by a rerun."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec

from moe_ref.contract.errors import UsageValueError
from moe_ref.records.schema import Number


class RunOfVariant(msgspec.Struct, frozen=True, kw_only=True):
    """One judged layer; shares: of judging.Judged, values over thresholds."""

    variant: str
    hardware: str
    verdict: str
    reason: str = ""
    first_stage: str | None = None
    power: Number
    shares: dict[str, Number]


class DrawLine(msgspec.Struct, frozen=True, kw_only=True, tag="draw", tag_field="type"):
    """One draw with all its variants; `case` names sizes and options, the inputs are those of `draw`."""

    draw: int
    case: str
    data: str
    contract: str
    runs: list[RunOfVariant]


class Header(msgspec.Struct, frozen=True, kw_only=True, tag="alarms", tag_field="type"):
    """First line: digests of the sources and of tolerances.yaml that all lines were made with."""

    sources: str
    tolerances: str


def read_journal(path: Path, header: Header) -> dict[int, DrawLine]:
    """Lines by draw, of a file that may not be there yet; a last line that was cut short is taken off the file.

    UsageValueError on a file of other sources or that holds something else.
    """
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[:content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    lines = whole.splitlines()
    if not lines:
        return {}
    try:
        found = msgspec.json.decode(lines[0], type=Header)
        draws = [msgspec.json.decode(line, type=DrawLine) for line in lines[1:]]
    except msgspec.MsgspecError as error:
        raise UsageValueError(f"{path}: {error}, but should hold a header and lines of draws") from error
    if found != header:
        raise UsageValueError(f"{path}: made with sources {found.sources} and tolerances {found.tolerances}, but these "
                              f"are {header.sources} and {header.tolerances}: begin another file")
    return {line.draw: line for line in draws}


@contextmanager
def appending(path: Path, header: Header) -> Iterator["Journal"]:
    """The file, open at its end, with its header."""
    with path.open("ab") as file:
        journal = Journal(file)
        if file.tell() == 0:
            journal.append(header)
        yield journal


class Journal:
    """Appends lines that outlive a crash."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def append(self, line: Header | DrawLine) -> None:
        """Write one line and wait until it is on the disk."""
        self._file.write(msgspec.json.encode(line) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
