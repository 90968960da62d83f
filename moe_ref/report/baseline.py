"""The accepted result of an implementation on a device: what a run becomes when it is accepted."""

import hashlib
import json
import re
from pathlib import Path

import msgspec

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import EXECUTED_VERDICTS, Verdict
from moe_ref.records.bench import BenchLine
from moe_ref.records.schema import CaseLine, Number, RunLine, from_number, to_number
from moe_ref.records.store import Run
from moe_ref.report.facts import case_lines, is_executed

BASELINE_FOLDER = Path("ci/baselines")


class BaselineCase(msgspec.Struct, frozen=True, kw_only=True):
    """One case that ran: digest of its numerics contract ('' if it was not judged), ranks, worst ratio per stage."""

    numerics: str = ""
    ranks: str = ""
    stages: dict[str, Number] = {}
    verdict: Verdict

    @property
    def executed(self) -> bool:
        """Whether the case really ran when it was accepted."""
        return self.verdict in EXECUTED_VERDICTS


class Baseline(msgspec.Struct, frozen=True, kw_only=True):
    """An accepted run.

    numerics: digest -> contract. accepted: which run it came from, when, which tier, lanes and hardware class.
    tolerances: the numbers it was judged with, {} where its record is older than they are in records.
    """

    implementation: str
    device: str
    accepted: dict[str, str]
    numerics: dict[str, dict[str, str]]
    tolerances: dict[str, Number] = {}
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


def device_class(header: RunLine | BenchLine) -> str:
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
    """The baseline that a run would become: of the cases that ran; reads records, writes nothing."""
    header = run.header
    lines = {case: line for case, line in case_lines(run).items() if is_executed(line)}
    accepted = {"commit": header.environment.get("commit", ""), "hardware": header.environment.get("hardware", ""),
                "lane": header.lane, "oracle": header.oracle_version, "run": header.run, "started": header.started,
                "tier": header.tier, "tolerances": header.tolerances_digest, "version": header.implementation.version}
    numerics = {numerics_digest(line.numerics): line.numerics for line in lines.values() if line.numerics}
    return Baseline(implementation=header.implementation.name, device=device_class(header), accepted=accepted,
                    numerics=numerics, tolerances=header.tolerances,
                    cases={case: _baseline_case(line) for case, line in lines.items()})


def _baseline_case(line: CaseLine) -> BaselineCase:
    return BaselineCase(numerics=numerics_digest(line.numerics), verdict=Verdict(line.verdict), ranks=line.ranks,
                        stages={stage.stage: round_ratio(stage.ratio) for stage in line.stages})


def baseline_path(run: Run, folder: Path = BASELINE_FOLDER) -> Path:
    """FOLDER/<implementation>-<device>.json."""
    return folder / f"{slug(run.header.implementation.name)}-{device_class(run.header)}.json"
