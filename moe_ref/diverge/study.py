"""One run of `moe-ref diverge`: every subject's curve, its law, what its error is made of, and why others differ."""

import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime

import msgspec
import torch

from moe_ref.contract.errors import UsageError, positive_faults, raise_faults
from moe_ref.diverge.attribution import Finding, attribute
from moe_ref.diverge.bands import AcceptedCurve, band_faults, curve_key, drift, find_band
from moe_ref.diverge.conversion import AS_THEY_ARE
from moe_ref.diverge.grouped import NotRun
from moe_ref.diverge.growth import Growth, growth
from moe_ref.diverge.measure import Point, measure, rms
from moe_ref.diverge.problem import GroupedProblem, GrowthData
from moe_ref.diverge.subjects import Place, Subject, find_subject
from moe_ref.diverge.truth import Bench, joined
from moe_ref.diverge.words import verdict
from moe_ref.records.growth import (
    BandResult,
    DifferenceLine,
    DivergeLine,
    FindingResult,
    GrowthLine,
    GrowthRecordLine,
    PointResult,
)
from moe_ref.records.schema import EndLine, Number, to_number
from moe_ref.tolerances.load import load_tolerances
from moe_ref.tolerances.schema import GrowthBand

EXIT_MISMATCH, EXIT_FEW = 1, 4


@dataclass(frozen=True, kw_only=True)
class GrowthPlan:
    """Subjects by name, the lengths of sums, and what every problem has in common (its length, data and seed vary)."""

    subjects: tuple[str, ...]
    lengths: tuple[int, ...]
    problem: GroupedProblem
    data: tuple[str, ...] = (GrowthData.UNIT, GrowthData.POSITIVE)
    seeds: int = 1
    place: Place = field(default_factory=Place)
    accepted: dict[str, AcceptedCurve] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [data for data in self.data if data not in list(GrowthData)]
        faults = [f"data {data!r}, but should be one of {', '.join(GrowthData)}" for data in unknown]
        faults += positive_faults(seeds=self.seeds)
        faults += [f"tp={self.problem.tp}, but should be at most the shortest length, {self.lengths[0]}"
                   ] * (self.problem.tp > self.lengths[0])
        raise_faults("diverge", faults)


@dataclass
class Curve:
    """One subject's points by data class, its law and finding. failed: why it did not run; crashed: that it broke."""

    subject: Subject
    points: dict[GrowthData, list[Point]] = field(default_factory=dict)
    longest_RN: torch.Tensor | None = None
    stored: str = ""
    failed: str = ""
    crashed: bool = False
    seconds: float = 0.0
    law: Growth | None = None
    finding: Finding | None = None

    @property
    def status(self) -> str:
        """MEASURED, PREDICTED or NOT RUN."""
        return "NOT RUN" if self.failed else "PREDICTED" if self.subject.predicted else "MEASURED"


Tell = Callable[[str], None]
"""Called with what is done next."""


def run_growth(plan: GrowthPlan, environment: dict[str, str], keep: Callable[[GrowthRecordLine], None],
               tell: Tell = lambda doing: None) -> list[Curve]:
    """Run all subjects on all problems and hand every line of the record to `keep`.

    UsageValueError on names, sizes and results that cannot be, before or while a subject runs.
    """
    began, run = time.monotonic(), uuid.uuid4().hex[:12]
    curves = [Curve(find_subject(name, plan.problem.dtype, plan.place)) for name in plan.subjects]
    keep(_header(plan, run, environment))
    longest = _measure_all(plan, curves, tell)
    for curve in curves:
        if not curve.failed:
            curve.law = growth(curve.points.get(GrowthData.UNIT, []), curve.points.get(GrowthData.POSITIVE, []))
        if longest and curve.longest_RN is not None and curve.law:
            tell(f"what the error of {curve.subject.name} is made of")
            curve.finding = attribute(curve.longest_RN, longest, curve.law.growth_class)
    lines = [_growth_line(plan, run, curve) for curve in curves]
    differences = [_difference(run, curves[0], other, longest) for other in curves[1:]
                   if longest and curves[0].finding and other.finding]
    for line in (*lines, *differences):
        keep(line)
    statuses = Counter(line.status for line in lines)
    executed = len(lines) - statuses["NOT RUN"]
    code = EXIT_MISMATCH if any(line.faults for line in lines) else 0 if executed else EXIT_FEW
    keep(EndLine(run=run, finished=_now(), seconds=round(time.monotonic() - began, 3), verdicts=dict(statuses),
                 executed=executed, exit_code=code))
    return curves


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _sizes(plan: GrowthPlan) -> dict[str, Number]:
    problem = plan.problem
    return {"rows": problem.rows, "columns": problem.columns, "experts": problem.experts, "skew": problem.skew,
            "tp": problem.tp, "seed": problem.seed, "seeds": plan.seeds}


def _header(plan: GrowthPlan, run: str, environment: dict[str, str]) -> DivergeLine:
    return DivergeLine(run=run, started=_now(), subjects=list(plan.subjects), lengths=list(plan.lengths),
                       sizes=_sizes(plan), dtype=plan.problem.dtype, data=list(plan.data),
                       device=plan.place.device, hardware=plan.place.hardware, environment=environment,
                       tolerances_digest=load_tolerances().digest)


