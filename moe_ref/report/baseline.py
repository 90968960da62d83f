"""The accepted result of an implementation on a device: a small file that people review in a diff."""

import difflib
import hashlib
import json
import re
from pathlib import Path

import msgspec

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import EXECUTED_VERDICTS, Verdict
from moe_ref.records.schema import CaseLine, Number, RunLine, from_number, to_number
from moe_ref.records.store import Run
from moe_ref.report.facts import case_lines, count_executed

BASELINE_SCHEMA = 2
BASELINE_FOLDER = Path("ci/baselines")


class BaselineCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One case: digest of its numerics contract ('' if it was not judged), worst ratio per stage, verdict."""

    numerics: str = ""
    stages: dict[str, Number] = {}
    verdict: Verdict

    @property
    def executed(self) -> bool:
        """Whether the case really ran when it was accepted."""
        return self.verdict in EXECUTED_VERDICTS


class Baseline(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A baseline file. numerics: digest -> contract; accepted: which run it came from, when, which tier."""

    schema: int = BASELINE_SCHEMA
    implementation: str
    device: str
    accepted: dict[str, str]
    numerics: dict[str, dict[str, str]]
    cases: dict[str, BaselineCase]

    @property
    def label(self) -> str:
        """Version, commit and date of the accepted run, as '0.1.0@a91d123 (2026-11-20)'."""
        commit = self.accepted.get("commit", "")[:7]
        version = self.accepted.get("version", "unknown version") + (f"@{commit}" if commit else "")
        return f"{version} ({self.accepted.get('started', 'unknown date')[:10]})"


def slug(text: str) -> str:
    """Text as part of a file name: lower case letters, digits and dots, single hyphens between."""
    return re.sub(r"[^a-z0-9_.]+", "-", text.lower()).strip("-.")


def device_class(header: RunLine) -> str:
    """'cpu', or the GPU model as a slug: without a count in front ("2x "), for any CPU the same word.

    Raises UsageValueError if the run line names no device.
    """
    device = header.environment.get("device", "")
    name = slug(re.sub(r"^\s*\d+\s*x\s+", "", device))
    if not name:
        raise UsageValueError(f"run {header.run}: environment device {device!r}, "
                              "but should name cpu or a GPU model")
    return "cpu" if re.match(r"cpu\b", name) else name


def numerics_digest(contract: dict[str, str]) -> str:
    """Eight hex digits of a numerics contract; '' for an empty one (the case never got as far as numbers)."""
    text = json.dumps(contract, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8] if contract else ""


def round_ratio(value: Number) -> Number:
    """Two significant digits: what a reviewer reads, and steadier than the last bits of a maximum."""
    number = from_number(value)
    return float(f"{number:.2g}") if isinstance(to_number(number), float) else to_number(number)


def baseline_of(run: Run) -> Baseline:
    """The baseline that a run would become; reads records, writes nothing."""
    header, lines = run.header, case_lines(run)
    accepted = {"commit": header.environment.get("commit", ""), "oracle": header.oracle_version,
                "run": header.run, "started": header.started, "tier": header.tier,
                "tolerances": header.tolerances_digest, "version": header.implementation.version}
    numerics = {numerics_digest(line.numerics): line.numerics for line in lines.values() if line.numerics}
    return Baseline(implementation=header.implementation.name, device=device_class(header), accepted=accepted,
                    numerics=numerics, cases={case: _baseline_case(line) for case, line in lines.items()})


def _baseline_case(line: CaseLine) -> BaselineCase:
    return BaselineCase(numerics=numerics_digest(line.numerics), verdict=Verdict(line.verdict),
                        stages={stage.stage: round_ratio(stage.ratio) for stage in line.stages})


def baseline_path(run: Run, folder: Path = BASELINE_FOLDER) -> Path:
    """FOLDER/<implementation>-<device>.json."""
    return folder / f"{slug(run.header.implementation.name)}-{device_class(run.header)}.json"


def format_baseline(baseline: Baseline) -> str:
    """The file's text: head first, then one line per case (and per contract), keys sorted."""
    def block(entries: dict[str, dict[str, object]]) -> str:
        lines = [f"    {json.dumps(key)}: {json.dumps(entry, sort_keys=True)}"
                 for key, entry in sorted(entries.items())]
        return "{\n" + ",\n".join(lines) + "\n  }" if lines else "{}"

    plain = msgspec.to_builtins(baseline)
    cases = {case: {key: value for key, value in entry.items() if value}
             for case, entry in plain["cases"].items()}
    parts = [f'"schema": {baseline.schema}', f'"implementation": {json.dumps(baseline.implementation)}',
             f'"device": {json.dumps(baseline.device)}',
             '"accepted": ' + json.dumps(baseline.accepted, sort_keys=True, indent=2).replace("\n", "\n  "),
             f'"numerics": {block(plain["numerics"])}', f'"cases": {block(cases)}']
    return "{\n  " + ",\n  ".join(parts) + "\n}\n"


def read_baseline(path: Path) -> Baseline:
    """The baseline in a file; raises UsageValueError with the file and what is wrong in it."""
    if not path.is_file():
        raise UsageValueError(f"{path}: no such baseline; `moe-ref accept RUN` makes one")
    try:
        plain = json.loads(path.read_text())
        schema = plain.get("schema") if isinstance(plain, dict) else None
        if schema != BASELINE_SCHEMA:
            raise UsageValueError(f"{path}: baseline schema {schema!r}, "
                                  f"but this version reads {BASELINE_SCHEMA}")
        return msgspec.convert(plain, Baseline)
    except (json.JSONDecodeError, msgspec.ValidationError) as error:
        raise UsageValueError(f"{path}: {error}") from error


def write_baseline(run: Run, path: Path) -> str:
    """Make a run the baseline and return the unified diff of the file, '' if nothing changed.

    Raises UsageValueError for a run that was cut short or executed too few cases (its gaps would become
    the norm), and where the file belongs to another implementation or device.
    """
    executed = count_executed(case_lines(run).values())
    if run.end is None:
        raise UsageValueError(f"run {run.header.run} was cut short: no end line after {executed} executed "
                              "cases; only a finished run can become the baseline")
    if executed < (minimum := max(run.header.minimum_executed, 1)):
        raise UsageValueError(f"run {run.header.run} executed {executed} cases, but should have executed "
                              f"at least {minimum} to become the baseline")
    new, before = baseline_of(run), ""
    if path.exists():
        old, before = read_baseline(path), path.read_text()
        if (old.implementation, old.device) != (new.implementation, new.device):
            raise UsageValueError(f"{path} belongs to {old.implementation} on {old.device}, "
                                  f"but the run is of {new.implementation} on {new.device}")
    after = format_baseline(new)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(after)
    return "".join(difflib.unified_diff(before.splitlines(keepends=True), after.splitlines(keepends=True),
                                        f"{path.name} (before)", f"{path.name} (accepted)", n=1))
