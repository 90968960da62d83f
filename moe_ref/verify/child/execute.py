"""Run a subject on one case: inputs from the id, ranks, guard, two runs, and a reply of plain data."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Protocol

import msgspec
import torch

from moe_ref.contract.case_id import parse_case
from moe_ref.contract.comm import Groups, grid_groups
from moe_ref.contract.errors import UsageError
from moe_ref.contract.local_comm import LocalComm, run_virtual_ranks
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.vocabulary import Ranks, Stage
from moe_ref.inputs.build import build_inputs
from moe_ref.verify.child.batches import other_batches, same_rows
from moe_ref.verify.child.changed import asks_untraced
from moe_ref.verify.child.error_words import error_words
from moe_ref.verify.child.guard import POISON_NAMES, fingerprint
from moe_ref.verify.child.job import Job, StructError
from moe_ref.verify.child.messages import RankReport, RankTensors, Reply, Request, pack_runs, unpack_runs
from moe_ref.verify.child.process_ranks import RanksHung
from moe_ref.verify.child.rank_watch import RankError
from moe_ref.verify.child.surroundings import ReplacedHarness, Surroundings
from moe_ref.verify.run.last_words import cut_lines


class ProcessRanks(Protocol):
    """Who runs jobs on process ranks; see RankPool.run."""

    def run(self, tp: int, job: bytes = b"", *, ep: int = 1, backend: str = "gloo", device: str = "cpu",
            time_limit: float = 60.0, tell: Callable[[str], None] = lambda text: None) -> list[bytes | RankError]: ...


def execute(subject: ModuleType, request: Request, tell: Callable[[str], None] = lambda text: None,
            pool: ProcessRanks | None = None, surroundings: Surroundings | None = None) -> tuple[Reply, bytes]:
    """The reply to a request and its payload; errors of the subject are part of the reply.

    Process ranks are those of `pool`, whose body is run_job of the same subject. With `surroundings` its calls change
    them for themselves only, and the reply says what they have left behind.
    """
    reply, payload = _execute(subject, request, tell, pool, surroundings)
    left = sorted({*reply.left, *(surroundings.left if surroundings else ())})
    guard = reply.guard | ({"left behind": ", ".join(left)} if left else {})
    return msgspec.structs.replace(reply, ticket=request.ticket, left=left, guard=guard), payload


def _execute(subject: ModuleType, request: Request, tell: Callable[[str], None], pool: ProcessRanks | None,
             surroundings: Surroundings | None) -> tuple[Reply, bytes]:
    batches: dict[str, str] = {}
    untraced: list[list[RankTensors]] = []
    if request.ranks == Ranks.LOCAL:
        job = Job(subject, request, tell, surroundings=surroundings)
        started = time.monotonic()
        outcomes, digest = run_local(job), job.inputs.digest()
        seconds = (time.monotonic() - started) / _num_calls(job)
        if request.other_batches and not isinstance(outcomes, Failed):
            batches = _run_other_batches(job, outcomes[0].tensors)
        if request.runs > 1 and not isinstance(outcomes, Failed) and asks_untraced(request.case):
            last = _run_once(job, 0, is_traced=False)
            if isinstance(last, Failed):
                outcomes = last.said("in the call without a trace")
            elif Stage.REDUCED in _differing(last.tensors, outcomes[0].tensors):
                untraced = [last.tensors]
    else:
        assert pool is not None
        started = time.monotonic()
        if request.device == "cpu" and request.ranks != Ranks.TORCHRUN:
            _warm_up(subject, surroundings)
        case = parse_case(request.case)
        digest = build_inputs(case.problem).digest()
        left = request.time_limit - (time.monotonic() - started)
        try:
            outcomes, seconds = _run_processes(pool, request, case.parallel, left, tell)
        except RanksHung as error:
            return Reply(ranks=[RankReport(error=str(error), kind="hang")]), b""
    if isinstance(outcomes, Failed):
        return Reply(ranks=outcomes.reports, runs=1, seconds=seconds, inputs_digest=digest), b""
    first = outcomes[0]
    differing = sorted({stage for other in outcomes[1:] for stage in _differing(first.tensors, other.tensors)})
    names = [POISON_NAMES[run % len(POISON_NAMES)] for run in range(request.runs)]
    reply = Reply(ranks=first.reports, runs=request.runs, same_bits=not differing if request.runs > 1 else None,
                  differing_stages=differing, changed_inputs=_changed(outcomes),
                  guard={"poison": ", ".join(names), "inputs": "fingerprinted before and after", "process": "child"},
                  left=[name for one in outcomes for report in one.reports for name in report.left],
                  batches=batches, untraced=bool(untraced), seconds=seconds, inputs_digest=digest)
    # Every run that is not the first one's bits is judged too: a defect may show only once.
    others = [other.tensors for other in outcomes[1:] if _differing(first.tensors, other.tensors)]
    return reply, pack_runs([first.tensors, *others, *untraced])


@dataclass(frozen=True)
class Outcome:
    """One run: tensors and reports by rank, and the names of inputs that changed."""

    tensors: list[RankTensors]
    reports: list[RankReport]
    changed: list[str]


@dataclass(frozen=True)
class Failed:
    """Reports of a run in which a rank failed."""

    reports: list[RankReport]

    def said(self, which: str) -> "Failed":
        """The same, with words for a call that is none of the runs at the end of the first line."""
        def told(report: RankReport) -> RankReport:
            first, *others = report.error.split("\n")
            return msgspec.structs.replace(report, error="\n".join([f"{first} ({which})", *others]))

        return Failed([told(report) if report.error else report for report in self.reports])


def _changed(outcomes: list[Outcome]) -> list[str]:
    """Names of changed inputs; that one was changed for a time says nothing where it stayed so elsewhere."""
    names = {name for one in outcomes for name in one.changed}
    return sorted(name for name in names if name.partition(" ")[0] == name or name.partition(" ")[0] not in names)


RankResult = tuple[RankTensors, RankReport, list[str]]


def _outcome(results: list[RankResult]) -> Outcome:
    return Outcome([tensors for tensors, _, _ in results], [report for _, report, _ in results],
                   [name for _, _, changed in results for name in changed])


_warmed_up: list[object] = []


def _warm_up(subject: ModuleType, surroundings: Surroundings | None) -> None:
    """Compile and check once, before ranks are forked, what every fork would repeat; its result means nothing."""
    if any(subject is done for done in _warmed_up):
        return
    _warmed_up.append(subject)
    job = Job(subject, Request(case=_WARM_UP_CASE, ranks=Ranks.LOCAL, device="cpu", runs=1, time_limit=0.0),
              surroundings=surroundings)
    run_local(job)


_WARM_UP_CASE = "v1-T2.H16.I16.E4.K2-fp32-norm"


class RankRun(msgspec.Struct, frozen=True):
    """One run of one process rank, as it travels; tensors as safetensors bytes."""

    report: RankReport
    changed: list[str]
    tensors: bytes


class RankRuns(msgspec.Struct, frozen=True):
    """All runs of one process rank, and how long one took."""

    runs: list[RankRun]
    seconds: float


def run_job(subject: ModuleType, groups: Groups, device: torch.device, content: bytes,
            tell: Callable[[str], None], surroundings: Surroundings | None = None) -> bytes:
    """What a process rank does with a request: makes its own inputs, and returns RankRuns; both as msgpack."""
    request = msgspec.msgpack.decode(content, type=Request)
    job = Job(subject, request, tell, device, groups.rank, surroundings)
    started = time.monotonic()
    with torch.no_grad():
        results = []
        for run in range(request.runs):
            before = job.run_rank(groups, device, run, is_changed=True)[2] if run == job.changed_call else []
            tensors, report, touched = job.run_rank(groups, device, run)
            results.append((tensors, report, before + touched))
    seconds = (time.monotonic() - started) / _num_calls(job)
    return msgspec.msgpack.encode(RankRuns([RankRun(report, changed, pack_runs([[tensors]]))
                                            for tensors, report, changed in results], seconds))


SHOWN_TRACE_LINES = 3
"""Of a traceback: the innermost file and line, its code, and the error."""

ANSWER_SHARE, ANSWER_SECONDS = 1 / 3, 5.0
"""What process ranks leave of the time limit, at most, to the child, which then says where each of them is."""


def _run_processes(pool: ProcessRanks, request: Request, parallel: Parallel, seconds: float,
                   tell: Callable[[str], None]) -> tuple[list[Outcome] | Failed, float]:
    """The runs and the seconds of one on the slowest rank."""
    answers = pool.run(parallel.tp, msgspec.msgpack.encode(request), ep=parallel.ep, backend=request.ranks,
                       device=request.device, time_limit=max(seconds - ANSWER_SECONDS, (1 - ANSWER_SHARE) * seconds),
                       tell=tell)
    if any(isinstance(answer, RankError) for answer in answers):
        return Failed([_report_process_error(answer) for answer in answers]), 0.0
    ranks = [msgspec.msgpack.decode(answer, type=RankRuns) for answer in answers if isinstance(answer, bytes)]
    outcomes = [_outcome([(unpack_runs(one.tensors, 1)[0][0], one.report, one.changed) for one in runs])
                for runs in zip(*(rank.runs for rank in ranks), strict=True)]
    return outcomes, max(rank.seconds for rank in ranks)


def run_local(job: Job) -> list[Outcome] | Failed:
    """All runs of a job on virtual ranks."""
    outcomes = []
    for run in range(job.request.runs):
        touched: list[str] = []
        if run == job.changed_call:
            before = _run_once(job, run, is_changed=True)
            if isinstance(before, Failed):
                return before.said("in the call with other inputs")
            touched = before.changed
        outcome = _run_once(job, run)
        if isinstance(outcome, Failed):
            return outcome
        outcomes.append(replace(outcome, changed=touched + outcome.changed))
    return outcomes


def _num_calls(job: Job) -> int:
    return job.request.runs + (job.changed_call is not None)


def _run_other_batches(job: Job, first: list[RankTensors]) -> dict[str, str]:
    """How the rows of other batches compare with those of the first run, in words."""
    words = {}
    for name, token_T in other_batches(job.case.problem).items():
        job.tell(f"once more: {name}")
        outcome = _run_once(job, 0, token_T)
        if isinstance(outcome, Failed):
            words[name] = next(report.error for report in outcome.reports if report.error)
        else:
            same = all(same_rows(one[Stage.REDUCED], other[Stage.REDUCED], token_T)
                       for one, other in zip(first, outcome.tensors, strict=True))
            words[name] = "same bits" if same else "rows differ"
    return words


def _run_once(job: Job, run: int, token_T: torch.Tensor | None = None, is_changed: bool = False,
              is_traced: bool = True) -> Outcome | Failed:
    device, size = torch.device(job.request.device), job.case.parallel.size

    def body(comm: LocalComm) -> RankResult | RankReport:
        try:
            # No autograd, whose worker threads virtual ranks must not share; a backward case has it in this thread.
            with torch.no_grad():
                groups = grid_groups(comm, job.case.parallel.tp, job.case.parallel.ep)
                return job.run_rank(groups, device, run, token_T, is_changed, is_traced)
        except UsageError as error:
            # Wrong use is found before any communication, by every rank on its own: let each one say so.
            return _report(error, "usage")
        except (StructError, ReplacedHarness) as error:
            return _report(error, "struct")

    try:
        results = run_virtual_ranks(size, body)
    except BaseException as error:
        # SystemExit and the like too: whatever a subject raises is its own verdict, not the end of the child.
        culprit = getattr(error, "rank", 0)
        return Failed([_report(error, "") if rank == culprit else RankReport() for rank in range(size)])
    if any(isinstance(result, RankReport) for result in results):
        return Failed([result if isinstance(result, RankReport) else result[1] for result in results])
    return _outcome([result for result in results if not isinstance(result, RankReport)])


def _report(error: BaseException, kind: str) -> RankReport:
    message, trace = error_words(error)
    return RankReport(error=f"{type(error).__name__}: {message}", kind=kind, traceback=trace)


_STRUCT = (StructError.__name__, ReplacedHarness.__name__)


def _report_process_error(answer: bytes | RankError) -> RankReport:
    if isinstance(answer, bytes):
        return RankReport()
    module, _, name = answer.kind.rpartition(".")
    kind = "usage" if module == "moe_ref.contract.errors" else "struct" if name in _STRUCT else ""
    # The message shows the first lines: where all ranks were, then where the error was raised.
    return RankReport(error=f"{name}: {answer}", kind=kind,
                      traceback="\n".join(filter(None, (answer.places, cut_lines(answer.trace, SHOWN_TRACE_LINES)))))


def _differing(first: list[RankTensors], other: list[RankTensors]) -> set[str]:
    return {stage for one, two in zip(first, other, strict=True) for stage, tensor in one.items()
            if stage not in two or fingerprint(tensor) != fingerprint(two[stage])}