def _measure_all(plan: GrowthPlan, curves: list[Curve], tell: Tell) -> Bench | None:
    """Points of every curve; returns the first bench of the longest symmetric problem, whose results curves keep."""
    longest = None
    for data in map(GrowthData, plan.data):
        for terms in plan.lengths:
            benches = [Bench(replace(plan.problem, terms=terms, data=data, seed=plan.problem.seed + number))
                       for number in range(plan.seeds)]
            kept = data is GrowthData.UNIT and terms == plan.lengths[-1]
            longest = benches[0] if kept else longest
            for curve in curves:
                if not curve.failed:
                    tell(f"{curve.subject.name}, {data} data, K = {terms}")
                    _measure_one(curve, benches, data, kept)
    return longest


def _measure_one(curve: Curve, benches: list[Bench], data: GrowthData, kept: bool) -> None:
    subject, began = curve.subject, time.monotonic()
    try:
        results = [subject.run(bench.problem, bench.operands) for bench in benches]
    except NotRun as error:
        curve.failed = str(error)
        return
    except UsageError:
        raise
    except Exception as error:  # a subject may raise anything
        curve.failed, curve.crashed = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", True
        return
    curve.seconds += time.monotonic() - began
    stored = results[0][1]
    y_RN = torch.cat([one for one, _ in results])
    if not bool(torch.isfinite(y_RN).all()):
        curve.failed, curve.crashed = f"{int((~torch.isfinite(y_RN)).sum())} outputs are not finite", True
        return
    truth, declared_truth = (joined([bench.truth(conversion) for bench in benches])
                             for conversion in (AS_THEY_ARE, subject.conversion))
    curve.points.setdefault(data, []).append(measure(y_RN, truth, declared_truth, subject.declared, stored))
    curve.stored = stored
    if kept:
        curve.longest_RN = results[0][0]


def _growth_line(plan: GrowthPlan, run: str, curve: Curve) -> GrowthLine:
    subject, law = curve.subject, curve.law
    hardware = plan.place.hardware if subject.predicted else plan.place.measured
    if curve.failed or law is None:
        return GrowthLine(run=run, subject=subject.name, status=curve.status, reason=curve.failed, hardware=hardware,
                          faults=[curve.failed] * curve.crashed)
    band = find_band(subject.name, plan.problem.dtype, hardware) if plan.problem.tp == 1 else None
    worst = max((point.ratio for points in curve.points.values() for point in points), default=0.0)
    faults = [f"the largest error is {worst:.2g} times the bound of what is declared, {subject.declared.words}"
              ] * (worst > 1)
    faults += band_faults(law, band) if band else []
    faults += [curve.finding.words] if curve.finding and curve.finding.is_mistake else []
    accepted = plan.accepted.get(curve_key(subject.name, plan.problem.dtype, hardware))
    if accepted:
        faults += [f"drift: {words}" for words in drift(law, accepted, list(plan.lengths), _sizes(plan))]
    return GrowthLine(
        run=run, subject=subject.name, status=curve.status, reason=subject.note, hardware=hardware,
        declared=subject.declared.words, stored=curve.stored,
        curves={str(data): [_point(point) for point in points] for data, points in curve.points.items()},
        exponent=to_number(law.exponent), positive_exponent=to_number(law.positive_exponent),
        bits=(to_number(law.bits[0]), to_number(law.bits[1])), growth_class=law.growth_class, evidence=law.evidence,
        band=_band(band) if band else None,
        finding=_finding(curve.finding, plan.lengths[-1]) if curve.finding else None, faults=faults,
        seconds=round(curve.seconds, 3))


def _point(point: Point) -> PointResult:
    return msgspec.convert({name: to_number(value) if isinstance(value, float) else value
                            for name, value in asdict(point).items()}, PointResult)


def _band(band: GrowthBand) -> BandResult:
    return BandResult(exponent=(band.exponent.low, band.exponent.high), bits=(band.bits.low, band.bits.high))


def _finding(found: Finding, terms: int) -> FindingResult:
    return FindingResult(terms=terms, causes=[str(cause) for cause in found.causes], relative=to_number(found.relative),
                         words=found.words, evidence=found.evidence, is_mistake=found.is_mistake,
                         sigmas=to_number(found.sigmas), bits=to_number(found.bits), share=to_number(found.share),
                         grid=found.grid)


def _difference(run: str, one: Curve, other: Curve, bench: Bench) -> DifferenceLine:
    assert one.finding is not None
    assert other.finding is not None
    assert one.longest_RN is not None
    assert other.longest_RN is not None
    relative = rms(one.longest_RN - other.longest_RN) / rms(bench.truth().value_RN)
    predicted = frozenset(curve.subject.name for curve in (one, other) if curve.subject.predicted)
    found = verdict(one.subject.name, one.finding, other.subject.name, other.finding, relative, bench.problem.terms,
                    predicted)
    return DifferenceLine(run=run, first=one.subject.name, second=other.subject.name, terms=bench.problem.terms,
                          relative=to_number(relative), answer=found.answer, verdict=found.words)

