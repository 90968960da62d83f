"""A recorded run of `moe-ref bench` as tables, words and one JSON document."""

import json
import math
from collections.abc import Iterator

import msgspec

from moe_ref.records.bench import BenchRun, PartResult, TimingLine
from moe_ref.records.schema import Number, from_number, to_number
from moe_ref.report.tables import NamedTable

NO_EVIDENCE = "NO EVIDENCE: times of a CPU"
_SHOWN_KERNELS = 5


def bench_document(run: BenchRun) -> dict[str, object]:
    """Keys: evidence, run, limits, timings (as recorded, with tflop_per_s, gb_per_s, of_limit, ratio to the first
    subject), end. Numbers as in records: "nan" where a limit is missing.
    """
    timings = [json.loads(msgspec.json.encode(line)) | _derived(run, line) for line in run.timings]
    return {"evidence": run.header.evidence, "run": _plain(run.header),
            "limits": [_plain(line) for line in run.limits.values()], "timings": timings, "end": _plain(run.end)}


def _plain(line: msgspec.Struct | None) -> object:
    return json.loads(msgspec.json.encode(line))


def _derived(run: BenchRun, line: TimingLine) -> dict[str, object]:
    if line.status != "TIMED":
        return {}
    first = first_seconds(run, line)
    return {"tflop_per_s": to_number(_rate(line.flop, median(line)) / 1e12),
            "gb_per_s": to_number(_rate(line.num_bytes, median(line)) / 1e9),
            "of_limit": to_number(of_limit(run, line.flop, line.num_bytes, median(line))),
            "times_the_first": None if first is None else to_number(_rate(median(line), first))}


def _rate(amount: Number, seconds: float) -> float:
    """Amount per second; NaN where the clock saw no time pass."""
    return from_number(amount) / seconds if seconds else math.nan


def median(line: TimingLine) -> float:
    """Median seconds."""
    return from_number(line.seconds[0])


def of_limit(run: BenchRun, flop: Number, num_bytes: Number, seconds: float) -> float:
    """Least time at the limits of the run over the time taken; NaN where a limit is missing.

    The least is that of the slower of operations and bytes: the roofline, doi 10.1145/1498765.1498785.
    """
    if not {"copy", "product"} <= run.limits.keys():
        return math.nan
    product, copy = (from_number(run.limits[name].per_s) for name in ("product", "copy"))
    return _rate(max(_rate(flop, product), _rate(num_bytes, copy)), seconds)


def first_subject(run: BenchRun) -> str:
    """Whom the others are compared with."""
    return next(iter(run.header.subjects), "nobody")


def first_seconds(run: BenchRun, line: TimingLine) -> float | None:
    """The median of the run's first subject on the same shape, None where it was not timed."""
    for other in run.timings:
        if (other.subject == first_subject(run) and other.status == "TIMED" and _shape(other) == _shape(line)):
            return median(other)
    return None


def _shape(line: TimingLine) -> tuple[str, int, int, str]:
    return line.model, line.tp, line.tokens, line.operation


def groups(run: BenchRun) -> Iterator[tuple[str, int, str, list[TimingLine]]]:
    """(model, tp, operation, lines) in the order of the run."""
    found: dict[tuple[str, int, str], list[TimingLine]] = {}
    for line in run.timings:
        if line.tokens:
            found.setdefault((line.model, line.tp, line.operation), []).append(line)
    for (model, tp, operation), lines in found.items():
        yield model, tp, operation, lines


def _marked(run: BenchRun, title: str) -> str:
    return title if run.header.evidence else f"{NO_EVIDENCE}. {title}"


def limit_table(run: BenchRun) -> NamedTable:
    """What the device reached in this run."""
    rows = []
    for line in run.limits.values():
        rate = from_number(line.per_s)
        words = f"{rate / 1e9:.4g} GB" if line.name == "copy" else f"{rate / 1e12:.4g} TFLOP"
        low, high = (_time(from_number(one)) for one in line.seconds[1:])
        rows.append([line.name, words, _time(from_number(line.seconds[0])), f"{low} .. {high}", str(line.repetitions),
                     line.words])
    title = _marked(run, f"limits of {run.header.environment.get('device', run.header.device)}")
    numbers = ("per second", "median", "quartiles", "repetitions")
    return NamedTable(title, ["limit", *numbers, "of"], rows, right=numbers)


