"""A scoring run: every mutant against the cases that should kill it, every right variant against the pinned ones."""

import hashlib
import math
import queue
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import takewhile
from pathlib import Path

from msgspec.structs import replace

from moe_ref.contract.case_id import parse_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import EXECUTED_VERDICTS, RED_VERDICTS, Ranks, Verdict
from moe_ref.records.score import MutantOutcome, Outcome, RightOutcome, ScoreLine, ScoreRun
from moe_ref.score.choose import DEFAULT_TIERS, carriers, planned_cases, right_cases
from moe_ref.score.lanes import Lane, lanes
from moe_ref.score.load import Catalogue
from moe_ref.score.messages import CaseToTry, Job, Trial
from moe_ref.score.schema import Mutant, Right
from moe_ref.score.seed import package_root, seed
from moe_ref.tiers.tiers import PlannedCase

_ASKED_OF_RIGHT = 5
"""Outputs of each right variant that other projects' criteria judge: of a CPU, where no case is too large for them."""


@dataclass(frozen=True, kw_only=True)
class ScorePlan:
    """What to score and how; only: patterns of ids, all where there are none; full: every case of the tiers.

    gpu_only: of the mutants those that no CPU can run. deadline: seconds after which no further subject is begun.
    """

    catalogue: Catalogue
    only: tuple[str, ...] = ()
    gpu_only: bool = False
    deadline: float = math.inf
    full: bool = False
    device: str = "cpu"
    lanes: int = 2
    seconds: float = 120.0
    tiers: tuple[str, ...] = DEFAULT_TIERS

    def chosen(self, one: Mutant | Right) -> bool:
        """Whether a subject is asked for."""
        if self.gpu_only and isinstance(one, Mutant) and one.runs_on != "gpu":
            return False
        return not self.only or any(fnmatchcase(one.id, pattern) for pattern in self.only)

    @cached_property
    def cases(self) -> dict[str, PlannedCase]:
        """Of the tiers, by id."""
        return planned_cases(self.tiers)

    @property
    def size(self) -> int:
        """How many subjects are asked for."""
        return sum(self.chosen(one) for one in (*self.catalogue.mutants, *self.catalogue.right))

    def first_carrier(self, one: Mutant | Right) -> str:
        """The case that a subject meets first."""
        cases = carriers(one, self.cases) if isinstance(one, Mutant) else right_cases(one, self.cases)
        return cases[0].case if cases else "CASE"


def checked(plan: ScorePlan) -> ScorePlan:
    """The plan; raises UsageValueError where its patterns name nothing."""
    names = [one.id for one in (*plan.catalogue.mutants, *plan.catalogue.right)]
    if not plan.size:
        raise UsageValueError(f"no mutant or right variant is called {', '.join(plan.only)}; "
                              f"{len(names)} are known, from {min(names)} to {max(names)}")
    return plan


def new_score_header(plan: ScorePlan) -> ScoreLine:
    """The first line of a new record."""
    return ScoreLine(started=datetime.now(UTC).isoformat(timespec="seconds"), digest=_digest(plan),
                     tiers=list(plan.tiers), device=plan.device,
                     classes={one.letter: one.title for one in plan.catalogue.classes},
                     entries={one.id: one.name for one in plan.catalogue.entries},
                     unseeded={one.id: one.unseeded for one in plan.catalogue.entries if one.unseeded})


def _digest(plan: ScorePlan) -> str:
    """Over the catalogue, the judge and every package that is patched."""
    subjects = [*plan.catalogue.mutants, *plan.catalogue.right]
    roots = {package_root(patch.file)[0] for one in subjects for patch in one.patches}
    judge = Path(__file__).resolve().parents[1]
    hasher = hashlib.sha256()
    for root, pattern in [(plan.catalogue.folder, "*.yaml"), *((root, "*.py") for root in sorted({*roots, judge}))]:
        for file in sorted(root.rglob(pattern)):
            hasher.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return hasher.hexdigest()[:16]


def run_score(plan: ScorePlan, done: ScoreRun, keep: Callable[[Outcome], None]) -> int:
    """Try all subjects that `done` lacks; each outcome goes to `keep` before the next is begun on its lane.

    Returns how many the deadline left out.
    """
    mutants = [one for one in plan.catalogue.mutants if plan.chosen(one) and one.id not in done.mutants]
    rights = [one for one in plan.catalogue.right if plan.chosen(one) and one.id not in done.right]
    waiting: queue.SimpleQueue[Lane] = queue.SimpleQueue()
    references, began, num_left = References(plan), time.monotonic(), 0

    def work(one: Mutant | Right) -> Outcome | None:
        if time.monotonic() - began > plan.deadline:
            return None
        lane = waiting.get()
        try:
            return _mutant(one, plan, lane, references) if isinstance(one, Mutant) else _right(one, plan, lane)
        finally:
            waiting.put(lane)

    with lanes(plan.lanes) as started:
        for lane in started:
            waiting.put(lane)
        with ThreadPoolExecutor(plan.lanes) as threads:
            # Right variants meet the most cases, so that no lane is left with one; beside a deadline they come last.
            order = (*mutants, *rights) if plan.gpu_only else (*rights, *mutants)
            futures = [threads.submit(work, one) for one in order]
            try:
                for future in as_completed(futures):
                    outcome = future.result()
                    if outcome is None:
                        num_left += 1
                    else:
                        keep(outcome)
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                for lane in started:
                    lane.close()
                raise
    return num_left


