"""Evidence beside the matrix: what it holds against the implementation or the judge, in head lines and exit code."""

from collections.abc import Sequence

from moe_ref.records.schema import EndLine
from moe_ref.report.compiled import compile_failures
from moe_ref.report.evidence import Evidence
from moe_ref.report.growth import growth_faults
from moe_ref.report.score import complaints
from moe_ref.report.words import one_line, plural

_FAILED, _TOO_FEW = 1, 4
_SAID = 160


def other_failures(evidence: Evidence) -> list[tuple[str, str]]:
    """(what and how many, the first in words) of divergence, score, cross-compile and benchmarks that failed."""
    said = {"divergence": [words for run in evidence.growth for words in growth_faults(run)],
            "mutation score": complaints(evidence.score) if evidence.score else [],
            "cross-compile": [words for run in evidence.compiled for words in compile_failures(run)],
            "benchmark": [f"{line.subject}: {line.status} on {line.model} tp {line.tp}, {line.tokens} tokens"
                          for run in evidence.bench for line in run.timings if line.status in ("WRONG", "CRASHED")
                          and line.subject.partition(":")[0] == evidence.run.header.implementation.name]}
    return [(f"{name}: {plural(len(words), 'failure')}", words[0]) for name, words in said.items() if words]


def cut_short(evidence: Evidence) -> list[str]:
    """Names of runs that have no end line; a score has none, its mutants are counted."""
    ends: dict[str, list[EndLine | None]] = {
        "divergence": [run.end for run in evidence.growth], "benchmark": [run.end for run in evidence.bench],
        "cross-compile": [run.end for run in evidence.compiled]}
    return [name for name, found in ends.items() if None in found]


def with_others(head: Sequence[str], code: int, evidence: Evidence) -> tuple[tuple[str, ...], int]:
    """Head lines and exit code of a report that also answers for what was recorded beside the matrix.

    1 where something failed, 4 where a run was cut short and nothing is worse.
    """
    failed, short = other_failures(evidence), cut_short(evidence)
    if not failed and not short:
        return tuple(head), code
    code = code or (_FAILED if failed else _TOO_FEW)
    words = [name for name, _ in failed] + [f"{name} cut short" for name in short]
    first = head[3]
    if failed:
        said = f"{failed[0][0].partition(':')[0]}: {one_line(failed[0][1], _SAID)}"
        first = f"first {said}" if first == "first nothing failed" else f"{first}; {said}"
    return (f"FAIL  {head[0][6:]}; {', '.join(words)}", *head[1:3], first, *head[4:]), code
