"""Everything that one report is made of: records of one implementation on one device, and nothing else."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from moe_ref.contract.errors import UsageValueError
from moe_ref.records.bench import BenchRun
from moe_ref.records.compiled import CompiledRun
from moe_ref.records.gather import Gathered
from moe_ref.records.growth import GrowthRun
from moe_ref.records.refused import Refusals, Refused
from moe_ref.records.score import ScoreRun
from moe_ref.records.store import Run
from moe_ref.report.baseline import device_class, slug
from moe_ref.report.history import Past
from moe_ref.report.lanes import LaneRow
from moe_ref.report.shards import merge_runs, strangeness
from moe_ref.report.words import one_line

_NAME_LIMIT = 80
Named = TypeVar("Named")


@dataclass(frozen=True)
class Evidence:
    """run: the matrix, shards merged. growth, bench, score, compiled: runs of `moe-ref diverge`, `bench`, `score` and
    `compile`. lanes: those of ci/lanes.yaml, where the report answers for them. history: runs of
    `moe-ref history add`, of any implementation.
    """

    run: Run
    growth: tuple[GrowthRun, ...] = ()
    bench: tuple[BenchRun, ...] = ()
    score: ScoreRun | None = None
    compiled: tuple[CompiledRun, ...] = ()
    lanes: tuple[LaneRow, ...] = ()
    history: Past | None = None

    @property
    def name(self) -> str:
        """IMPLEMENTATION-DEVICE as the name of a folder."""
        return slug(f"{self.run.header.implementation.name}-{device_class(self.run.header)}")[:_NAME_LIMIT]


def build_evidence(gathered: Gathered, lanes: tuple[LaneRow, ...] = (),
                   history: Past | None = None) -> list[Evidence]:
    """One for each implementation and device, in the order of their first runs.

    Runs of one implementation and device that are of other sources, tolerances or another oracle are not merged: those
    have a report of their own, and are told as refused in both. Growth, bench and compile runs go to the
    implementations that they name, where they name one, and else to all; the score is of the judge, so to all. Raises
    UsageValueError where nothing was verified.
    """
    if not gathered.runs:
        raise UsageValueError(_nothing(gathered))
    groups, apart = _groups(gathered.runs)
    refused = gathered.refused + apart
    merged = [merge_runs(group) for group in groups]
    paths = [{Refusals(run.path).path for run in group if run.path} for group in groups]
    of_groups = set().union(*paths)
    for run, mine in zip(merged, paths, strict=True):
        run.refused = [one for one in refused if one.path in mine or one.path not in of_groups]
    names = {run.header.implementation.name for run in merged}
    score = max(gathered.score, key=lambda run: run.header.started, default=None)
    def subjects(one: GrowthRun | BenchRun) -> Sequence[str]:
        return one.header.subjects

    return [Evidence(run, score=score, lanes=lanes, history=history,
                     growth=_naming(gathered.growth, subjects, run, names),
                     bench=_naming(gathered.bench, subjects, run, names),
                     compiled=_naming(gathered.compiled, lambda one: [one.header.implementation], run, names))
            for run in merged]


def _groups(runs: Sequence[Run]) -> tuple[list[list[Run]], list[Refused]]:
    """Runs that can be merged, and a word on each file apart from others of its implementation and device."""
    groups: list[list[Run]] = []
    apart: list[Refused] = []
    # Those without a run line last: they say less of what they belong to.
    for run in sorted(runs, key=lambda run: not run.has_header):
        related = [group for group in groups if _is_related(group[0], run)]
        found = next((group for group in related if not strangeness(group[0], run)), None)
        if found:
            found.append(run)
            continue
        groups.append([run])
        if related:
            refusals = Refusals(run.path or Path("records"))
            refusals.refuse(None, f"not merged: {strangeness(related[0][0], run)}")
            apart += refusals.all()
    return groups, apart


def _is_related(first: Run, other: Run) -> bool:
    """Same implementation and device; a run whose run line was refused tells no more than cpu or cuda."""
    if first.header.implementation.name != other.header.implementation.name:
        return False
    mine, theirs = device_class(first.header), device_class(other.header)
    return mine == theirs or (not other.has_header and (mine == "cpu") == (theirs == "cpu"))


def _naming(found: Iterable[Named], subjects: Callable[[Named], Sequence[str]], run: Run,
            names: set[str]) -> tuple[Named, ...]:
    """Those with a subject of the run's implementation, as moe_fast:bf16 is, or of none of the implementations."""
    def named(one: Named) -> set[str]:
        return {subject.partition(":")[0] for subject in subjects(one)} & names

    return tuple(one for one in found if not named(one) or run.header.implementation.name in named(one))


def _nothing(gathered: Gathered) -> str:
    found = [f"{len(runs)} of {kind}" for kind, runs in gathered.found.items() if runs]
    reasons = [f"{one_line(one.place)}: {one_line(one.reason)}" for one in gathered.refused[:5]]
    return "; ".join(["no run of `moe-ref verify` in these records", f"found: {', '.join(found) or 'nothing'}",
                      *reasons])


def unique_names(evidences: Sequence[Evidence]) -> list[str]:
    """A name for each, with a number where two have the same."""
    names: list[str] = []
    for evidence in evidences:
        name, number = evidence.name or "unnamed", 2
        while name in names:
            name, number = f"{evidence.name}-{number}", number + 1
        names.append(name)
    return names
