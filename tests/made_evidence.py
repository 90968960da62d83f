"""Runs of diverge, bench, score and compile built by hand, so that every word of a section can be traced to a field."""

from pathlib import Path

import msgspec

from moe_ref.records.bench import BenchLine, BenchRun, LimitLine, PartResult, TimingLine
from moe_ref.records.compiled import CombinationLine, CompiledRun, CompileLine
from moe_ref.records.growth import BandResult, DifferenceLine, DivergeLine, GrowthLine, GrowthRun, PointResult
from moe_ref.records.schema import EndLine
from moe_ref.records.score import MutantOutcome, RightOutcome, ScoreLine, ScoreRun
from moe_ref.records.store import RecordWriter

ENVIRONMENT = {"device": "cpu", "triton": "3.7.1", "commit": "a91d1234567"}


def write_lines(folder: Path, *lines: msgspec.Struct) -> Path:
    with RecordWriter(folder) as writer:
        for line in lines:
            writer.append(line)
    return folder


def end(exit_code: int = 0, **verdicts: int) -> EndLine:
    return EndLine(run="r1", finished="", seconds=2.5, verdicts=verdicts, executed=1, exit_code=exit_code)


def combination(key: str, *, faults: list[str] | None = None, worse: list[str] | None = None,
                is_accepted: bool = True) -> CombinationLine:
    architecture, kernel = key.split()[:2]
    return CombinationLine(run="r1", key=key, architecture=architecture, kernel=kernel, registers=100, spill_bytes=0,
                           shared_bytes=4096, dots=["bf16"], matrix=["HGMMA.64x32x16.F32"], seconds=0.5,
                           faults=faults or [], worse=worse or [], is_accepted=is_accepted)


def compiled_run(*lines: CombinationLine, missing: list[str] | None = None, table: str = "table.json",
                 planned: int | None = None, ended: bool = True) -> CompiledRun:
    header = CompileLine(run="r1", started="2026-11-20T10:00:00+00:00", implementation="moe_fast",
                         architectures=["sm_80", "sm_90"], scope="gate",
                         num_combinations=len(lines) if planned is None else planned, triton="3.7", table=table,
                         missing=missing or [], environment=ENVIRONMENT)
    return CompiledRun(header, {line.key: line for line in lines}, end() if ended else None)


def point(terms: int, relative: float | str, *, resolved: bool = True) -> PointResult:
    return PointResult(terms=terms, relative=relative, bits=24.5, resolved=resolved, ratio=0.25, z=0.5, share=-0.1,
                       flips=3, flips_expected=2.5, one_bit=2.0, predicted=1e-7, spread=0.1)


def growth_line(subject: str, status: str = "MEASURED", **fields: object) -> GrowthLine:
    curves = {"unit": [point(1024, 1e-7), point(2048, 1.4e-7, resolved=False)]}
    known: dict[str, object] = {"curves": curves, "exponent": 0.5, "positive_exponent": 0.4, "bits": (24.5, 24.0),
                                "growth_class": "nearest", "stored": "fp32",
                                "band": BandResult(exponent=(0.2, 0.8), bits=(23.0, 26.0))}
    return GrowthLine(run="r1", subject=subject, status=status, **(known | fields))  # pyrefly: ignore


def growth_run(*lines: GrowthLine, differences: list[DifferenceLine] | None = None, exit_code: int = 0) -> GrowthRun:
    header = DivergeLine(run="r1", started="2026-11-20T10:00:00+00:00", subjects=[line.subject for line in lines],
                         lengths=[1024, 2048], dtype="fp32", data=["unit"], device="cpu", hardware="sm90",
                         sizes={"rows": 16, "columns": 16, "experts": 4, "skew": 1, "tp": 1, "seed": 0, "seeds": 1},
                         environment=ENVIRONMENT, tolerances_digest="77aa")
    return GrowthRun(header, {line.subject: line for line in lines}, differences or [],
                     end(exit_code, MEASURED=len(lines)))


def timing(subject: str, tokens: int, seconds: float, status: str = "TIMED", reason: str = "") -> TimingLine:
    return TimingLine(run="r1", subject=subject, model="mixtral.8x7b", tp=8, tokens=tokens, operation="layer",
                      status=status, reason=reason, rows=2 * tokens, visited=8, flop=1e9 * tokens, num_bytes=1e8,
                      mode="graph", seconds=(seconds, seconds, seconds) if status == "TIMED" else ("nan",) * 3,
                      repetitions=5, ratio=0.3, parts=[PartResult(name="gate_up", seconds=seconds / 2)])


def bench_run(*lines: TimingLine, evidence: bool = True) -> BenchRun:
    header = BenchLine(run="r1", started="2026-11-20T10:00:00+00:00",
                       subjects=list(dict.fromkeys(line.subject for line in lines)), models=["mixtral.8x7b"], tp=[8],
                       tokens=sorted({line.tokens for line in lines}), operations=["layer"], dtype="bf16", seed=0,
                       preset="default", labels=[], device="cuda" if evidence else "cpu", evidence=evidence,
                       environment=ENVIRONMENT, tolerances_digest="77aa")
    limits = [LimitLine(run="r1", name=name, per_s=per_s, words="", seconds=(1e-3, 1e-3, 1e-3), repetitions=5)
              for name, per_s in (("copy", 3e12), ("product", 8e14))]
    return BenchRun(header, {line.name: line for line in limits}, list(lines), end(TIMED=len(lines)))


def score_run(*lines: MutantOutcome | RightOutcome) -> ScoreRun:
    run = ScoreRun(ScoreLine(started="2026-11-20T10:00:00+00:00", digest="77aa", tiers=["quick"], device="cpu",
                             classes={"A": "routing", "B": "sums"}, entries={"A01": "a", "B01": "b"}, unseeded={}))
    for line in lines:
        run.add(line)
    return run