class References:
    """Bits of right subjects on cases without a trigger, made once each."""

    def __init__(self, plan: ScorePlan) -> None:
        self._plan, self._lock, self._bits = plan, threading.Lock(), dict[tuple[str, str], Trial]()

    def of(self, subject: str, one: CaseToTry, lane: Lane) -> Trial:
        """The right subject's trial of the case."""
        key = (subject, one.case)
        with self._lock:
            found = self._bits.get(key)
        if found is None:
            job = Job(subject=subject, folder="", cases=[one], stop=False, device=self._plan.device)
            trials, failed = lane.run(job)
            found = trials[0] if trials else Trial(case=one.case, verdict=str(Verdict.CRASH), message=failed)
            with self._lock:
                self._bits[key] = found
        return found


def _mutant(mutant: Mutant, plan: ScorePlan, lane: Lane, references: References) -> MutantOutcome:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="moe-ref-") as folder:
        try:
            seed(mutant.patches, Path(folder))
            silent = _case(mutant.silent_on, plan) if mutant.silent_on else None
            cases = carriers(mutant, plan.cases, plan.full)
        except UsageValueError as error:
            return MutantOutcome(id=mutant.id, outcome="broken", reason=str(error))
        if mutant.equivalent:
            return MutantOutcome(id=mutant.id, outcome="equivalent", reason=mutant.equivalent)
        if mutant.runs_on == "gpu" and plan.device == "cpu":
            return MutantOutcome(id=mutant.id, outcome="not_runnable", reason="needs a GPU; its patches apply")
        leading = [silent] if silent else []
        trials, failed, left = list[Trial](), "", [*leading, *cases]
        while left and not failed and not any(one.verdict in RED_VERDICTS for one in trials[len(leading):]):
            job = Job(subject=mutant.subject, folder=folder, cases=alike(left, plan.device), stop=True,
                      unstopped=max(0, len(leading) - len(trials)), seconds=plan.seconds, device=plan.device,
                      criteria=int(plan.device == "cpu"))
            found, failed = lane.run(job)
            trials, left = trials + found, left[len(found):]
    if failed:
        return MutantOutcome(id=mutant.id, outcome="broken", reason=failed)
    same = None
    if silent:
        right = references.of(mutant.subject, silent, lane)
        if right.verdict != Verdict.PASS:
            return MutantOutcome(id=mutant.id, outcome="broken", silent=False,
                                 reason=f"the right subject says {right.verdict} on {silent.case}: {right.message}")
        same = bool(trials) and trials[0].bits == right.bits
    return _judged(mutant, trials[len(leading):], same, round(time.monotonic() - began, 1))


def alike(cases: list[CaseToTry], device: str) -> list[CaseToTry]:
    """The first ones for one process: on CUDA, which is not forked, process ranks and virtual ranks want two."""
    if device == "cpu":
        return cases
    return list(takewhile(lambda one: (one.ranks == Ranks.LOCAL) == (cases[0].ranks == Ranks.LOCAL), cases))


def _judged(mutant: Mutant, tried: list[Trial], same: bool | None, seconds: float) -> MutantOutcome:
    caught = next((one for one in tried if one.verdict in RED_VERDICTS), None)
    executed = sum(one.verdict in EXECUTED_VERDICTS for one in tried)
    outcome = MutantOutcome(id=mutant.id, outcome="missed", tried=executed, silent=same, seconds=seconds)
    if caught:
        return replace(outcome, outcome="caught", case=caught.case, said=caught.said, message=caught.message,
                       owned=caught.said in mutant.owner or caught.verdict in mutant.owner, refused=caught.refused)
    if failed := next((one for one in tried if one.verdict == Verdict.HARNESS_ERROR), None):
        return replace(outcome, outcome="broken", reason=failed.message)
    return outcome if executed else replace(outcome, reason="no case executed: " + "; ".join(
        sorted({one.message.partition("\n")[0] for one in tried})))


def _case(name: str, plan: ScorePlan) -> CaseToTry:
    """A case by id, of the tiers or of the same grammar."""
    parse_case(name)
    planned = plan.cases.get(name)
    return CaseToTry(name, str(planned.ranks if planned else Ranks.LOCAL))


def _right(right: Right, plan: ScorePlan, lane: Lane) -> RightOutcome:
    began, trials, why = time.monotonic(), list[Trial](), ""
    with tempfile.TemporaryDirectory(prefix="moe-ref-") as folder:
        try:
            seed(right.patches, Path(folder))
        except UsageValueError as error:
            return RightOutcome(id=right.id, executed=0, passed=0, not_run=0, unsupported=0, reason=str(error))
        left = right_cases(right, plan.cases)
        while left and not why:
            job = Job(subject=right.subject, folder=folder if right.patches else "", cases=alike(left, plan.device),
                      stop=False, seconds=plan.seconds, device=plan.device,
                      criteria=0 if trials or plan.device != "cpu" else _ASKED_OF_RIGHT)
            found, why = lane.run(job)
            trials, left = trials + found, left[len(found):]
    counts = {verdict: sum(one.verdict == verdict for one in trials) for verdict in Verdict}
    red = [f"{one.case}: {one.message.partition(chr(10))[0]}" for one in trials
           if one.verdict in RED_VERDICTS or one.verdict == Verdict.HARNESS_ERROR]
    executed = sum(counts[one] for one in EXECUTED_VERDICTS)
    return RightOutcome(id=right.id, executed=executed, passed=counts[Verdict.PASS], not_run=counts[Verdict.NOT_RUN],
                        unsupported=counts[Verdict.UNSUPPORTED], red=red, reason=why,
                        refused=_counted(trials), seconds=round(time.monotonic() - began, 1))


def _counted(trials: list[Trial]) -> dict[str, tuple[int, int]]:
    """By project, how many of how many are refused."""
    projects = dict.fromkeys(name for one in trials for name in one.refused)
    return {name: (sum(one.refused.get(name, False) for one in trials), sum(name in one.refused for one in trials))
            for name in projects}
