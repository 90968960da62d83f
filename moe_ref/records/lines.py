"""The lines of a file that nobody vouches for: regular files alone, no line longer than a limit. Imports no torch."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from moe_ref.records.schema import SCHEMA

LINE_LIMIT = 16 * 2 ** 20
"""Bytes; a run line that names 100,000 cases has 7 MiB."""

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding a line raises: for what is no JSON or no record, no UTF-8, or nested without end."""

_FILE_LIMIT = 16 * 2 ** 30
_KEPT = 2 ** 16
"""Bytes kept of a line that is too long: enough to tell the case that it is about."""


@dataclass(frozen=True)
class TextLine:
    """fault: why it is no whole line, "" where it is one; is_cut: whether `text` is only its beginning."""

    number: int
    text: bytes
    fault: str = ""
    is_cut: bool = False


def open_regular(path: Path) -> BinaryIO:
    """The file, open; raises OSError, also for a pipe, a device or whatever else could block or never end."""
    # Looked at before it is opened, since opening alone does something to some devices; and after, since it may change.
    _require_regular(os.stat(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_regular(os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb", buffering=2 ** 20)


def _require_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")
    if status.st_size > _FILE_LIMIT:
        raise OSError(f"{status.st_size} bytes, but should be at most {_FILE_LIMIT}")


def text_lines(file: BinaryIO) -> Iterator[TextLine]:
    """Every line with its number, from 1; empty ones are left out."""
    number = 0
    try:
        while text := file.readline(LINE_LIMIT + 1):
            number += 1
            if len(text) > LINE_LIMIT and not text.endswith(b"\n"):
                yield _skip_line(file, number, text)
            elif not text.endswith(b"\n"):
                yield TextLine(number, text, "half a line: the file ends in it")
            elif not text.isspace():
                yield TextLine(number, text)
    except OSError as error:
        yield TextLine(number + 1, b"", f"cannot be read on: {error.strerror or error}", is_cut=True)


def _skip_line(file: BinaryIO, number: int, text: bytes) -> TextLine:
    length = len(text)
    while rest := file.readline(LINE_LIMIT):
        length += len(rest)
        if rest.endswith(b"\n"):
            break
    fault = f"a line of {length} bytes, but should have at most {LINE_LIMIT}"
    return TextLine(number, text[:_KEPT], fault, is_cut=True)


def decode_line(line: TextLine, decoder: msgspec.json.Decoder) -> Any:
    """What a line says, or why it is refused, as a `str`. A last line that lacks nothing but its end is whole."""
    if line.is_cut:
        return line.fault
    try:
        found = decoder.decode(line.text)
    except UNREADABLE as error:
        schema = _schema_of(line.text)
        if schema not in (SCHEMA, None):
            return f"schema {schema}, but this version reads {SCHEMA}"
        return line.fault or str(error)
    if getattr(found, "schema", SCHEMA) != SCHEMA:
        return f"schema {found.schema}, but this version reads {SCHEMA}"
    return found


class _Head(msgspec.Struct):
    schema: int | None = None


def _schema_of(text: bytes) -> int | None:
    try:
        return msgspec.json.decode(text, type=_Head).schema
    except UNREADABLE:
        return None
