"""A recorded run of `moe-ref diverge` as terminal tables, verdicts in words, and one JSON document."""

import json
import math

import msgspec
from rich.table import Table

from moe_ref.records.growth import GrowthLine, GrowthRun, PointResult
from moe_ref.records.schema import Number, from_number

_DRAWN_DATA = "unit"


def growth_document(run: GrowthRun) -> dict[str, object]:
    """Keys: run (problem, subjects, place), subjects (one per name, as recorded), differences, end."""
    return {"run": _plain(run.header), "subjects": [_plain(line) for line in run.subjects.values()],
            "differences": [_plain(line) for line in run.differences], "end": _plain(run.end)}


def _plain(line: msgspec.Struct | None) -> object:
    return json.loads(msgspec.json.encode(line))


def error_table(run: GrowthRun, data: str = _DRAWN_DATA) -> Table:
    """Relative error (rms) of every subject at every length; "<": hidden by its 16-bit store, at most so large."""
    header = run.header
    table = Table(title=f"relative error, {data} data, {header.dtype} operands, {header.sizes['rows']} x "
                        f"{header.sizes['columns']} outputs, tp {header.sizes['tp']}", title_justify="left")
    table.add_column("subject", no_wrap=True)
    table.add_column("")
    for length in header.lengths:
        table.add_column(f"K={length}", justify="right", no_wrap=True)
    for line in run.subjects.values():
        points = {point.terms: point for point in line.curves.get(data, [])}
        table.add_row(line.subject, line.status, *(_error(points.get(length)) for length in header.lengths))
    return table


def _error(point: PointResult | None) -> str:
    if point is None:
        return "-"
    return f"{'' if point.resolved else '<'}{from_number(point.relative):.1e}"


def law_table(run: GrowthRun) -> Table:
    """Exponents, effective bits, class, and how the longest symmetric sum compares with what is declared."""
    title = "growth over K >= 1024; z, flips (found / expected) and share at the longest sum; largest error / bound"
    table = Table("subject", "", "exponent", "positive", "bits", "class", "rms z", "error / bound", "flips",
                  "signed share", title=title, title_justify="left")
    for line in run.subjects.values():
        point = line.curves.get(_DRAWN_DATA, [None])[-1]  # type: ignore[list-item]
        bits = "..".join(_short(one, 1) for one in dict.fromkeys(line.bits))
        worst = max((from_number(one.ratio) for points in line.curves.values() for one in points), default=math.nan)
        flips = f"{point.flips} / {from_number(point.flips_expected):.1f}" if point and line.stored != "fp32" else "-"
        table.add_row(line.subject, line.status, _short(line.exponent, 2), _short(line.positive_exponent, 2), bits,
                      line.growth_class or line.reason, _short(point.z, 2) if point else "-", f"{worst:.2g}", flips,
                      f"{from_number(point.share):+.2f}" if point else "-")
    return table


def _short(value: Number, digits: int) -> str:
    number = from_number(value)
    return f"{number:.{digits}f}" if math.isfinite(number) else "-"


def growth_words(run: GrowthRun) -> list[str]:
    """Below the tables: what is predicted or not run and why, evidence of every class, verdicts, faults."""
    lines = run.subjects.values()
    words = [f"{line.status} {line.subject}: {line.reason}" for line in lines if line.status != "MEASURED"]
    words += [f"{line.subject} is {line.growth_class}: {line.evidence}." for line in lines if line.evidence]
    words += [f"\n{line.verdict}" for line in run.differences]
    words += [f"FAULT {line.subject}: {fault}" for line in lines for fault in line.faults]
    return [*words, "\n" + _end(run)]


def _end(run: GrowthRun) -> str:
    if run.end is None:
        return "cut short: the record has no end line"
    lines: list[GrowthLine] = list(run.subjects.values())
    faulty, banded = sum(bool(line.faults) for line in lines), sum(line.band is not None for line in lines)
    counts = ", ".join(f"{count} {status}" for status, count in run.end.verdicts.items())
    return (f"{'FAIL' if run.end.exit_code else 'PASS'}  {counts}; {banded} held against a band, {faulty} with faults, "
            f"in {run.end.seconds:.1f} s")
