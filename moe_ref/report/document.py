"""report.json: the report as data, under keys that stay what they are (listed in docs/reports.md)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

import msgspec

from moe_ref.contract.vocabulary import Verdict
from moe_ref.records.schema import CaseLine, to_number
from moe_ref.records.store import Run
from moe_ref.report.compare import Comparison
from moe_ref.report.facts import (
    case_lines,
    count_executed,
    culprit,
    failures,
    margin_ratio,
    margin_stage,
    nearest_pass,
    ratio_of,
    reasons,
)
from moe_ref.report.words import replay, where

REPORT_SCHEMA = 1
"""Changes when a key changes its meaning or goes; new keys may appear under the same number."""


def document(run: Run, head: Sequence[str], code: int,
             comparison: Comparison | None = None) -> dict[str, object]:
    """The report as plain JSON types; ratios that JSON cannot hold are the words nan and inf."""
    header, cases = run.header, case_lines(run)
    lines = list(cases.values())
    nearest = nearest_pass(lines)
    return msgspec.to_builtins({
        "schema": REPORT_SCHEMA, "verdict": "fail" if code else "pass", "exit_code": code, "head": list(head),
        "implementation": header.implementation, "run": header.run, "started": header.started,
        "tier": header.tier, "environment": header.environment, "tolerances": header.tolerances_digest,
        "oracle": header.oracle_version, "cut_short": run.end is None,
        "seconds": run.end.seconds if run.end else None,
        "chosen": len(lines), "executed": count_executed(lines), "minimum_executed": header.minimum_executed,
        "axis_pairs": header.axis_pairs, "verdicts": Counter(line.verdict for line in lines),
        "unsupported": dict(reasons(lines, Verdict.UNSUPPORTED)),
        "not_run": dict(reasons(lines, Verdict.NOT_RUN)),
        "expectations": header.expectations, "stale": run.end.stale if run.end else [],
        "refused": [{"file": one.path, "line": one.line, "reason": one.reason, "case": one.case, "number": one.number}
                    for one in run.refused],
        "tiers": [{"name": part.name, "executed": part.executed, "minimum_executed": part.minimum_executed,
                   "axis_pairs": part.axis_pairs} for part in run.tiers],
        "failures": [_failure(line, comparison) for line in failures(lines)],
        "closest": _closest(nearest) if nearest else None,
        "comparison": asdict(comparison) if comparison else None,
        "cases": {case: _case(line) for case, line in cases.items()}})


def json_text(data: object) -> str:
    """Data as JSON that people can read, a line for each entry."""
    return msgspec.json.format(msgspec.json.encode(data), indent=1).decode() + "\n"


def _failure(line: CaseLine, comparison: Comparison | None) -> dict[str, object]:
    stage = culprit(line)
    return {"case": line.case, "verdict": line.verdict, "stage": line.first_stage,
            "ratio": to_number(ratio_of(stage.ratio)) if stage else None, "where": where(line),
            "message": line.message, "replay": replay(line),
            "new": line.case in comparison.new_failures if comparison else None}


def _closest(line: CaseLine) -> dict[str, object]:
    stage = margin_stage(line)
    return {"case": line.case, "stage": stage.stage if stage else None,
            "ratio": to_number(margin_ratio(line)), "replay": replay(line)}


def _case(line: CaseLine) -> dict[str, object]:
    return {"verdict": line.verdict, "reason": line.reason,
            "stages": {stage.stage: stage.ratio for stage in line.stages}}
