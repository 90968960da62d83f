"""Run a subject on one case: inputs from the id, ranks, guard, two runs, and a reply of plain data."""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import msgspec
import torch

from moe_ref.contract.case import Case
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.comm import CommCall, CountingComm, Groups, grid_groups
from moe_ref.contract.errors import UsageError
from moe_ref.contract.local_comm import LocalComm, run_virtual_ranks
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.shares import rank_shares
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Direction, Ranks, Schedule, Stage
from moe_ref.contract.weights import MoEWeights
from moe_ref.inputs.build import Inputs, build_inputs, build_shards, cut_tokens, output_gradient
from moe_ref.verify.child.gradient_call import call_with_gradients
from moe_ref.verify.child.guard import POISON_NAMES, fingerprint, poison
from moe_ref.verify.child.messages import RankReport, RankTensors, Reply, Request, pack_runs, unpack_runs
from moe_ref.verify.child.process_ranks import RanksHung
from moe_ref.verify.child.rank_watch import RankError
from moe_ref.verify.run.last_words import cut_lines


class Job:
    """One case with its inputs; `run_rank` is what every rank does, whatever ranks are."""

    def __init__(self, subject: ModuleType, request: Request, tell: Callable[[str], None] = lambda text: None,
                 device: torch.device | None = None, rank: int | None = None) -> None:
        self.subject, self.request, self.tell = subject, request, tell
        self.case: Case = parse_case(request.case)
        self.inputs: Inputs = build_inputs(self.case.problem)
        self.shares = rank_shares(self.case)
        # A process rank makes its own weights only.
        ranks = range(self.case.parallel.size) if rank is None else [rank]
        made = build_shards(self.case.problem, self.case.parallel, device or request.device, self._tell_expert,
                            self.case.storage, only=frozenset(ranks))
        self.shards: dict[int, MoEWeights] = dict(zip(ranks, made, strict=True))

    def _tell_expert(self, expert: int) -> None:
        self.tell(f"weights of expert {expert + 1} of {self.case.problem.spec.num_experts}")

    def run_rank(self, groups: Groups, device: torch.device, run: int) -> tuple[RankTensors, RankReport, list[str]]:
        """Tensors shown, calls made, and the names of inputs that changed."""
        self.tell(f"run {run + 1} of {self.request.runs}, rank {groups.rank + 1} of {self.case.parallel.size}")
        weights = self.shards[groups.rank]
        if weights.w2_EHI.device != device:
            weights = MoEWeights(**{name: tensor.to(device) for name, tensor in weights.named_tensors()})
        handed = {name: None if tensor is None else tensor.to(device, copy=True)
                  for name, tensor in cut_tokens(self.inputs, self.shares[groups.rank].tokens).items()}
        x_TH = handed["x_TH"]
        if self.case.parallel.schedule is Schedule.GATHER and self.shares[groups.rank].tp_rank > 0 and x_TH is not None:
            handed["x_TH"] = -x_TH  # the tokens of rank 0 are broadcast: others must not be used
        watched = [*((n, t) for n, t in handed.items() if t is not None), *weights.named_tensors()]
        before = {name: fingerprint(tensor) for name, tensor in watched}
        calls: list[CommCall] = []
        counting = Groups(tp=CountingComm(groups.tp, calls, "tp"), ep=CountingComm(groups.ep, calls, "ep"))
        trace = Trace()
        with poison(run):
            output = self.subject.moe(handed["x_TH"], weights, self.case.problem.spec, self.case.parallel,
                                      counting, logits_TE=handed["logits_TE"],
                                      residual_TH=handed["residual_TH"], trace=trace)
        _check_tensor("output", output)
        for stage, tensor in trace.tensors.items():
            if not isinstance(stage, Stage):
                raise StructError(f"trace holds {stage!r}, but should hold stages only")
            _check_tensor(stage, tensor)
        # A copy: a subject may hand out the same buffer again in its next call.
        output = output.detach().clone()
        gradients: RankTensors = {}
        if self.case.direction is Direction.BACKWARD:
            with poison(run):
                gradients = self._gradients(handed, weights, groups)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        changed = [name for name, tensor in watched if fingerprint(tensor) != before[name]]
        made = [(f"{call.group}.{call.operation}", call.num_elements, call.num_bytes) for call in calls]
        return {**trace.tensors, Stage.REDUCED: output, **gradients}, RankReport(calls=made), changed

    def _gradients(self, handed: dict[str, torch.Tensor | None], weights: MoEWeights, groups: Groups) -> RankTensors:
        """Of all that this rank is handed; collectives are not counted, since no schedule says what they should be."""
        grad_y_TH = output_gradient(self.case.problem)[slice(*self.shares[groups.rank].tokens)]
        gradients = call_with_gradients(self.subject, self.case, handed, weights,
                                        grad_y_TH.to(weights.w2_EHI.device), groups)
        if gradients is None:
            raise StructError("output: no gradient, but should have one, since the backward direction is declared")
        for stage, gradient in gradients.items():
            _check_tensor(stage, gradient)
        return gradients


