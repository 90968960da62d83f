"""Lines as they come: into the record, if there is one, and into the run that is shown."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from moe_ref.records.store import RecordWriter

Run = TypeVar("Run")


class Collected(Generic[Run]):
    """begin: the run of a first line; add: puts another line where it belongs."""

    def __init__(self, folder: Path | None, begin: Callable[[Any], Run], add: Callable[[Run, Any], None]) -> None:
        self._writer = RecordWriter(folder) if folder else None
        self._begin, self._add = begin, add
        self._run: Run | None = None

    @property
    def run(self) -> Run:
        """Everything so far."""
        assert self._run is not None
        return self._run

    def keep(self, line: msgspec.Struct) -> None:
        """Write and remember a line, the first of which begins the run."""
        if self._writer:
            self._writer.append(line)
        if self._run is None:
            self._run = self._begin(line)
        else:
            self._add(self._run, line)

    def __enter__(self) -> "Collected[Run]":
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer:
            self._writer.close()
