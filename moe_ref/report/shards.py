"""Several records of one implementation on one device as one run: shards of a tier, and tiers of a lane."""

from collections import Counter
from collections.abc import Sequence

import msgspec

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import RED_VERDICTS, Verdict
from moe_ref.expectations.stale import stale_entries
from moe_ref.records.schema import CaseLine, EndLine, ExpectationsLine, RunLine
from moe_ref.records.store import Run, TierPart
from moe_ref.report.baseline import device_class
from moe_ref.report.facts import is_executed
from moe_ref.report.losses import LANES_BETWEEN
from moe_ref.report.words import format_ratio
from moe_ref.tiers.tiers import MINIMUM_EXECUTED, tier

NAMED_CASES = "named cases"


def merge_runs(runs: Sequence[Run]) -> Run:
    """One run of all shards of all tiers.

    Raises UsageValueError, with both values, where they differ in implementation (name, version or source digest),
    device class, tolerances or oracle. A case that two of them judge differently becomes red, and says both; one that
    ran in any of them ran. The minimum of executed cases is the sum less the cases that were run twice; axis pairs
    cannot be added up from counts, so the best covered shard stands for its tier.
    """
    if not runs:
        raise UsageValueError("0 runs given, but should be at least 1")
    tiers: dict[str, list[Run]] = {}
    for run in runs:
        tiers.setdefault(tier_name(run), []).append(run)
    if len(runs) == 1:
        return runs[0]
    for run in runs[1:]:
        if differing := strangeness(runs[0], run):
            raise UsageValueError(differing)
    cases, num_twice = _merge_cases(runs)
    parts = tuple(_part(name, members) for name, members in tiers.items()) if len(tiers) > 1 else ()
    header = _header(runs, num_twice, " + ".join(tiers) if parts else runs[0].header.tier)
    stale = [sentence for name, members in tiers.items() for sentence in _stale(name, members)]
    return Run(header, cases, _end(header.run, cases, [run.end for run in runs], stale), tiers=parts,
               suite_of={run.header.run: suite_name(run) for run in runs},
               has_header=all(run.has_header for run in runs))


def tier_name(run: Run) -> str:
    """The tier of a run; cases named by hand go by the folder that they were recorded into."""
    return run.header.tier or (run.path.parent.name if run.path else "") or NAMED_CASES


def suite_name(run: Run) -> str:
    """Tier, and the lane if there is one: what CI servers file its cases under."""
    return tier_name(run) + (f" ({run.header.lane})" if run.header.lane else "")


def strangeness(first: Run, other: Run) -> str:
    """In what two runs differ that shards of one matrix have in common, "" where in nothing.

    A run whose run line was refused tells its implementation alone.
    """
    one, two = first.header, other.header
    facts = [("implementation", _identity(one), _identity(two))]
    if first.has_header and other.has_header:
        facts += [("device class", device_class(one), device_class(two)),
                  ("tolerances digest", one.tolerances_digest, two.tolerances_digest),
                  ("oracle version", one.oracle_version, two.oracle_version)]
    for what, mine, theirs in facts:
        if mine != theirs:
            return (f"runs {one.run} and {two.run}: {what} {mine!r} and {theirs!r}, "
                    "but shards of one matrix should have the same")
    return ""


def _identity(header: RunLine) -> str:
    implementation = header.implementation
    return f"{implementation.name} {implementation.version} digest {implementation.source_digest or 'none'}"


def _merge_cases(runs: Sequence[Run]) -> tuple[dict[str, CaseLine], int]:
    """All cases, and how many lines of executed ones are there a second time."""
    cases: dict[str, CaseLine] = {}
    num_twice = 0
    for run in runs:
        for case, line in run.cases.items():
            known = cases.get(case)
            num_twice += known is not None and is_executed(known) and is_executed(line)
            if known is None or (known.verdict == Verdict.NOT_RUN != line.verdict):
                cases[case] = line
            elif line.verdict not in (known.verdict, Verdict.NOT_RUN):
                cases[case] = _contradiction(known, line)
    return cases, num_twice


