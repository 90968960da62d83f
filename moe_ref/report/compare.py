"""A run against a baseline: what newly fails, is fixed, drifts towards its bound, or is no longer run."""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import RED_VERDICTS, Verdict
from moe_ref.records.schema import CaseLine, Number
from moe_ref.records.store import Run
from moe_ref.report.baseline import Baseline, device_class, numerics_digest
from moe_ref.report.bounds import BoundChange, Effect, bound_changes, effect
from moe_ref.report.facts import case_lines, is_executed, is_red, ratio_of
from moe_ref.report.losses import Loss, losses
from moe_ref.report.speed import Speed
from moe_ref.report.traits import traits
from moe_ref.report.words import one_line

DRIFT_FACTOR = 1.5
"""Growth of a stage's worst ratio that is reported. Inputs are the same bits in every run, so an unchanged
kernel repeats its ratio and the baseline's two digits account for 5 % at most; another tile shape or split
reorders sums and moves the largest of many errors by some tens of percent. A change of the rounding model (an
extra rounding, a narrower accumulator) is a factor of 2 or more."""

_CONTRACTS = 3
"""Cases of another contract that are told with both; all of them are counted."""

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
class DriftGroup:
    """All drift in one stage. traits: what its cases share, '' if nothing; largest: the one closest to its bound."""

    stage: str
    number: int
    traits: str
    largest: Drift


