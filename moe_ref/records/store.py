"""Append-only record files: one writer at a time, each line fsynced, read strictly, resumed after a kill."""

import fcntl
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import msgspec

from moe_ref.contract.errors import UsageValueError
from moe_ref.records.lines import UNREADABLE
from moe_ref.records.refused import Refused
from moe_ref.records.schema import SCHEMA, CaseLine, EndLine, Line, RunLine

FILE_NAME = "records.jsonl"


class RecordWriter:
    """Appends lines to DIR/records.jsonl, or another file, which it locks; each is on disk when `append` returns.

    Raises UsageValueError where another process writes the file, or when it cannot be written: lines that were appended
    before stay whole. A file that was removed or cut meanwhile is written anew with all of its lines.
    """

    def __init__(self, folder: Path, name: str = FILE_NAME) -> None:
        self.path, self._begun = folder / name, False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._open(self.path)
            self._content = bytearray(whole_lines(self.path))
            _sync_name(folder)
        except OSError as error:
            raise UsageValueError(f"{self.path}: cannot be written: {error}") from error

    def append(self, line: msgspec.Struct) -> None:
        text = msgspec.json.encode(line) + b"\n"
        try:
            if not self._begun:
                # Half a line that a kill has left; a file that is only looked at stays as it is.
                os.ftruncate(self._file, len(self._content))
                self._begun = True
            _write(self._file, text)
            if not self._is_whole(len(self._content) + len(text)):
                self._write_anew(bytes(self._content + text))
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, len(self._content))
            held = self._content.count(b"\n")
            raise UsageValueError(f"{self.path}: cannot be written: {error}; the {held} lines that it held stay whole, "
                                  "and a run can be resumed") from error
        self._content += text

    def _open(self, path: Path) -> int:
        """A descriptor with the file's lock, which ends with it or with this process, however that ends."""
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(file)
            raise UsageValueError(f"{path}: {_holder(path)} is writing to it; wait for its end, or give another "
                                  "--record folder") from error
        except OSError:
            os.close(file)
            raise
        return file

    def _is_whole(self, size: int) -> bool:
        """Whether the file at the path is ours still, and as long as it should be."""
        mine = os.fstat(self._file)
        try:
            there = self.path.stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(mine, there) and mine.st_size == size

    def _write_anew(self, content: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".new")
        file = self._open(beside)
        os.ftruncate(file, 0)
        _write(file, content)
        beside.replace(self.path)
        _sync_name(self.path.parent)
        os.close(self._file)
        self._file = file

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def _write(file: int, text: bytes) -> None:
    """All of it, on disk; raises OSError."""
    left = memoryview(text)
    while left:
        left = left[os.write(file, left):]
    os.fsync(file)


def _sync_name(folder: Path) -> None:
    """The name of a new file is on disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _holder(path: Path) -> str:
    """Who has locked a record, as "process 123, run abc"; the kernel knows the process, the record the run."""
    number, words = os.stat(path).st_ino, "another process"
    with suppress(OSError):
        for fields in map(str.split, Path("/proc/locks").read_text().splitlines()):
            if fields[1:2] == ["FLOCK"] and fields[5].rpartition(":")[2] == str(number) and int(fields[4]) > 0:
                words = f"process {fields[4]}"
    lines = [line for line in whole_lines(path).splitlines() if b'"type":"run"' in line]
    with suppress(msgspec.DecodeError):
        return f"{words}, run {msgspec.json.decode(lines[-1], type=RunLine).run}," if lines else words
    return words


def whole_lines(path: Path) -> bytes:
    """What a record file holds up to its last newline: a kill can leave half a line behind it."""
    content = path.read_bytes()
    return content[:content.rfind(b"\n") + 1]


def drop_torn_line(path: Path) -> None:
    """Cut off half a line at the end of a file: whatever follows it would be unreadable."""
    if path.exists():
        os.truncate(path, len(whole_lines(path)))


def holds_lines(path: Path) -> bool:
    """Whether a record file has at least one whole line; a run killed before its first line left nothing to keep."""
    return path.exists() and whole_lines(path) != b""


@dataclass(frozen=True)
class TierPart:
    """One tier of a run that has several: how many cases of it executed, and what its run lines ask for."""

    name: str
    executed: int
    minimum_executed: int
    axis_pairs: tuple[int, int]


@dataclass
class Run:
    """All lines of one run; a case judged twice (resume after a kill) keeps its last line.

    Of a report's tolerant reader: path: it was read from; refused: what could not be read of it; tiers: where several
    were merged; suite_of: run -> its suite in junit.xml; has_header: False where the run line is among the refused and
    `header` holds what case lines tell.
    """

    header: RunLine
    cases: dict[str, CaseLine] = field(default_factory=dict)
    end: EndLine | None = None
    path: Path | None = None
    refused: list[Refused] = field(default_factory=list)
    tiers: tuple[TierPart, ...] = ()
    suite_of: dict[str, str] = field(default_factory=dict)
    has_header: bool = True


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
    except UNREADABLE as error:
        raise UsageValueError(f"{path}:{number}: {error}") from error
    if line.schema != SCHEMA:
        raise UsageValueError(f"{path}:{number}: schema {line.schema}, but this version reads {SCHEMA}")
    return line
