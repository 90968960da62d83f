"""A recorded run of `moe-ref diverge` as tables, verdicts in words, and one JSON document."""

import json
import math

import msgspec

from moe_ref.records.growth import BandResult, GrowthLine, GrowthRun, PointResult
from moe_ref.records.schema import Number, from_number
from moe_ref.report.tables import NamedTable

_DRAWN_DATA = "unit"


def growth_document(run: GrowthRun) -> dict[str, object]:
    """Keys: run (problem, subjects, place), subjects (one per name, as recorded), differences, end."""
    return {"run": _plain(run.header), "subjects": [_plain(line) for line in run.subjects.values()],
            "differences": [_plain(line) for line in run.differences], "end": _plain(run.end)}


def _plain(line: msgspec.Struct | None) -> object:
    return json.loads(msgspec.json.encode(line))


def error_table(run: GrowthRun, data: str = _DRAWN_DATA) -> NamedTable:
    """Relative error (rms) of every subject at every length; "<": hidden by its 16-bit store, at most so large."""
    header, sizes = run.header, {name: f"{from_number(size):g}" for name, size in run.header.sizes.items()}
    outputs, ranks = " x ".join(sizes.get(name, "?") for name in ("rows", "columns")), sizes.get("tp", "?")
    lengths = [f"K={length}" for length in header.lengths]
    rows = []
    for line in run.subjects.values():
        points = {point.terms: point for point in line.curves.get(data, [])}
        rows.append([line.subject, line.status, *(_error(points.get(length)) for length in header.lengths)])
    return NamedTable(f"relative error, {data} data, {header.dtype} operands, {outputs} outputs, tp "
                      f"{ranks}", ["subject", "status", *lengths], rows, right=lengths)


def _error(point: PointResult | None) -> str:
    if point is None:
        return "-"
    return f"{'' if point.resolved else '<'}{from_number(point.relative):.1e}"


_LAW_NUMBERS = ("exponent", "positive", "bits", "band", "error / bound", "rms z", "flips", "signed share")


def law_table(run: GrowthRun) -> NamedTable:
    """Exponents, effective bits, class, the band, and how the longest symmetric sum compares with what is declared."""
    rows = []
    for line in run.subjects.values():
        points = line.curves.get(_DRAWN_DATA)
        point = points[-1] if points else None
        bits = "..".join(_short(one, 1) for one in dict.fromkeys(line.bits))
        worst = max((from_number(one.ratio) for several in line.curves.values() for one in several), default=math.nan)
        flips = f"{point.flips} / {from_number(point.flips_expected):.1f}" if point and line.stored != "fp32" else "-"
        rows.append([line.subject, line.status, str(len(line.faults) or "-"), line.growth_class or line.reason,
                     _short(line.exponent, 2), _short(line.positive_exponent, 2), bits, _band(line.band),
                     f"{worst:.2g}", _short(point.z, 2) if point else "-", flips,
                     f"{from_number(point.share):+.2f}" if point else "-"])
    title = ("growth over K >= 1024; band: its exponent, its bits; largest error / bound; z, flips (found / expected), "
             "share at the longest sum")
    return NamedTable(title, ["subject", "status", "faults", "class", *_LAW_NUMBERS], rows,
                      right=("faults", *_LAW_NUMBERS))


def _band(band: BandResult | None) -> str:
    if band is None:
        return "-"
    return "; ".join(f"{from_number(low):g}..{from_number(high):g}" for low, high in (band.exponent, band.bits))


def _short(value: Number, digits: int) -> str:
    number = from_number(value)
    return f"{number:.{digits}f}" if math.isfinite(number) else "-"


_QUESTION = "Is it a bug? "
_ANSWERS = {"no": "no", "yes": "YES", "loss": "no, but a loss"}


def difference_table(run: GrowthRun) -> NamedTable:
    """How far every other subject is from the first, whether that is a bug, and why."""
    rows = [[line.first, line.second, f"{from_number(line.relative):.2g}", str(line.terms),
             _ANSWERS.get(line.answer, line.answer), line.verdict.rpartition(_QUESTION)[2]] for line in run.differences]
    return NamedTable("differences, rms of the result at the longest sum",
                      ["subject", "and", "differ by", "K", "a bug?", "why"], rows, right=("differ by", "K"))


def growth_faults(run: GrowthRun) -> list[str]:
    """What makes the run fail, by subject."""
    return [f"{line.subject}: {fault}" for line in run.subjects.values() for fault in line.faults]


def growth_reasons(run: GrowthRun) -> list[str]:
    """What is predicted or not run and why, and the evidence of every class."""
    lines = run.subjects.values()
    words = [f"{line.status} {line.subject}: {line.reason}" for line in lines if line.status != "MEASURED"]
    return words + [f"{line.subject} is {line.growth_class}: {line.evidence}." for line in lines if line.evidence]


def growth_words(run: GrowthRun) -> list[str]:
    """Below the tables: reasons, verdicts, faults, and the count of everything."""
    return [*growth_reasons(run), *(f"\n{line.verdict}" for line in run.differences),
            *(f"FAULT {words}" for words in growth_faults(run)), "\n" + growth_end(run)]


def growth_end(run: GrowthRun) -> str:
    """Verdict and counts in one line."""
    if run.end is None:
        return "cut short: the record has no end line"
    lines: list[GrowthLine] = list(run.subjects.values())
    faulty, banded = sum(bool(line.faults) for line in lines), sum(line.band is not None for line in lines)
    counts = ", ".join(f"{count} {status}" for status, count in run.end.verdicts.items())
    return (f"{'FAIL' if run.end.exit_code else 'PASS'}  {counts}; {banded} held against a band, {faulty} with faults, "
            f"in {run.end.seconds:.1f} s")
