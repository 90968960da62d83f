"""What a report could not read: which file, which line, why. Imports no torch."""

import os
from collections.abc import Callable
from pathlib import Path

import msgspec

_NAMED = 1000
"""Refusals of one file that are kept one by one; a file of garbage has millions of lines."""

REASON_LIMIT = 300


class Refused(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A line of a record file, or a whole one (line None). case: that the line was about, "" where it cannot be told.

    number: of lines that this stands for.
    """

    path: str
    line: int | None
    reason: str
    case: str = ""
    number: int = 1

    @property
    def place(self) -> str:
        """FILE:LINE, or FILE."""
        return self.path if self.line is None else f"{self.path}:{self.line}"


Refuse = Callable[..., None]
"""(line number or None, reason, case): note a refusal in the file at hand."""


class Refusals:
    """Of one file, in the order of its lines; beyond many they are counted only."""

    def __init__(self, path: Path) -> None:
        # Names of files are bytes; what is no UTF-8 in them cannot be written into a report.
        self.path = os.fsencode(path).decode("utf-8", "replace")
        self.found: list[Refused] = []
        self.number = 0

    def refuse(self, line: int | None, reason: str, case: str = "") -> None:
        self.number += 1
        if self.number <= _NAMED:
            reason = reason if len(reason) <= REASON_LIMIT else reason[:REASON_LIMIT - 3] + "..."
            self.found.append(Refused(path=self.path, line=line, reason=reason, case=case))

    def all(self) -> list[Refused]:
        """What was refused; the last entry counts those that are not named."""
        if self.number <= _NAMED:
            return self.found
        rest = self.number - _NAMED
        return [*self.found, Refused(path=self.path, line=None, reason=f"{rest} more lines", number=rest)]
