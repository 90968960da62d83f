"""Run a subject on one case: inputs from the id, ranks, guard, two runs, and a reply of plain data."""

import time
import traceback
from types import ModuleType

import msgspec
import torch

from moe_ref.contract.case import Case
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.comm import Comm, CountingComm, Groups
from moe_ref.contract.errors import UsageError
from moe_ref.contract.local_comm import LocalComm, run_virtual_ranks
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Ranks, Stage
from moe_ref.contract.weights import MoEWeights
from moe_ref.inputs.build import Inputs, build_inputs, build_shards
from moe_ref.verify.child.guard import POISON_NAMES, fingerprint, poison
from moe_ref.verify.child.messages import RankReport, RankTensors, Reply, Request, pack_tensors, unpack_tensors
from moe_ref.verify.child.process_ranks import RankError, run_process_ranks


class Job:
    """One case with its inputs; `run_rank` is what every rank does, whatever ranks are."""

    def __init__(self, subject: ModuleType, request: Request) -> None:
        self.subject, self.request = subject, request
        self.case: Case = parse_case(request.case)
        self.inputs: Inputs = build_inputs(self.case.problem)
        local = request.ranks == Ranks.LOCAL
        # Process ranks are forked, so weights are made once before, in shared pages, and moved by each rank.
        self.shards: list[MoEWeights] = build_shards(self.case.problem, self.case.parallel,
                                                     request.device if local else "cpu")

    def run_rank(self, comm: Comm, device: torch.device, run: int) -> tuple[RankTensors, RankReport, list[str]]:
        """Tensors shown, calls made, and the names of inputs that changed."""
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
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        changed = [name for name, tensor in watched if fingerprint(tensor) != before[name]]
        calls = [(call.operation, call.num_elements, call.num_bytes) for call in counting.calls]
        return {**trace.tensors, Stage.REDUCED: output}, RankReport(calls=calls), changed


def execute(subject: ModuleType, request: Request) -> tuple[Reply, bytes]:
    """The reply to a request and its payload; errors of the subject are part of the reply."""
    job = Job(subject, request)
    started = time.monotonic()
    outcomes = []
    for run in range(request.runs):
        outcome = _run_ranks(job, run)
        outcomes.append(outcome)
        if isinstance(outcome, list):
            return Reply(ranks=outcome, runs=run + 1, seconds=time.monotonic() - started,
                         inputs_digest=job.inputs.digest()), b""
    seconds = (time.monotonic() - started) / request.runs
    first = outcomes[0]
    differing = sorted({stage for other in outcomes[1:] for stage in _differing(first[0], other[0])})
    names = [POISON_NAMES[run % len(POISON_NAMES)] for run in range(request.runs)]
    changed = sorted({name for outcome in outcomes for name in outcome[2]})
    reply = Reply(ranks=first[1], runs=request.runs, same_bits=not differing if request.runs > 1 else None,
                  differing_stages=differing, changed_inputs=changed, seconds=seconds,
                  guard={"poison": ", ".join(names), "inputs": "fingerprinted before and after", "process": "child"},
                  inputs_digest=job.inputs.digest())
    return reply, pack_tensors(first[0])


Outcome = tuple[list[RankTensors], list[RankReport], list[str]]


def _run_ranks(job: Job, run: int) -> Outcome | list[RankReport]:
    """Tensors, reports and changed inputs of all ranks; or only reports when a rank failed."""
    size = job.case.parallel.tp
    if job.request.ranks == Ranks.LOCAL:
        return _run_local(job, run, size)
    # The harness gives up first: it dumps the stacks of all ranks before it kills them.
    answers = run_process_ranks(size, job.request.ranks, job.request.device, 2 * job.request.time_limit,
                                lambda comm, device: _pack_rank(*job.run_rank(comm, device, run)))
    if any(isinstance(answer, Exception) for answer in answers):
        return [_report_process_error(answer) for answer in answers]
    unpacked = [_unpack_rank(answer) for answer in answers if isinstance(answer, bytes)]
    return ([tensors for tensors, _, _ in unpacked], [report for _, report, _ in unpacked],
            [name for _, _, changed in unpacked for name in changed])


def _run_local(job: Job, run: int, size: int) -> Outcome | list[RankReport]:
    # A rank without a backward pass needs no autograd, and virtual ranks must not share its worker threads.
    device = torch.device(job.request.device)

    def body(comm: LocalComm) -> tuple[RankTensors, RankReport, list[str]] | RankReport:
        try:
            with torch.no_grad():
                return job.run_rank(comm, device, run)
        except UsageError as error:
            # Wrong use is found before any communication, by every rank on its own: let each one say so.
            return _report(error, usage=True)

    try:
        results = run_virtual_ranks(size, body)
    except Exception as error:
        return [_report(error, usage=isinstance(error, UsageError))]
    if any(isinstance(result, RankReport) for result in results):
        return [result if isinstance(result, RankReport) else result[1] for result in results]
    complete = [result for result in results if not isinstance(result, RankReport)]
    return ([tensors for tensors, _, _ in complete], [report for _, report, _ in complete],
            [name for _, _, changed in complete for name in changed])


def _report(error: Exception, *, usage: bool) -> RankReport:
    text = "".join(traceback.format_exception(error))
    return RankReport(error=f"{type(error).__name__}: {error}", usage=usage, traceback=text[-4000:])


def _report_process_error(answer: bytes | Exception) -> RankReport:
    if not isinstance(answer, RankError):
        return RankReport()
    usage = answer.kind.startswith("moe_ref.contract.errors.")
    return RankReport(error=f"{answer.kind.rsplit('.', 1)[-1]}: {answer}", usage=usage, traceback=answer.trace[-4000:])


def _differing(first: list[RankTensors], other: list[RankTensors]) -> set[str]:
    return {stage for one, two in zip(first, other, strict=True) for stage, tensor in one.items()
            if stage not in two or fingerprint(tensor) != fingerprint(two[stage])}


def _pack_rank(tensors: RankTensors, report: RankReport, changed: list[str]) -> bytes:
    header = msgspec.json.encode((report, changed))
    return len(header).to_bytes(8, "little") + header + pack_tensors([tensors])


def _unpack_rank(content: bytes) -> tuple[RankTensors, RankReport, list[str]]:
    length = int.from_bytes(content[:8], "little")
    report, changed = msgspec.json.decode(content[8:8 + length], type=tuple[RankReport, list[str]])
    return unpack_tensors(content[8 + length:], 1)[0], report, changed
