"""Append-only record files: written line by line and fsynced, read strictly, resumed after a kill."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import msgspec

from moe_ref.contract.errors import UsageValueError
from moe_ref.records.schema import SCHEMA, CaseLine, EndLine, Line, RunLine

FILE_NAME = "records.jsonl"


class RecordWriter:
    """Appends lines to DIR/records.jsonl, or a file of another name; each is on disk when `append` returns."""

    def __init__(self, folder: Path, name: str = FILE_NAME) -> None:
        self.path = folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            drop_torn_line(self.path)
            self._file = self.path.open("ab")
        except OSError as error:
            raise UsageValueError(f"{self.path}: cannot be written: {error}") from error

    def append(self, line: msgspec.Struct) -> None:
        self._file.write(msgspec.json.encode(line) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def drop_torn_line(path: Path) -> None:
    """A kill can leave half a line at the end; whatever follows it would be unreadable, so it is cut off."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        os.truncate(path, whole)


def holds_lines(path: Path) -> bool:
    """Whether a record file has at least one whole line; a run killed before its first line left nothing to keep."""
    return path.exists() and b"\n" in path.read_bytes()


@dataclass
class Run:
    """All lines of one run; a case judged twice (resume after a kill) keeps its last line."""

    header: RunLine
    cases: dict[str, CaseLine] = field(default_factory=dict)
    end: EndLine | None = None


def read_run(path: Path) -> Run:
    """The run in a record file or in the folder that holds it; raises UsageValueError with file and line."""
    path = path / FILE_NAME if path.is_dir() else path
    if not path.exists():
        raise UsageValueError(f"{path}: no such record file")
    run: Run | None = None
    lines = path.read_bytes().split(b"\n")
    for number, text in enumerate(lines[:-1], 1):
        line = _decode(path, number, text)
        if isinstance(line, RunLine):
            if run and run.header.run != line.run:
                raise UsageValueError(f"{path}:{number}: run {line.run}, but the file holds run {run.header.run}")
            run = run or Run(line)
        elif run is not None and line.run != run.header.run:
            raise UsageValueError(f"{path}:{number}: a line of run {line.run}, but the file holds run {run.header.run}")
        elif run is None:
            raise UsageValueError(f"{path}:{number}: a {type(line).__name__} before the run line")
        elif isinstance(line, CaseLine):
            run.cases[line.case] = line
            run.end = None
        else:
            run.end = line
    if run is None:
        raise UsageValueError(f"{path}: holds no run line")
    return run


def _decode(path: Path, number: int, text: bytes) -> Line:
    try:
        line = msgspec.json.decode(text, type=Line)
    except msgspec.DecodeError as error:
        raise UsageValueError(f"{path}:{number}: {error}") from error
    if line.schema != SCHEMA:
        raise UsageValueError(f"{path}:{number}: schema {line.schema}, but this version reads {SCHEMA}")
    return line
