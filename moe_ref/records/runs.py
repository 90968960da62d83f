"""Reading the record of one verb: a first line that says what was run, lines of that run, and an `end`. No torch."""

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from moe_ref.contract.errors import UsageValueError
from moe_ref.records.lines import UNREADABLE
from moe_ref.records.schema import SCHEMA
from moe_ref.records.store import FILE_NAME

First = TypeVar("First", bound=msgspec.Struct)


def last_run(path: Path, first: type[First], kind: Any, verb: str) -> tuple[First, list[Any]]:
    """The last run in a record file or in the folder that holds it, as its first line and the others.

    kind: the union of all lines. Raises UsageValueError with file and line for whatever is no record of `verb`.
    """
    path = path / FILE_NAME if path.is_dir() else path
    if not path.exists():
        raise UsageValueError(f"{path}: no such record file")
    header: First | None = None
    lines: list[Any] = []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            line = msgspec.json.decode(text, type=kind)
        except UNREADABLE as error:
            raise UsageValueError(f"{path}:{number}: {error}; is it a record of `moe-ref {verb}`?") from error
        if line.schema != SCHEMA:
            raise UsageValueError(f"{path}:{number}: schema {line.schema}, but this version reads {SCHEMA}")
        if isinstance(line, first):
            # A folder that is used again keeps the last run.
            header, lines = line, []
        elif header is None or line.run != header.run:  # pyrefly: ignore
            held = "nothing before it" if header is None else f"run {header.run}"  # pyrefly: ignore
            raise UsageValueError(f"{path}:{number}: a line of run {line.run}, but the file holds {held}")
        else:
            lines.append(line)
    if header is None:
        raise UsageValueError(f"{path}: holds no {verb} line")
    return header, lines


def is_bench(path: Path) -> bool:
    """Whether a record file, or the one in a folder, begins as that of `moe-ref bench` does."""
    path = path / FILE_NAME if path.is_dir() else path
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.readline(), type=_Typed).type == "bench"
    except (OSError, msgspec.DecodeError):
        return False


class _Typed(msgspec.Struct, frozen=True):
    """What every line of a record has."""

    type: str