@dataclass(frozen=True)
class Comparison:
    """A run against a baseline; every list in the order of the run's cases, lost cases sorted.

    new_failures: red now, not red in the baseline (or not in it). old_failures: red in both. fixed: red in
    the baseline, pass now. excused: a known failure now, none in the baseline; an expectation covers it.
    coverage_lost: (case, reason) executed in the baseline, not now; losses: the same, gathered. coverage_gained: the
    reverse. other_contract: cases whose ratios are not compared, since other roundings are declared for them.
    drift_groups: drift by stage, the most first. bounds: numbers of tolerances.yaml that differ, the looser
    first, and their effect on ratios, None where none does. speed: accepted speeds beside those of now, if there are
    benchmarks. notes: what else differs and weakens the comparison.
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
    losses: tuple[Loss, ...] = ()
    drift_groups: tuple[DriftGroup, ...] = ()
    bounds: tuple[BoundChange, ...] = ()
    effect: Effect | None = None
    speed: tuple[Speed, ...] = ()
    other_contract: tuple[str, ...] = ()

    @property
    def looser(self) -> tuple[BoundChange, ...]:
        """Numbers that make verdicts milder than those that were accepted."""
        return tuple(change for change in self.bounds if change.looser)


def compare(run: Run, baseline: Baseline) -> Comparison:
    """The run against the baseline.

    Raises UsageValueError, with both values, where implementation name, device class, hardware class or the numerics
    contracts of all cases differ: ratios of different contracts say nothing about each other. Single cases of another
    contract are left out of what compares ratios, and named.
    """
    lines = case_lines(run)
    _refuse_strangers(run, baseline)
    others = _other_contract(run, lines, baseline)
    alike = {case: line for case, line in lines.items() if case not in others}
    red_before = {case for case, entry in baseline.cases.items() if entry.verdict in RED_VERDICTS}
    red_now = [case for case, line in lines.items() if is_red(line)]
    executed_before = {case for case, entry in baseline.cases.items() if entry.executed}
    known_before = {case for case, entry in baseline.cases.items() if entry.verdict is Verdict.KNOWN_FAILURE}
    lost = tuple((case, _why_lost(lines.get(case))) for case in sorted(executed_before)
                 if case not in lines or not is_executed(lines[case]))
    drift = _drift(alike, baseline)
    bounds = bound_changes(baseline.tolerances, run.header.tolerances)
    return Comparison(
        baseline=baseline.label,
        new_failures=tuple(case for case in red_now if case not in red_before),
        old_failures=tuple(case for case in red_now if case in red_before),
        fixed=tuple(case for case, line in lines.items()
                    if case in red_before and line.verdict == Verdict.PASS),
        excused=tuple(case for case, line in lines.items() if line.verdict == Verdict.KNOWN_FAILURE
                      and case in executed_before - known_before),
        drift=drift, coverage_lost=lost, losses=losses(baseline, run.header.lane, dict(lost)),
        coverage_gained=tuple(case for case, line in lines.items()
                              if is_executed(line) and case not in executed_before),
        drift_groups=_drift_groups(drift, [case for case, line in lines.items() if is_executed(line)]),
        bounds=bounds, effect=effect(baseline.cases, alike) if bounds else None,
        notes=(*list(others.values())[:_CONTRACTS], *_notes(run, baseline, bounds)), other_contract=tuple(others))


def _refuse_strangers(run: Run, baseline: Baseline) -> None:
    name, device = run.header.implementation.name, device_class(run.header)
    hardware = run.header.environment.get("hardware", "")
    judged_as = baseline.accepted.get("hardware", "") or hardware
    for what, mine, theirs, remedy in (
            ("implementation", name, baseline.implementation, "give the baseline of the same implementation"),
            ("device class", device, baseline.device, "give the baseline of the same device, or accept one for it"),
            ("hardware class", hardware or judged_as, judged_as, "long sums are judged by other models: see the reason "
             f"that the run gives, {run.header.environment.get('hardware_reason', 'none')!r}, then accept it")):
        if mine != theirs:
            raise UsageValueError(f"{what} {mine!r} of run {run.header.run} cannot be compared with "
                                  f"{theirs!r} of the baseline; {remedy}")


def _other_contract(run: Run, lines: dict[str, CaseLine], baseline: Baseline) -> dict[str, str]:
    """case -> both contracts in words; UsageValueError where that is so of every case that could be compared."""
    common = {case: line for case, line in lines.items()
              if line.numerics and case in baseline.cases and baseline.cases[case].numerics}
    found = {}
    for case, line in common.items():
        before = baseline.cases[case].numerics
        if numerics_digest(line.numerics) != before:
            found[case] = (f"case {case}: numerics contract {line.numerics} of run {run.header.run} cannot be compared "
                           f"with {baseline.numerics.get(before, before)} of the baseline; "
                           "`moe-ref accept RUN` starts from the new contract")
    if found and len(found) == len(common):
        raise UsageValueError(next(iter(found.values())) + f"; so it is of all {len(found)} cases" * (len(found) > 1))
    return found


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


def _drift_groups(drift: Sequence[Drift], ran: Sequence[str]) -> tuple[DriftGroup, ...]:
    groups: dict[str, list[Drift]] = {}
    for one in drift:
        groups.setdefault(one.stage, []).append(one)
    return tuple(DriftGroup(stage, len(members), traits([one.case for one in members], ran), members[0])
                 for stage, members in sorted(groups.items(), key=lambda item: -len(item[1])))


def _has_drifted(before: Number, now: Number) -> bool:
    return ratio_of(now) > max(DRIFT_FLOOR, DRIFT_FACTOR * ratio_of(before))


def _why_lost(line: CaseLine | None) -> str:
    if line is None:
        return "gone: not among the chosen cases"
    return f"{line.verdict}: {one_line(line.reason) or 'no reason recorded'}"


def _notes(run: Run, baseline: Baseline, bounds: Sequence[BoundChange]) -> tuple[str, ...]:
    header = run.header
    now = {"tier": header.tier, "tolerances": header.tolerances_digest, "oracle": header.oracle_version}
    known = bool(baseline.tolerances and header.tolerances)
    meaning = {"tier": "coverage is that of another choice of cases",
               "tolerances": "no number changed, but a reason or a contract" if known
               else "ratios stand against different bounds, so drift may be the bound's",
               "oracle": "ratios stand against another oracle"}
    notes = [f"{what} {baseline.accepted[what]} -> {value}: {meaning[what]}" for what, value in now.items()
             if baseline.accepted.get(what, value) != value and not (what == "tolerances" and bounds)]
    return tuple(notes + [f"bound {'changed' if change.looser is None else 'stricter'}: {change.words}"
                          for change in bounds if not change.looser])