def _contradiction(one: CaseLine, two: CaseLine) -> CaseLine:
    """A case of two verdicts: red, with the stages of whichever accuses the implementation."""
    reason = f"records disagree: {_told(one)}, but {_told(two)}"
    base = two if two.verdict in RED_VERDICTS and one.verdict not in RED_VERDICTS else one
    message = "\n".join(filter(None, [reason, base.message if base.verdict in RED_VERDICTS else ""]))
    return msgspec.structs.replace(base, verdict=str(Verdict.NONDETERMINISTIC), reason=reason, message=message)


def _told(line: CaseLine) -> str:
    """A verdict with its run, as 'mismatch (down 41) in run r1 on local, cpu'."""
    stage = next((stage for stage in line.stages if stage.stage == line.first_stage), None)
    ratio = f" ({stage.stage} at {format_ratio(stage.ratio)} of its bound)" if stage else ""
    return f"{line.verdict}{ratio} in run {line.run} on {', '.join(filter(None, (line.ranks, line.device)))}"


def _part(name: str, runs: Sequence[Run]) -> TierPart:
    cases, num_twice = _merge_cases(runs)
    minimum = max(0, sum(run.header.minimum_executed for run in runs) - num_twice)
    return TierPart(name, sum(map(is_executed, cases.values())), minimum, max(run.header.axis_pairs for run in runs))


def _header(runs: Sequence[Run], num_twice: int, tier: str) -> RunLine:
    headers = [run.header for run in runs]
    first = next((run.header for run in runs if run.has_header), headers[0])
    told = [run.header for run in runs if run.has_header] or headers
    environment: dict[str, str] = {}
    for key in sorted({key for header in told for key in header.environment}):
        values = dict.fromkeys(header.environment.get(key, "not recorded") for header in told)
        environment[key] = " | ".join(values)
    environment["device"] = first.environment["device"]
    environment["shards"] = f"{len(headers)} runs merged; axis pairs are those of the best covered one"
    return msgspec.structs.replace(
        first, run="+".join(header.run for header in headers), environment=environment, tier=tier,
        lane=LANES_BETWEEN.join(dict.fromkeys(header.lane for header in headers if header.lane)),
        started=min(header.started for header in headers),
        cases=list(dict.fromkeys(case for header in headers for case in header.cases)),
        minimum_executed=max(0, sum(header.minimum_executed for header in headers) - num_twice),
        axis_pairs=max(header.axis_pairs for header in headers), expectations=_expectations(headers))


def _expectations(headers: Sequence[RunLine]) -> ExpectationsLine | None:
    """Of all files that runs were held against."""
    files = {one.expectations.digest: one.expectations for one in headers if one.expectations}
    entries = [entry for file in files.values() for entry in file.entries]
    return ExpectationsLine(digest="+".join(files), entries=entries) if files else None


def _stale(name: str, shards: Sequence[Run]) -> list[str]:
    """What no shard can tell of its expectations: entries that cover no case that ran in the whole tier."""
    files = [run.header.expectations for run in shards]
    cases, _ = _merge_cases(shards)
    if name not in MINIMUM_EXECUTED or not files[0] or any(file != files[0] for file in files) or not all(
            one.case_id in cases for one in tier(name).cases):
        return []
    return stale_entries([entry.cases for entry in files[0].entries],
                         {case: (line.verdict, line.runs) for case, line in cases.items()})


def _end(run: str, cases: dict[str, CaseLine], ends: list[EndLine | None], stale: list[str]) -> EndLine | None:
    """The end of all shards, counted from their cases; None as soon as one was cut short."""
    found = [end for end in ends if end]
    if len(found) < len(ends):
        return None
    stale = list(dict.fromkeys([sentence for end in found for sentence in end.stale] + stale))
    return EndLine(run=run, finished=max(end.finished for end in found), seconds=sum(end.seconds for end in found),
                   verdicts=dict(Counter(line.verdict for line in cases.values())),
                   executed=sum(map(is_executed, cases.values())), stale=stale,
                   exit_code=max(int(bool(stale)), *(end.exit_code for end in found)))
