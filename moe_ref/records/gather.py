"""All records at and below some paths, of every verb; what cannot be read is refused alone. Imports no torch."""

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from moe_ref.records import bench, compiled, growth
from moe_ref.records.lines import UNREADABLE, TextLine, decode_line, open_regular, text_lines
from moe_ref.records.refused import Refusals, Refused
from moe_ref.records.score import SCORE_FILE, MutantOutcome, RightOutcome, ScoreLine, ScoreRun
from moe_ref.records.store import FILE_NAME, Run
from moe_ref.records.tolerant import read_runs

Reader = Callable[[Iterable[TextLine], Refusals], list[Any]]


@dataclass(frozen=True)
class Kind:
    """Records of one verb. types: of its lines, the first one's first; read: what makes runs of a file's lines."""

    types: tuple[str, ...]
    read: Reader


def _strict_runs(first: type, lines: Any, begin: Callable[[Any], Any], add: Callable[[Any, Any], None]) -> Reader:
    """A reader of files where a first line begins a run and the others belong to the last that was begun."""
    def read(texts: Iterable[TextLine], refusals: Refusals) -> list[Any]:
        decoder, runs = msgspec.json.Decoder(lines), []
        for text in texts:
            line = decode_line(text, decoder)
            if isinstance(line, str):
                refusals.refuse(text.number, line)
            elif isinstance(line, first):
                runs.append(begin(line))
            elif not runs:
                refusals.refuse(text.number, f"a line before the first {first.__name__}")
            elif getattr(line, "run", None) != getattr(runs[-1].header, "run", None):
                refusals.refuse(text.number, f"a line of run {line.run}, but the file holds run {runs[-1].header.run}")
            else:
                add(runs[-1], line)
        # A folder that is used again keeps the last run.
        return runs[-1:]

    return read


KINDS = {
    "run": Kind(("run", "case"), read_runs),
    "diverge": Kind(("diverge", "growth", "difference"), _strict_runs(
        growth.DivergeLine, growth.GrowthRecordLine, growth.GrowthRun, growth.add_line)),
    "bench": Kind(("bench", "limit", "timing"), _strict_runs(
        bench.BenchLine, bench.BenchRecordLine, bench.BenchRun, bench.add_line)),
    "compile": Kind(("compile", "combination"), _strict_runs(
        compiled.CompileLine, compiled.CompiledRecordLine, compiled.CompiledRun, compiled.add_line)),
    "score": Kind(("score", "mutant", "right"), _strict_runs(
        ScoreLine, ScoreLine | MutantOutcome | RightOutcome, ScoreRun, ScoreRun.add))}
"""By the `type` of the first line."""

_NAMES = {FILE_NAME, SCORE_FILE}
_TYPE = re.compile(rb'"type"\s*:\s*"([a-z]+)"')
_LOOKED_AT = 1000
"""Lines of a file, and bytes of each, that may tell its kind."""


@dataclass
class Gathered:
    """found: runs by kind, in the order of files; refused: what could not be read, of all files."""

    found: dict[str, list[Any]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    refused: list[Refused] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        return self.found["run"]

    @property
    def growth(self) -> list[growth.GrowthRun]:
        return self.found["diverge"]

    @property
    def bench(self) -> list[bench.BenchRun]:
        return self.found["bench"]

    @property
    def compiled(self) -> list[compiled.CompiledRun]:
        return self.found["compile"]

    @property
    def score(self) -> list[ScoreRun]:
        return self.found["score"]


def gather(paths: Sequence[Path]) -> Gathered:
    """Everything recorded in files and below folders; never raises for what it finds there.

    In folders records.jsonl, score.jsonl and every other *.jsonl that holds lines of a known type are read. A link to a
    folder is not followed, a file that is met twice is read once.
    """
    gathered, seen = Gathered(), set()
    for path, is_named in _files(paths, gathered.refused):
        refusals = Refusals(path)
        try:
            status = path.stat()
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                _read_file(path, is_named or path.name in _NAMES, gathered, refusals)
        except OSError as error:
            refusals.refuse(None, f"cannot be read: {error.strerror or error}")
        gathered.refused += refusals.all()
    return gathered


def _files(paths: Sequence[Path], refused: list[Refused]) -> Iterator[tuple[Path, bool]]:
    """Candidates, and whether they were named themselves; those below a folder are sorted by name."""
    def cannot(error: OSError) -> None:
        refusals = Refusals(Path(error.filename))
        refusals.refuse(None, f"cannot be read: {error.strerror}")
        refused.extend(refusals.all())

    for path in paths:
        if not path.is_dir():
            yield path, True
            continue
        for folder, folders, names in os.walk(path, onerror=cannot):
            folders.sort()
            yield from ((Path(folder, name), False) for name in sorted(names) if name.endswith(".jsonl"))


def _read_file(path: Path, must_be_record: bool, gathered: Gathered, refusals: Refusals) -> None:
    with open_regular(path) as file:
        kind = _kind_of(text_lines(file))
        if kind is None:
            if must_be_record:
                refusals.refuse(None, "no record: none of its lines has a known type")
            return
        file.seek(0)
        found = KINDS[kind].read(text_lines(file), refusals)
    for run in found:
        if isinstance(run, Run):
            run.path = path
    gathered.found[kind] += found


def _kind_of(lines: Iterator[TextLine]) -> str | None:
    """The kind that the first line tells, or, if that one is broken, the first of those after it that tells one."""
    by_type = {name: kind for kind, held in KINDS.items() for name in held.types}
    for line in itertools.islice(lines, _LOOKED_AT):
        if kind := by_type.get(_type_of(line)):
            return kind
    return None


class _Typed(msgspec.Struct):
    type: str = ""


def _type_of(line: TextLine) -> str:
    """The type of a line; of a broken one what looks like it, "" where nothing does."""
    try:
        return msgspec.json.decode(line.text, type=_Typed).type
    except UNREADABLE:
        found = _TYPE.search(line.text[:_LOOKED_AT])
        return found[1].decode() if found else ""
