"""Several record folders of one matrix (`verify --shard i/n`) as one run."""

from collections import Counter
from collections.abc import Sequence

import msgspec

from moe_ref.contract.errors import UsageValueError
from moe_ref.records.schema import EndLine, RunLine
from moe_ref.records.store import Run
from moe_ref.report.baseline import device_class
from moe_ref.report.facts import is_executed


def merge_runs(runs: Sequence[Run]) -> Run:
    """One run of all shards.

    Raises UsageValueError, with both values, where shards differ in implementation (name, version or
    source digest), device class, tier, tolerances or oracle, or judge one case differently. The minimum of
    executed cases is the sum over shards less the cases that were run twice; axis pairs cannot be added up
    from counts, so the best covered shard stands for all.
    """
    if not runs:
        raise UsageValueError("0 runs given, but should be at least 1")
    if len(runs) == 1:
        return runs[0]
    first = runs[0]
    for run in runs[1:]:
        _refuse_strangers(first.header, run.header)
    merged, num_twice = Run(first.header), 0
    for run in runs:
        for case, line in run.cases.items():
            known = merged.cases.get(case)
            if known and known.verdict != line.verdict:
                raise UsageValueError(f"case {case}: {known.verdict} in run {known.run}, but {line.verdict} "
                                      f"in run {line.run}; shards may share a case only with one verdict")
            num_twice += known is not None and is_executed(line)
            merged.cases.setdefault(case, line)
    merged.header = _header([run.header for run in runs], num_twice)
    merged.end = _end(merged.header.run, [run.end for run in runs])
    return merged


def _refuse_strangers(first: RunLine, other: RunLine) -> None:
    for what, mine, theirs in (
            ("implementation", _identity(first), _identity(other)),
            ("device class", device_class(first), device_class(other)),
            ("tier", first.tier, other.tier),
            ("tolerances digest", first.tolerances_digest, other.tolerances_digest),
            ("oracle version", first.oracle_version, other.oracle_version)):
        if mine != theirs:
            raise UsageValueError(f"runs {first.run} and {other.run}: {what} {mine!r} and {theirs!r}, "
                                  "but shards of one matrix should have the same")


def _identity(header: RunLine) -> str:
    implementation = header.implementation
    return f"{implementation.name} {implementation.version} digest {implementation.source_digest or 'none'}"


def _header(headers: list[RunLine], num_twice: int) -> RunLine:
    environment: dict[str, str] = {}
    for key in sorted({key for header in headers for key in header.environment}):
        values = dict.fromkeys(header.environment.get(key, "not recorded") for header in headers)
        environment[key] = " | ".join(values)
    environment["device"] = headers[0].environment["device"]
    environment["shards"] = f"{len(headers)} runs merged; axis pairs are those of the best covered one"
    return msgspec.structs.replace(
        headers[0], run="+".join(header.run for header in headers), environment=environment,
        started=min(header.started for header in headers),
        cases=list(dict.fromkeys(case for header in headers for case in header.cases)),
        minimum_executed=max(0, sum(header.minimum_executed for header in headers) - num_twice),
        axis_pairs=max(header.axis_pairs for header in headers))


def _end(run: str, ends: list[EndLine | None]) -> EndLine | None:
    """The end of all shards; None as soon as one was cut short."""
    found = [end for end in ends if end]
    if len(found) < len(ends):
        return None
    verdicts: Counter[str] = Counter()
    for end in found:
        verdicts.update(end.verdicts)
    return EndLine(run=run, finished=max(end.finished for end in found),
                   seconds=sum(end.seconds for end in found), verdicts=dict(verdicts),
                   executed=sum(end.executed for end in found), exit_code=max(end.exit_code for end in found))
