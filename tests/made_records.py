"""Runs built by hand from the record schema, so that every word of a report can be traced to a field."""

from collections import Counter
from pathlib import Path

import msgspec

from moe_ref.records.schema import CaseLine, EndLine, Implementation, RunLine, StageResult, Worst
from moe_ref.records.store import RecordWriter, Run
from moe_ref.report.facts import is_executed, is_red

SUBJECT = Implementation(name="moe_fast", version="0.4.1", source_digest="3f2c1ab99")
SIZES = "v1-T33.H96.I160.E8.K2-bf16"
PLAIN, TP2, TP4, EMPTY_TP4 = SIZES, SIZES + "-tp2", SIZES + "-tp4", SIZES + "-empty-tp4"
BF16 = {"accumulate": "fp32", "down": "bf16"}


def stage(name: str, ratio: float | str) -> StageResult:
    """A stage result that fails in expert 5 on rank 1 where its ratio is above 1."""
    bad = float(ratio) > 1
    worst = Worst(rank=1, token=7, slot=0, expert=5, column=70, got=-0.1406, want=0.4375, allowed=0.0141)
    if not bad:
        return StageResult(stage=name, ratio=ratio, num_checked=64, num_bad=0, worst=worst, num_tiles=2)
    return StageResult(stage=name, ratio=ratio, bound_ratio=ratio, num_checked=64, num_bad=3, worst=worst, num_tiles=2,
                       num_bad_tokens=2, bad_tokens=[7, 8], bad_experts=[5], bad_ranks=[1], bad_tiles=[1])


def passing(case: str, act: float | str = 0.25, down: float | str = 0.5) -> CaseLine:
    return CaseLine(run="r1", case=case, purpose="", implementation=SUBJECT, ranks="local", device="cpu",
                    verdict="pass", stages=[stage("act", act), stage("down", down)], numerics=BF16,
                    replay=f"moe-ref replay {case} --impl moe_fast")


def failing(case: str, ratio: float | str = 41.0) -> CaseLine:
    return msgspec.structs.replace(passing(case), verdict="mismatch", first_stage="down",
                                   stages=[stage("act", 0.25), stage("down", ratio)],
                                   message="down: 41x over bound, expert 5\n  repro   moe-ref replay")


def idle(case: str, verdict: str, reason: str) -> CaseLine:
    return msgspec.structs.replace(passing(case), verdict=verdict, reason=reason, stages=[])


def make_run(*lines: CaseLine, chosen: list[str] | None = None, minimum: int = 1, ended: bool = True,
             tier: str = "smoke", run: str = "r1", **environment: str) -> Run:
    environment = {"device": "cpu", "torch": "2.13.0", "commit": "a91d1234567", **environment}
    header = RunLine(run=run, started="2026-11-20T10:00:00+00:00", implementation=SUBJECT, tier=tier,
                     cases=chosen if chosen is not None else [line.case for line in lines],
                     minimum_executed=minimum, axis_pairs=(40, 64), environment=environment,
                     tolerances_digest="77aa", oracle_version="0.1.0")
    cases = {line.case: line if line.run == run else msgspec.structs.replace(line, run=run) for line in lines}
    return Run(header, cases, end_of(run, cases) if ended else None)


def end_of(run: str, cases: dict[str, CaseLine]) -> EndLine:
    """The end line that these cases mean, but for the minimum."""
    verdicts = Counter(line.verdict for line in cases.values())
    return EndLine(run=run, finished="", seconds=14.2, verdicts=dict(verdicts),
                   executed=sum(map(is_executed, cases.values())), exit_code=int(any(map(is_red, cases.values()))))


def write(run: Run, folder: Path) -> Path:
    with RecordWriter(folder) as writer:
        for line in (run.header, *run.cases.values(), *([run.end] if run.end else [])):
            writer.append(line)
    return folder
