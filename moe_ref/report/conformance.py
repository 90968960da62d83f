"""The conformance table: what records say of implementations that no one here wrote, as data. Imports no torch."""

from collections.abc import Iterable, Sequence

import msgspec

from moe_ref.adapters.catalogue import ADAPTERS, Adapter
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import EXECUTED_VERDICTS, Stage, Verdict
from moe_ref.records.schema import CaseLine, Number
from moe_ref.records.store import Run
from moe_ref.report.words import one_line
from moe_ref.tiers.conformance import ConformanceCase, conformance_cases

SCHEMA = 1
SAID = 800
"""Characters of a reason."""


class Cell(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One case of one implementation.

    ratio: error / allowed of the output, backward the largest of output and gradients. bits: effective ones of the
    output, backward the fewest of a gradient. stage: the first that fails.
    said: of what did not pass, the reason in words. replay: the command that shows a failure again.
    """

    case: str
    verdict: Verdict
    ratio: Number = 0.0
    bits: Number = 0.0
    same_bits: bool | None = None
    stage: str = ""
    said: str = ""
    replay: str = ""


class Implementation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An adapter and the cells of what it supports.

    lacking: why it did not run, in words. packages: "name version", its own first.
    """

    name: str
    what: str
    kernels: str
    lineage: str
    packages: list[str] = []
    lacking: str = ""
    cells: list[Cell] = []

    @property
    def executed(self) -> list[Cell]:
        """Cells of cases that ran."""
        return [cell for cell in self.cells if cell.verdict in EXECUTED_VERDICTS]

    @property
    def failed(self) -> list[Cell]:
        """Cells of cases that ran and did not pass."""
        return [cell for cell in self.executed if cell.verdict is not Verdict.PASS]


class Conformance(msgspec.Struct, frozen=True, kw_only=True):
    """All implementations, when they ran and on what."""

    schema: int = SCHEMA
    date: str
    environment: dict[str, str]
    implementations: list[Implementation]


def conformance(runs: Sequence[Run], lacking: dict[str, str]) -> Conformance:
    """The document of these runs; lacking: why an adapter did not run, by name. UsageValueError without a run."""
    by_name = {run.header.implementation.name: run for run in runs}
    if not runs:
        raise UsageValueError("no run of an adapter to make a table of")
    newest = max(runs, key=lambda run: run.header.started).header
    kept = ("python", "torch", "triton", "numpy", "system", "device", "commit")
    return Conformance(
        date=newest.started[:10],
        environment={name: newest.environment[name] for name in kept if newest.environment.get(name)},
        implementations=[_implementation(adapter, by_name.get(adapter.name), lacking.get(adapter.name, ""))
                         for adapter in ADAPTERS])


def _implementation(adapter: Adapter, run: Run | None, lacking: str) -> Implementation:
    return Implementation(
        name=adapter.name, what=adapter.what, kernels=adapter.kernels, lineage=adapter.lineage,
        packages=run.header.environment.get("packages", "").split(", ") if run else [],
        lacking="" if run else lacking or "no record of it",
        cells=[_cell(run.cases[case.case_id]) for case in conformance_cases() if run and case.case_id in run.cases
               and run.cases[case.case_id].verdict != Verdict.UNSUPPORTED])


def _cell(line: CaseLine) -> Cell:
    # Stages inside are stored, and half a unit of that is right: most of them reach what is allowed, and say nothing.
    ends = [stage for stage in line.stages if stage.stage == Stage.OUTPUT or Stage(stage.stage).is_gradient]
    worst = max((float(stage.ratio) for stage in ends), default=0.0)
    gradients = [stage for stage in ends if stage.stage != Stage.OUTPUT]
    bits = min((float(stage.bits) for stage in gradients or ends if float(stage.bits)), default=0.0)
    passed = line.verdict == Verdict.PASS
    return Cell(case=line.case, verdict=Verdict(line.verdict), ratio=_short(worst), same_bits=line.same_bits,
                bits=_short(bits), stage=line.first_stage or "",
                said="" if passed else said(line), replay="" if passed else line.replay)


def _short(value: float) -> Number:
    """Two decimals, which is what the table shows; what JSON cannot hold as a word."""
    text = f"{value:.3g}"
    return text if text in ("nan", "inf") else float(text)


def said(line: CaseLine) -> str:
    """What a record gives as the reason of a case that did not pass: its first line, and the diagnosis."""
    first = one_line(line.reason.partition("\n")[0], SAID)
    if line.diagnosis is not None:
        return f"{first}; {line.diagnosis.fault} explains {100 * float(line.diagnosis.share):.0f} %"
    return first


def rows(cells: Iterable[Cell], kind: str) -> list[tuple[str, list[tuple[ConformanceCase, Cell]]]]:
    """Cells of one kind by row, in the order of the tier."""
    by_case = {cell.case: cell for cell in cells}
    grouped: dict[str, list[tuple[ConformanceCase, Cell]]] = {}
    for case in conformance_cases():
        if case.kind == kind and case.case_id in by_case:
            grouped.setdefault(case.row, []).append((case, by_case[case.case_id]))
    return list(grouped.items())
