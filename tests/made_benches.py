"""Benchmarks built by hand from the record schema."""

from moe_ref.records.bench import BenchLine, BenchRun, LimitLine, TimingLine
from moe_ref.records.schema import EndLine

H100 = {"device": "NVIDIA H100 80GB HBM3", "hardware": "sm90", "torch": "2.11.0"}


def timing(subject: str, microseconds: float, tokens: int = 256, spread: float = 0.02, **others: object) -> TimingLine:
    """A right and timed line of mixtral.8x7b at tp 8; spread: of the quartiles around the median."""
    seconds = microseconds * 1e-6
    fields: dict = {"status": "TIMED", "mode": "graph", "flop": 1e12 * seconds, "num_bytes": 1e9 * seconds,
                    "seconds": (seconds, seconds * (1 - spread), seconds * (1 + spread)), **others}
    return TimingLine(run="b1", subject=subject, model="mixtral.8x7b", tp=8, tokens=tokens, operation="experts",
                      **fields)


def make_bench(*timings: TimingLine, evidence: bool = True, ended: bool = True, dtype: str = "bf16",
               **environment: str) -> BenchRun:
    subjects = list(dict.fromkeys(line.subject for line in timings))
    header = BenchLine(run="b1", started="2026-11-20T10:00:00+00:00", subjects=subjects, models=["mixtral.8x7b"],
                       tp=[8], tokens=sorted({line.tokens for line in timings}), operations=["experts"], dtype=dtype,
                       seed=0, preset="", labels=[], device="cuda" if evidence else "cpu", evidence=evidence,
                       environment=H100 | environment, tolerances_digest="77aa")
    limits = {name: LimitLine(run="b1", name=name, per_s=per_s, words="", seconds=(1.0, 1.0, 1.0), repetitions=5)
              for name, per_s in (("copy", 2e12), ("product", 2e12))}
    end = EndLine(run="b1", finished="", seconds=1.0, verdicts={}, executed=len(timings), exit_code=0)
    return BenchRun(header, limits, list(timings), end if ended else None)
