"""Coverage: for every value of every axis, how many cases passed, failed, were unsupported or did not run."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from moe_ref.contract.vocabulary import Verdict
from moe_ref.records.schema import CaseLine
from moe_ref.records.store import Run
from moe_ref.report.axes import axis_sort_key, case_axes
from moe_ref.report.facts import is_red
from moe_ref.report.words import one_line


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
    # Whole dicts at a time: a hundred thousand cases have two million axis values.
    met: Counter[tuple[str, str]] = Counter()
    counts: dict[str, Counter[tuple[str, str]]] = {column: Counter() for column in _COLUMNS}
    for line in lines:
        axes = case_axes(line.case).items()
        met.update(axes)
        counts[_column(line)].update(axes)
    values: dict[str, list[str]] = {}
    for axis, value in met:
        values.setdefault(axis, []).append(value)
    return [Coverage(axis, value, **{column: counts[column][axis, value] for column in _COLUMNS})
            for axis, found in values.items() for value in sorted(found, key=axis_sort_key)]


_COLUMNS = ("passed", "failed", "unsupported", "not_run")


def axis_pairs_covered(run: Run) -> str:
    """How many pairs of axis values the chosen cases hold, as a sentence."""
    if run.tiers:
        return " ".join(f"{one_line(part.name, 40)}: {_pairs(part.axis_pairs)}" for part in run.tiers)
    return _pairs(run.header.axis_pairs)


def _pairs(axis_pairs: tuple[int, int]) -> str:
    covered, possible = axis_pairs
    if not possible:
        return "Cases named by hand: no claim on pairs of axis values."
    return f"{covered} of {possible} pairs of axis values are in the chosen cases."


def _column(line: CaseLine) -> str:
    if line.verdict == Verdict.PASS:
        return "passed"
    if is_red(line) or line.verdict == Verdict.KNOWN_FAILURE:
        return "failed"
    return "unsupported" if line.verdict == Verdict.UNSUPPORTED else "not_run"
