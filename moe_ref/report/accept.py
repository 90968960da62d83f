"""Accepting a run on purpose: what would change, in words and as a diff of the baseline's file."""

import difflib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import RED_VERDICTS
from moe_ref.records.bench import BenchRun
from moe_ref.records.store import Run
from moe_ref.report.baseline import Baseline, baseline_of
from moe_ref.report.baseline_file import BASELINE_SCHEMA, class_name, format_baseline, read_baseline
from moe_ref.report.bench import NO_EVIDENCE
from moe_ref.report.bounds import bound_changes
from moe_ref.report.facts import case_lines, count_executed, ratio_of
from moe_ref.report.speed import compare_speed
from moe_ref.report.speed_baseline import format_speed, read_speed, speed_baseline_of
from moe_ref.report.words import format_ratio, one_line, plural

_SHOWN = 20


@dataclass(frozen=True)
class Acceptance:
    """words: what changes, a line each; diff: of the file, "" where nothing does; text: the whole new file."""

    path: Path
    words: tuple[str, ...]
    diff: str
    text: str

    def write(self) -> None:
        """Make it the baseline."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(self.text)


def accept_run(run: Run, path: Path) -> Acceptance:
    """What becomes of the baseline at `path` when a run is accepted; writes nothing.

    Raises UsageValueError for a run that was cut short or executed too few cases (its gaps would become the norm), and
    where the file belongs to another implementation or device.
    """
    executed = count_executed(case_lines(run).values())
    if run.end is None:
        raise UsageValueError(f"run {run.header.run} was cut short: no end line after {executed} executed "
                              "cases; only a finished run can become the baseline")
    if executed < (minimum := max(run.header.minimum_executed, 1)):
        raise UsageValueError(f"run {run.header.run} executed {executed} cases, but should have executed "
                              f"at least {minimum} to become the baseline")
    new = baseline_of(run)
    if not path.exists():
        words = [f"new baseline: {plural(len(new.cases), 'case')}", *_red_words(new)]
    elif (schema := _schema(path)) is not None and schema < BASELINE_SCHEMA:
        words = [f"baseline of schema {schema} written anew with {BASELINE_SCHEMA}: {plural(len(new.cases), 'case')}",
                 *_red_words(new)]
    else:
        old = read_baseline(path)
        _require_same(path, (old.implementation, old.device), (new.implementation, new.device))
        words = _changes(old, new)
    return _acceptance(path, words, format_baseline(new))


def accept_bench(run: BenchRun, path: Path) -> Acceptance:
    """The same of a benchmark; raises UsageValueError where it was cut short or timed nothing beside torch."""
    if run.end is None:
        raise UsageValueError(f"benchmark {run.header.run} was cut short: no end line; only a finished one can be "
                              "accepted")
    new = speed_baseline_of(run)
    if not new.entries:
        raise UsageValueError(f"benchmark {run.header.run}: 0 right times beside torch's, but should have at least 1; "
                              "time it with `--against torch:loop,torch:grouped`")
    words = [plural(len(new.entries), "accepted speed"), *[NO_EVIDENCE] * (not new.evidence)]
    if path.exists():
        old = read_speed(path)
        _require_same(path, (old.implementation, old.device), (new.implementation, new.device))
        keys = [{entry.key for entry in baseline.entries} for baseline in (new, old)]
        words.append(f"{len(keys[0] - keys[1])} new, {len(keys[1] - keys[0])} gone")
        if old.accepted.get("hardware") == new.accepted.get("hardware"):
            found = compare_speed(run, old)
            words += [change.words for change in (*found.slower, *found.faster)]
        words += _key_changes(old.accepted, new.accepted)
    return _acceptance(path, words, format_speed(new))


def _acceptance(path: Path, words: Sequence[str], after: str) -> Acceptance:
    before = path.read_text() if path.exists() else ""
    diff = difflib.unified_diff(before.splitlines(keepends=True), after.splitlines(keepends=True),
                                f"{path.name} (before)", f"{path.name} (accepted)", n=1)
    return Acceptance(path, tuple(words), "".join(diff), after)


def _schema(path: Path) -> int | None:
    try:
        plain = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    schema = plain.get("schema") if isinstance(plain, dict) else None
    return schema if isinstance(schema, int) else None


def _require_same(path: Path, old: tuple[str, str], new: tuple[str, str]) -> None:
    if old != new:
        raise UsageValueError(f"{path} belongs to {' on '.join(old)}, but the run is of {' on '.join(new)}")


def _changes(old: Baseline, new: Baseline) -> list[str]:
    """Versions, bounds, cases, verdicts, contracts, then ratios by class."""
    both = [case for case in new.cases if case in old.cases]
    fresh, gone = new.cases.keys() - old.cases.keys(), old.cases.keys() - new.cases.keys()
    words = _key_changes(old.accepted, new.accepted)
    bounds = bound_changes(old.tolerances, new.tolerances)
    words += [f"bound {'LOOSER' if one.looser else 'changed' if one.looser is None else 'stricter'}: {one.words}"
              for one in bounds[:_SHOWN]]
    words += [f"bounds: {len(bounds) - _SHOWN} more changed"] * (len(bounds) > _SHOWN)
    words.append(f"cases: {len(new.cases)} accepted, {len(fresh)} new, {len(gone)} gone"
                 + (f", such as {one_line(min(gone))}" if gone else ""))
    verdicts = Counter(f"{old.cases[case].verdict} -> {new.cases[case].verdict}" for case in both
                       if old.cases[case].verdict is not new.cases[case].verdict)
    words += [f"verdicts: {number} {change}" for change, number in verdicts.most_common()]
    contracts = sum(old.cases[case].numerics != new.cases[case].numerics for case in both)
    words += [f"contracts: {plural(contracts, 'case')} under another numerics contract"] * bool(contracts)
    return words + _red_words(new) + _ratio_words(old, new, both)


def _key_changes(old: dict[str, str], new: dict[str, str]) -> list[str]:
    return [f"{key}: {one_line(old.get(key, '')) or 'not recorded'} -> {one_line(new.get(key, '')) or 'not recorded'}"
            for key in sorted(old.keys() | new.keys())
            if key not in ("run", "started") and old.get(key, "") != new.get(key, "")]


def _red_words(new: Baseline) -> list[str]:
    red = sum(entry.verdict in RED_VERDICTS for entry in new.cases.values())
    return [f"failures: {red} are accepted as failures; they are reported as old, and still fail"] * bool(red)


def _ratio_words(old: Baseline, new: Baseline, cases: Sequence[str]) -> list[str]:
    """Of each class how many ratios rose and fell, and the one that rose to the most."""
    moved: dict[str, list[tuple[float, float, str]]] = {}
    for case in cases:
        before = old.cases[case].stages
        for stage, ratio in new.cases[case].stages.items():
            if stage in before and before[stage] != ratio:
                moved.setdefault(class_name(case), []).append((ratio_of(ratio), ratio_of(before[stage]), stage))
    words = []
    for name, ratios in sorted(moved.items()):
        rose = [one for one in ratios if one[0] > one[1]]
        largest = (f", the largest {one_line(max(rose)[2], 40)} {format_ratio(max(rose)[1])} -> "
                   f"{format_ratio(max(rose)[0])}") if rose else ""
        words.append(f"ratios of {name}: {len(rose)} rose, {len(ratios) - len(rose)} fell{largest}")
    return words
