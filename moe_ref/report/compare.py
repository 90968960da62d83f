"""A run against a baseline: what newly fails, is fixed, drifts towards its bound, or is no longer run."""

from dataclasses import dataclass

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import RED_VERDICTS, Verdict
from moe_ref.records.schema import CaseLine, Number
from moe_ref.records.store import Run
from moe_ref.report.baseline import Baseline, device_class, numerics_digest
from moe_ref.report.facts import case_lines, is_executed, is_red, ratio_of
from moe_ref.report.words import one_line

DRIFT_FACTOR = 1.5
"""Growth of a stage's worst ratio that is reported. Inputs are the same bits in every run, so an unchanged
kernel repeats its ratio and the baseline's two digits account for 5 % at most; another tile shape or split
reorders sums and moves the largest of many errors by some tens of percent. A change of the rounding model (an
extra rounding, a narrower accumulator) is a factor of 2 or more."""

DRIFT_FLOOR = 0.25
"""Ratios up to here are never drift: two more growths by DRIFT_FACTOR still pass (0.25 * 1.5^2 = 0.56)."""


@dataclass(frozen=True)
class Drift:
    """A passing case whose stage moved towards its bound."""

    case: str
    stage: str
    before: Number
    now: Number


@dataclass(frozen=True)
class Comparison:
    """A run against a baseline; every list in the order of the run's cases, lost cases sorted.

    new_failures: red now, not red in the baseline (or not in it). old_failures: red in both. fixed: red in
    the baseline, pass now. excused: a known failure now, none in the baseline; an expectation covers it.
    coverage_lost: (case, reason) executed in the baseline, not now. coverage_gained: the reverse.
    notes: what else differs and weakens the comparison.
    """

    baseline: str
    new_failures: tuple[str, ...]
    old_failures: tuple[str, ...]
    fixed: tuple[str, ...]
    excused: tuple[str, ...]
    drift: tuple[Drift, ...]
    coverage_lost: tuple[tuple[str, str], ...]
    coverage_gained: tuple[str, ...]
    notes: tuple[str, ...]


def compare(run: Run, baseline: Baseline) -> Comparison:
    """The run against the baseline.

    Raises UsageValueError, with both values, where implementation name, device class or the numerics
    contract of a case differ: ratios of different contracts say nothing about each other.
    """
    lines = case_lines(run)
    _refuse_strangers(run, lines, baseline)
    red_before = {case for case, entry in baseline.cases.items() if entry.verdict in RED_VERDICTS}
    red_now = [case for case, line in lines.items() if is_red(line)]
    executed_before = {case for case, entry in baseline.cases.items() if entry.executed}
    known_before = {case for case, entry in baseline.cases.items() if entry.verdict is Verdict.KNOWN_FAILURE}
    return Comparison(
        baseline=baseline.label,
        new_failures=tuple(case for case in red_now if case not in red_before),
        old_failures=tuple(case for case in red_now if case in red_before),
        fixed=tuple(case for case, line in lines.items()
                    if case in red_before and line.verdict == Verdict.PASS),
        excused=tuple(case for case, line in lines.items() if line.verdict == Verdict.KNOWN_FAILURE
                      and case in executed_before - known_before),
        drift=_drift(lines, baseline),
        coverage_lost=tuple((case, _why_lost(lines.get(case))) for case in sorted(executed_before)
                            if case not in lines or not is_executed(lines[case])),
        coverage_gained=tuple(case for case, line in lines.items()
                              if is_executed(line) and case not in executed_before),
        notes=_notes(run, baseline))


def _refuse_strangers(run: Run, lines: dict[str, CaseLine], baseline: Baseline) -> None:
    name, device = run.header.implementation.name, device_class(run.header)
    for what, mine, theirs in (("implementation", name, baseline.implementation),
                               ("device class", device, baseline.device)):
        if mine != theirs:
            raise UsageValueError(f"{what} {mine!r} of run {run.header.run} cannot be compared with "
                                  f"{theirs!r} of the baseline")
    for case, line in lines.items():
        now = numerics_digest(line.numerics)
        before = baseline.cases[case].numerics if case in baseline.cases else ""
        if now and before and now != before:
            raise UsageValueError(
                f"case {case}: numerics contract {line.numerics} of run {run.header.run} cannot be compared "
                f"with {baseline.numerics.get(before, before)} of the baseline; "
                "`moe-ref accept RUN` starts from the new contract")


def _drift(lines: dict[str, CaseLine], baseline: Baseline) -> tuple[Drift, ...]:
    """Stages of cases that pass in both, largest ratio now first."""
    found = []
    for case, line in lines.items():
        before = baseline.cases.get(case)
        if before is None or line.verdict != Verdict.PASS or before.verdict is not Verdict.PASS:
            continue
        found += [Drift(case, stage.stage, before.stages[stage.stage], stage.ratio) for stage in line.stages
                  if stage.stage in before.stages and _has_drifted(before.stages[stage.stage], stage.ratio)]
    return tuple(sorted(found, key=lambda drift: -ratio_of(drift.now)))


def _has_drifted(before: Number, now: Number) -> bool:
    return ratio_of(now) > max(DRIFT_FLOOR, DRIFT_FACTOR * ratio_of(before))


def _why_lost(line: CaseLine | None) -> str:
    if line is None:
        return "gone: not among the chosen cases"
    return f"{line.verdict}: {one_line(line.reason) or 'no reason recorded'}"


def _notes(run: Run, baseline: Baseline) -> tuple[str, ...]:
    header = run.header
    now = {"tier": header.tier, "tolerances": header.tolerances_digest, "oracle": header.oracle_version}
    meaning = {"tier": "coverage is that of another choice of cases",
               "tolerances": "ratios stand against different bounds, so drift may be the bound's",
               "oracle": "ratios stand against another oracle"}
    return tuple(f"{what} {baseline.accepted[what]} -> {value}: {meaning[what]}"
                 for what, value in now.items() if baseline.accepted.get(what, value) != value)
