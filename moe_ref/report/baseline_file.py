"""A baseline as a file that people review in a diff: what was accepted, worst ratios by class, then every case."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Verdict
from moe_ref.records.schema import Number
from moe_ref.report.axes import axis_sort_key, case_axes
from moe_ref.report.baseline import Baseline, BaselineCase
from moe_ref.report.facts import ratio_of, stage_number

BASELINE_SCHEMA = 3


class _Group(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Cases with the same verdict, numerics, ranks and stages: their ratios, stage by stage."""

    verdict: Verdict
    numerics: str
    ranks: str
    stages: list[str]
    cases: dict[str, list[Number]]


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """tolerances: by all of their path but its last part. classes: for whoever reviews, made of the cases."""

    schema: int
    implementation: str
    device: str
    accepted: dict[str, str]
    numerics: dict[str, dict[str, str]]
    tolerances: dict[str, dict[str, Number]]
    classes: dict[str, dict[str, Number]]
    groups: list[_Group]


def class_name(case: str) -> str:
    """The class of a case in the summary of a baseline, as 'bf16 tp 2'."""
    axes = case_axes(case)
    return f"{axes['dtype']} tp {axes['tp']}" if "dtype" in axes else "other ids"


def worst_by_class(cases: Mapping[str, BaselineCase]) -> dict[str, dict[str, Number]]:
    """Class -> the number of its cases, and of those that pass the worst ratio of every stage, in data order."""
    found: dict[str, dict[str, Number]] = {}
    for case, entry in cases.items():
        row = found.setdefault(class_name(case), {"cases": 0})
        row["cases"] = int(row["cases"]) + 1
        for stage, ratio in entry.stages.items() if entry.verdict is Verdict.PASS else ():
            if stage not in row or ratio_of(ratio) > ratio_of(row[stage]):
                row[stage] = ratio

    def by_parts(name: str) -> list[tuple[int, float, str]]:
        return [axis_sort_key(part) for part in name.split()]

    def by_stage(item: tuple[str, Number]) -> tuple[bool, int, str]:
        return item[0] != "cases", stage_number(item[0]), item[0]
    return {name: dict(sorted(found[name].items(), key=by_stage)) for name in sorted(found, key=by_parts)}


def format_baseline(baseline: Baseline) -> str:
    """The file's text: one line per contract, per part of the tolerances, per class and per case, all sorted."""
    tolerances: dict[str, dict[str, Number]] = {}
    for path, number in sorted(baseline.tolerances.items()):
        part, _, name = path.rpartition(".")
        tolerances.setdefault(part, {})[name] = number
    parts = [f'"schema": {BASELINE_SCHEMA}', f'"implementation": {json.dumps(baseline.implementation)}',
             f'"device": {json.dumps(baseline.device)}', f'"accepted": {_object(baseline.accepted, 2)}',
             f'"numerics": {_object(_sorted(baseline.numerics), 2)}',
             f'"tolerances": {_object(tolerances, 2)}', f'"classes": {_object(worst_by_class(baseline.cases), 2)}',
             '"groups": [\n    ' + ",\n    ".join(_groups(baseline)) + "\n  ]"]
    return "{\n  " + ",\n  ".join(parts) + "\n}\n"


def _sorted(contracts: Mapping[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    return {digest: dict(sorted(contracts[digest].items())) for digest in sorted(contracts)}


def _short(ratio: Number) -> Number:
    """1 in place of 1.0."""
    return int(ratio) if isinstance(ratio, float) and ratio.is_integer() else ratio


def _object(entries: Mapping[str, Any], indent: int) -> str:
    """One line per entry."""
    lines = [f"{' ' * (indent + 2)}{json.dumps(key)}: {json.dumps(entry)}" for key, entry in entries.items()]
    return "{\n" + ",\n".join(lines) + f"\n{' ' * indent}}}" if lines else "{}"


def _groups(baseline: Baseline) -> list[str]:
    found: dict[tuple[str, str, str, tuple[str, ...]], dict[str, list[Number]]] = {}
    for case, entry in sorted(baseline.cases.items()):
        key = (str(entry.verdict), entry.numerics, entry.ranks, tuple(entry.stages))
        found.setdefault(key, {})[case] = [_short(ratio) for ratio in entry.stages.values()]
    return [f'{{"verdict": {json.dumps(verdict)}, "numerics": {json.dumps(numerics)}, "ranks": {json.dumps(ranks)}, '
            f'"stages": {json.dumps(stages)}, "cases": {_object(cases, 4)}}}'
            for (verdict, numerics, ranks, stages), cases in sorted(found.items())]


def read_baseline(path: Path) -> Baseline:
    """The baseline in a file; raises UsageValueError with the file and what is wrong in it."""
    if not path.is_file():
        raise UsageValueError(f"{path}: no such baseline; `moe-ref accept RUN` makes one")
    try:
        plain = msgspec.json.decode(path.read_bytes())
        schema = plain.get("schema") if isinstance(plain, dict) else None
        if schema != BASELINE_SCHEMA:
            raise UsageValueError(f"{path}: baseline schema {schema!r}, but this version reads {BASELINE_SCHEMA}; "
                                  "`moe-ref accept RUN` writes it anew")
        file = msgspec.convert(plain, _File)
        cases = {case: entry for group in file.groups for case, entry in _cases_of(group).items()}
    except (OSError, msgspec.DecodeError, msgspec.ValidationError) as error:
        raise UsageValueError(f"{path}: {error}") from error
    return Baseline(implementation=file.implementation, device=file.device, accepted=file.accepted,
                    numerics=file.numerics, cases=cases, tolerances={
                        f"{part}.{name}" if part else name: number for part, numbers in file.tolerances.items()
                        for name, number in numbers.items()})


def _cases_of(group: _Group) -> dict[str, BaselineCase]:
    """Raises ValidationError where a case has more or fewer ratios than its group has stages."""
    for case, ratios in group.cases.items():
        if len(ratios) != len(group.stages):
            raise msgspec.ValidationError(f"case {case} has {len(ratios)} ratios for {len(group.stages)} stages")
    return {case: BaselineCase(numerics=group.numerics, ranks=group.ranks, verdict=group.verdict,
                               stages=dict(zip(group.stages, ratios, strict=True)))
            for case, ratios in group.cases.items()}
