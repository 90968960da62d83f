"""A run of `moe-ref score` as typed JSON lines: a `score` line, then one line per mutant or right variant. No torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from moe_ref.contract.errors import UsageValueError
from moe_ref.records.lines import UNREADABLE
from moe_ref.records.schema import SCHEMA

SCORE_FILE = "score.jsonl"


class ScoreLine(msgspec.Struct, frozen=True, kw_only=True, tag="score", tag_field="type"):
    """First line: digest of the catalogue, of the judge and of the packages that are judged, and the tiers.

    classes: titles by letter; entries: names by id; unseeded: reasons by id.
    """

    schema: int = SCHEMA
    started: str
    digest: str
    tiers: list[str]
    device: str
    classes: dict[str, str]
    entries: dict[str, str]
    unseeded: dict[str, str]


class MutantOutcome(msgspec.Struct, frozen=True, kw_only=True, tag="mutant", tag_field="type"):
    """What became of a mutant.

    tried: cases that executed; case, said: where and how it was caught; owned: by the check that should. silent: every
    bit is that of the right subject on a case without the trigger, None where there is no such case.
    """

    id: str
    outcome: Literal["caught", "missed", "equivalent", "not_runnable", "broken"]
    reason: str = ""
    tried: int = 0
    case: str = ""
    said: str = ""
    owned: bool = False
    silent: bool | None = None
    message: str = ""
    refused: dict[str, bool] = {}
    seconds: float = 0.0


class RightOutcome(msgspec.Struct, frozen=True, kw_only=True, tag="right", tag_field="type"):
    """What became of a right variant; passed: of those executed; red: "CASE: what was said" of what accuses it.

    refused: by project how many of how many outputs its criterion refuses, on data of its scale.
    """

    id: str
    executed: int
    passed: int
    not_run: int
    unsupported: int
    red: list[str] = []
    refused: dict[str, tuple[int, int]] = {}
    reason: str = ""
    seconds: float = 0.0


Outcome = MutantOutcome | RightOutcome
_LINE = ScoreLine | Outcome


@dataclass
class ScoreRun:
    """The lines of a record; of two for one subject the last counts."""

    header: ScoreLine
    mutants: dict[str, MutantOutcome] = field(default_factory=dict)
    right: dict[str, RightOutcome] = field(default_factory=dict)

    def add(self, line: Outcome) -> None:
        """Keep a line."""
        if isinstance(line, MutantOutcome):
            self.mutants[line.id] = line
        else:
            self.right[line.id] = line


def read_score(path: Path) -> ScoreRun | None:
    """The record at `path`, None where none was begun; raises UsageValueError with file and line."""
    if not path.exists():
        return None
    run: ScoreRun | None = None
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            line = msgspec.json.decode(text, type=_LINE)
        except UNREADABLE as error:
            raise UsageValueError(f"{path}:{number}: {error}") from error
        if isinstance(line, ScoreLine):
            run = ScoreRun(line)
        elif run is None:
            raise UsageValueError(f"{path}:{number}: {type(line).__name__} before the score line")
        else:
            run.add(line)
    return run