def timing_tables(run: BenchRun) -> Iterator[NamedTable]:
    """A table per model, degree and operation: times, rates, share of the limit, ratio to the first subject."""
    labels = dict[int, list[str]]()
    for tokens, label in run.header.labels:
        labels.setdefault(tokens, []).append(label)
    numbers = ("median", "quartiles", "TFLOP/s", "GB/s", "of limit", f"time / {first_subject(run)}'s",
               "error / allowed")
    columns = ("tokens", *["stands for"] * bool(labels), "subject", *numbers[:2], "as", *numbers[2:])
    for model, tp, operation, lines in groups(run):
        rows = [(str(line.tokens), *["; ".join(labels.get(line.tokens, []))] * bool(labels), line.subject,
                 *_cells(run, line)) for line in lines]
        yield NamedTable(_marked(run, f"{model}, tp {tp}, {operation}, {run.header.dtype}, one rank"), columns, rows,
                         right=("tokens", *numbers))


def _cells(run: BenchRun, line: TimingLine) -> tuple[str, ...]:
    if line.status != "TIMED":
        return line.status, "", "", "", "", "", "", _short(line.ratio)
    seconds, first = median(line), first_seconds(run, line)
    low, high = (_time(from_number(one)) for one in line.seconds[1:])
    return (_time(seconds), f"{low} .. {high}", line.mode, f"{_rate(line.flop, seconds) / 1e12:.3g}",
            f"{_rate(line.num_bytes, seconds) / 1e9:.4g}",
            f"{of_limit(run, line.flop, line.num_bytes, seconds):.1%}",
            "-" if first is None else f"{_rate(seconds, first):.2f}", _short(line.ratio))


def _short(value: Number) -> str:
    number = from_number(value)
    return "-" if math.isnan(number) else f"{number:.2g}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.3f} ms"


def part_tables(run: BenchRun) -> Iterator[NamedTable]:
    """Per model, degree and operation the parts of the forward pass beside each other, at the most tokens timed."""
    kind = "kernels" if run.header.device == "cuda" else "operators"
    numbers = ("time", "TFLOP/s", "GB/s", "of limit")
    for model, tp, operation, lines in groups(run):
        tokens = max((line.tokens for line in lines if line.parts), default=0)
        shown = [(part, line.subject) for line in lines if line.tokens == tokens for part in line.parts]
        if not shown:
            continue
        title = f"{model}, tp {tp}, {operation}, {tokens} tokens: parts, the sum of their {kind}, started by the host"
        rows = [(name, subject, *_part_cells(run, part)) for name in dict.fromkeys(part.name for part, _ in shown)
                for part, subject in shown if part.name == name]
        yield NamedTable(_marked(run, title), ["part", "subject", *numbers], rows, right=numbers)


def _part_cells(run: BenchRun, part: PartResult) -> tuple[str, ...]:
    seconds, flop, num_bytes = (from_number(one) for one in (part.seconds, part.flop, part.num_bytes))
    if not flop or not seconds:
        return _time(seconds), "", "", ""
    return (_time(seconds), f"{flop / seconds / 1e12:.3g}", f"{num_bytes / seconds / 1e9:.4g}",
            f"{of_limit(run, flop, num_bytes, seconds):.1%}")


def kernel_tables(run: BenchRun) -> Iterator[NamedTable]:
    """Per model, degree and operation the longest kernels of every timed subject, at its largest number of tokens."""
    kind = "kernel" if run.header.device == "cuda" else "operator"
    for model, tp, operation, lines in groups(run):
        last = {line.subject: line for line in lines if line.status == "TIMED" and line.kernels}
        rows = []
        for line in last.values():
            total = sum(from_number(one.seconds) for one in line.kernels)
            for one in line.kernels[:_SHOWN_KERNELS]:
                seconds = from_number(one.seconds)
                rows.append((str(line.tokens), line.subject, one.part, one.name[:60], f"{from_number(one.starts):g}",
                             _time(seconds), f"{seconds / total:.0%}" if total else "-"))
        if rows:
            title = f"{model}, tp {tp}, {operation}: the longest {kind}s, started by the host"
            yield NamedTable(_marked(run, title), ["tokens", "subject", "part", kind, "starts", "time", "share"], rows,
                             right=("tokens", "starts", "time", "share"))


def bench_words(run: BenchRun) -> list[str]:
    """Below the tables: what was not run, wrong, crashed or not profiled and why, and the count of everything."""
    reasons: dict[tuple[str, str, str], int] = {}
    for line in run.timings:
        if line.reason:
            key = (line.status, line.subject, line.reason)
            reasons[key] = reasons.get(key, 0) + 1
    words = [f"{status} {subject}{f' ({count} times)' * (count > 1)}: {reason}"
             for (status, subject, reason), count in reasons.items()]
    if run.end is None:
        return [*words, "cut short: the record has no end line"]
    counts = ", ".join(f"{count} {status}" for status, count in run.end.verdicts.items()) or "nothing"
    verdict = "FAIL" if run.end.exit_code else "PASS"
    mark = "" if run.header.evidence else f"; {NO_EVIDENCE}"
    return [*words, f"{verdict}  {counts}, in {run.end.seconds:.1f} s{mark}"]