class ProcessRanks(Protocol):
    """Who runs jobs on process ranks; see RankPool.run."""

    def run(self, tp: int, job: bytes = b"", *, ep: int = 1, backend: str = "gloo", device: str = "cpu",
            time_limit: float = 60.0, tell: Callable[[str], None] = lambda text: None) -> list[bytes | RankError]: ...


def execute(subject: ModuleType, request: Request, tell: Callable[[str], None] = lambda text: None,
            pool: ProcessRanks | None = None) -> tuple[Reply, bytes]:
    """The reply to a request and its payload; errors of the subject are part of the reply.

    Process ranks are those of `pool`, whose body is run_job of the same subject.
    """
    if request.ranks == Ranks.LOCAL:
        job = Job(subject, request, tell)
        started = time.monotonic()
        outcomes, digest = _run_local(job), job.inputs.digest()
        seconds = (time.monotonic() - started) / request.runs
    else:
        assert pool is not None
        started = time.monotonic()
        if request.device == "cpu" and request.ranks != Ranks.TORCHRUN:
            _warm_up(subject)
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
                  differing_stages=differing, changed_inputs=sorted({name for one in outcomes for name in one.changed}),
                  guard={"poison": ", ".join(names), "inputs": "fingerprinted before and after", "process": "child"},
                  seconds=seconds, inputs_digest=digest)
    # Every run that is not the first one's bits is judged too: a defect may show only once.
    others = [other.tensors for other in outcomes[1:] if _differing(first.tensors, other.tensors)]
    return reply, pack_runs([first.tensors, *others])


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


RankResult = tuple[RankTensors, RankReport, list[str]]


def _outcome(results: list[RankResult]) -> Outcome:
    return Outcome([tensors for tensors, _, _ in results], [report for _, report, _ in results],
                   [name for _, _, changed in results for name in changed])


_warmed_up: list[object] = []


def _warm_up(subject: ModuleType) -> None:
    """Compile and check once, before ranks are forked, what every fork would repeat; its result means nothing."""
    if any(subject is done for done in _warmed_up):
        return
    _warmed_up.append(subject)
    job = Job(subject, Request(case=_WARM_UP_CASE, ranks=Ranks.LOCAL, device="cpu", runs=1, time_limit=0.0))
    _run_local(job)


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
            tell: Callable[[str], None]) -> bytes:
    """What a process rank does with a request: makes its own inputs, and returns RankRuns; both as msgpack."""
    request = msgspec.msgpack.decode(content, type=Request)
    job = Job(subject, request, tell, device, groups.rank)
    started = time.monotonic()
    with torch.no_grad():
        results = [job.run_rank(groups, device, run) for run in range(request.runs)]
    seconds = (time.monotonic() - started) / request.runs
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


def _run_local(job: Job) -> list[Outcome] | Failed:
    device, size = torch.device(job.request.device), job.case.parallel.size

    def body(comm: LocalComm, run: int) -> RankResult | RankReport:
        try:
            # No autograd, whose worker threads virtual ranks must not share; a backward case has it in this thread.
            with torch.no_grad():
                return job.run_rank(grid_groups(comm, job.case.parallel.tp, job.case.parallel.ep), device, run)
        except UsageError as error:
            # Wrong use is found before any communication, by every rank on its own: let each one say so.
            return _report(error, "usage")
        except StructError as error:
            return _report(error, "struct")

    outcomes = []
    for run in range(job.request.runs):
        try:
            results = run_virtual_ranks(size, lambda comm, run=run: body(comm, run))
        except BaseException as error:
            # SystemExit and the like too: whatever a subject raises is its own verdict, not the end of the child.
            culprit = getattr(error, "rank", 0)
            return Failed([_report(error, "") if rank == culprit else RankReport() for rank in range(size)])
        if any(isinstance(result, RankReport) for result in results):
            return Failed([result if isinstance(result, RankReport) else result[1] for result in results])
        outcomes.append(_outcome([result for result in results if not isinstance(result, RankReport)]))
    return outcomes


class StructError(TypeError):
    """What a subject gave back is not a plain tensor."""


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise StructError(f"{name}: {type(value).__name__}, but should be a torch.Tensor")
    if value.layout is not torch.strided or value.device.type == "meta" or value.dtype.is_complex:
        raise StructError(f"{name}: {value.layout}, {value.dtype} on {value.device}, but should be a real dense tensor")


def _report(error: BaseException, kind: str) -> RankReport:
    text = "".join(traceback.format_exception(error))
    return RankReport(error=f"{type(error).__name__}: {error}", kind=kind, traceback=text[-4000:])


def _report_process_error(answer: bytes | RankError) -> RankReport:
    if isinstance(answer, bytes):
        return RankReport()
    module, _, name = answer.kind.rpartition(".")
    kind = "usage" if module == "moe_ref.contract.errors" else "struct" if name == "StructError" else ""
    # The message shows the first lines: where all ranks were, then where the error was raised.
    return RankReport(error=f"{name}: {answer}", kind=kind,
                      traceback="\n".join(filter(None, (answer.places, cut_lines(answer.trace, SHOWN_TRACE_LINES)))))


def _differing(first: list[RankTensors], other: list[RankTensors]) -> set[str]:
    return {stage for one, two in zip(first, other, strict=True) for stage, tensor in one.items()
            if stage not in two or fingerprint(tensor) != fingerprint(two[stage])}
