"""Record files of verification runs, read for a report: what is wrong with a line loses that line alone. No torch."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from moe_ref.contract.vocabulary import RED_VERDICTS, Verdict
from moe_ref.records.faults import case_fault, end_fault, id_fault, names_device, readable_cases, run_fault
from moe_ref.records.lean import Sharing
from moe_ref.records.lines import UNREADABLE, TextLine, decode_line
from moe_ref.records.refused import Refusals
from moe_ref.records.schema import CaseLine, EndLine, Line, RunLine
from moe_ref.records.store import Run

LOST = "its record line was refused"
_CASE, _RUN = (re.compile(rb'"%s"\s*:\s*("(?:[^"\\]|\\.)*")' % name) for name in (b"case", b"run"))


@dataclass
class _Reading:
    """One file. lost: case -> why its last line was refused; ends: where end lines stood."""

    refusals: Refusals
    sharing: Sharing
    runs: dict[str, Run] = field(default_factory=dict)
    lost: dict[tuple[str, str], str] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)

    def take(self, number: int, line: Line) -> None:
        if isinstance(line, RunLine):
            self._begin(number, line)
        elif (run := self._run_of(line)) is None:
            held = " and ".join(self.runs) or "no run line before it"
            self.refuse(number, f"a line of run {line.run}, but the file holds {held}")
        elif isinstance(line, EndLine):
            run.end, self.ends[line.run] = line, number
        elif fault := case_fault(line) or _stranger(line, run):
            self.refuse(number, fault, line.run, line.case)
        else:
            run.cases[line.case], run.end = self.sharing.lean(line), None
            self.lost.pop((line.run, line.case), None)

    def _begin(self, number: int, line: RunLine) -> None:
        if fault := run_fault(line):
            self.refuse(number, fault)
        elif line.run not in self.runs:
            line, faults = readable_cases(line)
            for one in faults:
                self.refuse(number, one)
            self.runs[line.run] = Run(line)

    def _run_of(self, line: CaseLine | EndLine) -> Run | None:
        """The run of a line; one that is made up from a case line where the run line may be among the refused."""
        if line.run not in self.runs and self.refusals.number and isinstance(line, CaseLine) and not case_fault(line):
            self.runs[line.run] = Run(_made_up(line), has_header=False)
        return self.runs.get(line.run)

    def refuse(self, number: int, reason: str, run: str = "", case: str = "") -> None:
        case = case if case and not id_fault(case) else ""
        self.refusals.refuse(number, reason, case)
        if case:
            run = run if run in self.runs or not self.runs else next(reversed(self.runs))
            self.lost[run, case] = f"{LOST}: {reason[:200]}"

    def finish(self) -> list[Run]:
        num_refused = self.refusals.number
        for name, run in self.runs.items():
            if run.end and (fault := end_fault(run.end, list(run.cases.values()), num_refused)):
                self.refusals.refuse(self.ends[name], fault)
        for (name, case), reason in self.lost.items():
            if run := self.runs.get(name):
                known = run.cases.get(case)
                # A pass that a later, unreadable line may have taken back is none; a failure stays one.
                if known is None or known.verdict not in RED_VERDICTS:
                    run.cases[case] = lost_line(run, case, reason)
        return list(self.runs.values())


def read_runs(lines: Iterable[TextLine], refusals: Refusals) -> list[Run]:
    """All runs in a file; what is refused of it goes to `refusals`, and its case counts as not run, with the reason."""
    reading, decoder = _Reading(refusals, Sharing()), msgspec.json.Decoder(Line)
    for text in lines:
        line = decode_line(text, decoder)
        if isinstance(line, str):
            reading.refuse(text.number, line, _find(_RUN, text.text), _find(_CASE, text.text))
        else:
            reading.take(text.number, line)
    return reading.finish()


def lost_line(run: Run, case: str, reason: str) -> CaseLine:
    """A case of the run that did not run as far as can be told."""
    return CaseLine(run=run.header.run, case=case, purpose="", implementation=run.header.implementation, ranks="",
                    device="", verdict=Verdict.NOT_RUN, reason=reason)


def _find(pattern: re.Pattern[bytes], text: bytes) -> str:
    """The word after a key, in a line that does not decode; "" where there is none."""
    # Ids stand near the beginning; the limit keeps garbage from costing time.
    found = pattern.search(text[:2 ** 16])
    try:
        return msgspec.json.decode(found[1], type=str) if found else ""
    except UNREADABLE:
        return ""


def _stranger(line: CaseLine, run: Run) -> str:
    mine, theirs = run.header.implementation, line.implementation
    return "" if mine == theirs else f"{theirs.name} {theirs.version}, but the run is of {mine.name} {mine.version}"


def _made_up(line: CaseLine) -> RunLine:
    """What a case line tells of its run."""
    device = line.device if names_device(line.device) else "unknown"
    return RunLine(run=line.run, started="", implementation=line.implementation, tier="", cases=[], minimum_executed=0,
                   axis_pairs=(0, 0), environment={"device": device}, tolerances_digest="", oracle_version="")
