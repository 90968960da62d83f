"""How much a lane executed, read from the records in its folder."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from moe_ref.contract.vocabulary import EXECUTED_VERDICTS
from moe_ref.lanes.schema import Counted
from moe_ref.records.store import whole_lines


def count_executed(what: Counted, folder: Path) -> int:
    """Tests, cases and the like that ran; what a folder does not hold, or holds in halves, counts as 0."""
    return _COUNTERS[what](folder)


def _lines(folder: Path, name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Whole JSON lines of all files of that name, at any depth: a lane may keep several records."""
    for path in sorted(folder.rglob(name)):
        for text in whole_lines(path).splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield path, line


def _cases(folder: Path) -> int:
    """Of a case that was judged again the last verdict counts."""
    last = {(path, line.get("case")): line.get("verdict") for path, line in _lines(folder, "records.jsonl")
            if line.get("type") == "case"}
    return sum(verdict in EXECUTED_VERDICTS for verdict in last.values())


def _curves(folder: Path) -> int:
    return len({(path, line.get("subject")) for path, line in _lines(folder, "records.jsonl")
                if line.get("type") == "growth" and line.get("status") != "NOT RUN"})


def _mutants(folder: Path) -> int:
    last = {(path, line.get("id")): line.get("outcome") for path, line in _lines(folder, "score.jsonl")
            if line.get("type") == "mutant"}
    return sum(outcome in ("caught", "missed", "equivalent") for outcome in last.values())


def _layers(folder: Path) -> int:
    """Of the studies: one too wide for its contract is drawn, but not judged. Of ci/graphs.py: all that were run."""
    called = {(path, line.get("case")) for path, line in _lines(folder, "graphs.jsonl")}
    runs = {(path, line.get("draw")): line.get("runs", []) for path, line in _lines(folder, "alarms*.jsonl")
            if line.get("type") == "draw"}
    return len(called) + sum(run.get("verdict") in EXECUTED_VERDICTS for of_draw in runs.values() for run in of_draw)


def _tests(folder: Path) -> int:
    """Tests that ran: skipped ones did not, and one that broke before it began is no test."""
    total = 0
    for path in sorted(folder.rglob("junit.xml")):
        try:
            suites = ElementTree.parse(path).getroot().iter("testsuite")
        except ElementTree.ParseError:
            continue
        total += sum(int(one.get("tests", 0)) - int(one.get("skipped", 0)) - int(one.get("errors", 0))
                     for one in suites)
    return total


def _combinations(folder: Path) -> int:
    """Kernels that were compiled, each for an architecture."""
    last = {(path, line.get("key")): line.get("error") for path, line in _lines(folder, "records.jsonl")
            if line.get("type") == "combination"}
    return sum(not error for error in last.values())


_COUNTERS: dict[Counted, Callable[[Path], int]] = {
    "tests": _tests, "cases": _cases, "curves": _curves, "mutants": _mutants, "layers": _layers,
    "combinations": _combinations}
