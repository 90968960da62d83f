"""Run a subject on one case: inputs from the id, ranks, guard, two runs, and a reply of plain data."""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import msgspec
import torch

from moe_ref.contract.case import Case
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.comm import Comm, CountingComm, Groups
from moe_ref.contract.errors import UsageError
from moe_ref.contract.local_comm import LocalComm, run_virtual_ranks
from moe_ref.contract.torch_comm import TorchComm
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Ranks, Stage
from moe_ref.contract.weights import MoEWeights
from moe_ref.inputs.build import Inputs, build_inputs, build_shards
from moe_ref.verify.child.guard import POISON_NAMES, fingerprint, poison
from moe_ref.verify.child.messages import RankReport, RankTensors, Reply, Request, pack_runs, unpack_runs
from moe_ref.verify.child.process_ranks import RankError, run_process_ranks


class Job:
    """One case with its inputs; `run_rank` is what every rank does, whatever ranks are."""

    def __init__(self, subject: ModuleType, request: Request, tell: Callable[[str], None] = lambda text: None) -> None:
        self.subject, self.request, self.tell = subject, request, tell
        self.case: Case = parse_case(request.case)
        self.inputs: Inputs = build_inputs(self.case.problem)
        local = request.ranks == Ranks.LOCAL
        # Process ranks are forked, so weights are made once before, in shared pages, and moved by each rank.
        self.shards: list[MoEWeights] = build_shards(self.case.problem, self.case.parallel,
                                                     request.device if local else "cpu", self._tell_expert,
                                                     self.case.storage)

    def _tell_expert(self, expert: int) -> None:
        self.tell(f"weights of expert {expert + 1} of {self.case.problem.spec.num_experts}")

    def run_rank(self, comm: Comm, device: torch.device, run: int) -> tuple[RankTensors, RankReport, list[str]]:
        """Tensors shown, calls made, and the names of inputs that changed."""
        self.tell(f"run {run + 1} of {self.request.runs}, rank {comm.rank + 1} of {comm.size}")
        weights, inputs = self.shards[comm.rank], self.inputs
        if weights.w2_EHI.device != device:
            weights = MoEWeights(**{name: tensor.to(device) for name, tensor in weights.named_tensors()})
        handed = {"x_TH": inputs.x_TH, "logits_TE": inputs.logits_TE, "residual_TH": inputs.residual_TH}
        handed = {name: None if tensor is None else tensor.to(device, copy=True) for name, tensor in handed.items()}
        watched = [*((n, t) for n, t in handed.items() if t is not None), *weights.named_tensors()]
        before = {name: fingerprint(tensor) for name, tensor in watched}
        counting, trace = CountingComm(comm), Trace()
        with poison(run):
            output = self.subject.moe(handed["x_TH"], weights, self.case.problem.spec, self.case.parallel,
                                      Groups(tp=counting), logits_TE=handed["logits_TE"],
                                      residual_TH=handed["residual_TH"], trace=trace)
        _check_tensor("output", output)
        for stage, tensor in trace.tensors.items():
            if not isinstance(stage, Stage):
                raise StructError(f"trace holds {stage!r}, but should hold stages only")
            _check_tensor(stage, tensor)
        # A copy: a subject may hand out the same buffer again in its next call.
        output = output.detach().clone()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        changed = [name for name, tensor in watched if fingerprint(tensor) != before[name]]
        calls = [(call.operation, call.num_elements, call.num_bytes) for call in counting.calls]
        return {**trace.tensors, Stage.REDUCED: output}, RankReport(calls=calls), changed


def execute(subject: ModuleType, request: Request,
            tell: Callable[[str], None] = lambda text: None) -> tuple[Reply, bytes]:
    """The reply to a request and its payload; errors of the subject are part of the reply."""
    if request.ranks != Ranks.LOCAL and request.device == "cpu":
        _warm_up(subject)
    job = Job(subject, request, tell)
    started = time.monotonic()
    outcomes = _run_local(job) if request.ranks == Ranks.LOCAL else _run_processes(job)
    seconds = (time.monotonic() - started) / request.runs
    digest = job.inputs.digest()
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


def _run_processes(job: Job) -> list[Outcome] | Failed:
    request = job.request

    def body(comm: TorchComm, device: torch.device) -> bytes:
        with torch.no_grad():
            return b"".join(_pack_rank(*job.run_rank(comm, device, run)) for run in range(request.runs))

    # The harness gives up first: it dumps the stacks of all ranks before it kills them.
    answers = run_process_ranks(job.case.parallel.tp, request.ranks, request.device, 2 * request.time_limit, body)
    if any(isinstance(answer, Exception) for answer in answers):
        return Failed([_report_process_error(answer) for answer in answers])
    by_rank = [_unpack_rank(answer) for answer in answers if isinstance(answer, bytes)]
    return [_outcome(list(results)) for results in zip(*by_rank, strict=True)]


def _run_local(job: Job) -> list[Outcome] | Failed:
    device, size = torch.device(job.request.device), job.case.parallel.tp

    def body(comm: LocalComm, run: int) -> RankResult | RankReport:
        try:
            # Forward only: no autograd, whose worker threads virtual ranks must not share.
            with torch.no_grad():
                return job.run_rank(comm, device, run)
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


def _report_process_error(answer: bytes | Exception) -> RankReport:
    if not isinstance(answer, RankError):
        return RankReport()
    module, _, name = answer.kind.rpartition(".")
    kind = "usage" if module == "moe_ref.contract.errors" else "struct" if name == "StructError" else ""
    return RankReport(error=f"{name}: {answer}", kind=kind, traceback=answer.trace[-4000:])


def _differing(first: list[RankTensors], other: list[RankTensors]) -> set[str]:
    return {stage for one, two in zip(first, other, strict=True) for stage, tensor in one.items()
            if stage not in two or fingerprint(tensor) != fingerprint(two[stage])}


def _pack_rank(tensors: RankTensors, report: RankReport, changed: list[str]) -> bytes:
    header, payload = msgspec.json.encode((report, changed)), pack_runs([[tensors]])
    return b"".join(part for content in (header, payload) for part in (len(content).to_bytes(8, "little"), content))


def _unpack_rank(content: bytes) -> list[RankResult]:
    """The runs of one rank, in order."""
    parts, at = [], 0
    while at < len(content):
        length = int.from_bytes(content[at:at + 8], "little")
        parts.append(content[at + 8:at + 8 + length])
        at += 8 + length
    results = []
    for header, payload in zip(parts[::2], parts[1::2], strict=True):
        report, changed = msgspec.json.decode(header, type=tuple[RankReport, list[str]])
        results.append((unpack_runs(payload, 1)[0][0], report, changed))
    return results
