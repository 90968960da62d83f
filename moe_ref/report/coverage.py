"""Coverage: for every value of every axis, how many cases passed, failed, were unsupported or did not run."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from moe_ref.contract.vocabulary import Verdict
from moe_ref.records.schema import CaseLine
from moe_ref.records.store import Run
from moe_ref.report.axes import axis_sort_key, case_axes
from moe_ref.report.facts import is_red


@dataclass(frozen=True)
class Coverage:
    """Cases with one value of one axis; not_run holds harness errors too, known failures count as failed."""

    axis: str
    value: str
    passed: int
    failed: int
    unsupported: int
    not_run: int


def coverage(lines: Iterable[CaseLine]) -> list[Coverage]:
    """One entry per axis value, axes in the order of `case_axes`, values sorted."""
    counts: dict[str, dict[str, Counter[str]]] = {}
    for line in lines:
        for axis, value in case_axes(line.case).items():
            counts.setdefault(axis, {}).setdefault(value, Counter())[_column(line)] += 1
    return [Coverage(axis, value, **{column: values[value][column] for column in _COLUMNS})
            for axis, values in counts.items() for value in sorted(values, key=axis_sort_key)]


_COLUMNS = ("passed", "failed", "unsupported", "not_run")


def axis_pairs_covered(run: Run) -> str:
    """How many pairs of axis values the chosen cases hold, as a sentence."""
    covered, possible = run.header.axis_pairs
    if not possible:
        return "Cases named by hand: no claim on pairs of axis values."
    return f"{covered} of {possible} pairs of axis values are in the chosen cases."


def _column(line: CaseLine) -> str:
    if line.verdict == Verdict.PASS:
        return "passed"
    if is_red(line) or line.verdict == Verdict.KNOWN_FAILURE:
        return "failed"
    return "unsupported" if line.verdict == Verdict.UNSUPPORTED else "not_run"
