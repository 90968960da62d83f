"""One case through the whole flow: ask the child, measure, judge, write the record line."""

import shlex
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import msgspec
import torch

from moe_ref.contract.capabilities import ROUNDED_OPERANDS, Capabilities, Numerics
from moe_ref.contract.case import Case
from moe_ref.contract.shares import rank_shares
from moe_ref.contract.vocabulary import Dtype, Format, Ranks, Stage, Verdict
from moe_ref.contract.volume import transfers
from moe_ref.expectations.load import Expectations
from moe_ref.expectations.schema import KnownFailure
from moe_ref.inputs.build import Inputs, build_inputs
from moe_ref.records.error_map import ErrorMap
from moe_ref.records.schema import (
    CaseLine,
    CollectiveCount,
    DiagnosisLine,
    Implementation,
    MutantLine,
    SemanticLine,
    to_number,
)
from moe_ref.tiers.tiers import PlannedCase
from moe_ref.tiers.triggers import REPEATED
from moe_ref.tolerances.load import Tolerances
from moe_ref.tolerances.schema import TolerancesFile
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.child.messages import RankReport, Reply, Request
from moe_ref.verify.decoded import decoded_inputs
from moe_ref.verify.diagnosis.diagnose import diagnosable, diagnose
from moe_ref.verify.expected import excused, speaks_for_all
from moe_ref.verify.explain import explain
from moe_ref.verify.judge import Guard, Judgement, RunFacts, WantedCalls, judge
from moe_ref.verify.measure.error_map import mappable, measure_map
from moe_ref.verify.measure.gradients import measure_case
from moe_ref.verify.measure.measurement import Measurement
from moe_ref.verify.measure.placing import RankTensors, in_every_slot
from moe_ref.verify.run.batches import LEFT_OUT, SAME, left_out
from moe_ref.verify.run.children import Answer, ChildDied, ChildHung
from moe_ref.verify.run.last_words import cut_lines
from moe_ref.verify.semantic import Semantic, semantic, small_enough


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What is the same for all cases of a run; hardware: the class found by measurement, "" where none was measured."""

    run: str
    implementation: Implementation
    capabilities: Capabilities
    tolerances: Tolerances
    device: str
    runs: int = 2
    time_limit: float = 300.0
    tell: Callable[[str, str], None] = lambda case_id, text: None
    replay_options: str = ""
    hardware: str = ""
    num_started: int = 0
    replay_as: str = ""
    """How a case is seen again where no command does, with {case} for its id."""
    expectations: Expectations | None = None

    def covering(self, case_id: str) -> tuple[KnownFailure, ...]:
        """The entries that a case is covered by."""
        return self.expectations.covering(case_id) if self.expectations else ()


class CannotServe(RuntimeError):
    """Raised by a pool that has no ranks for a case any more; the message says why."""


class Worker(Protocol):
    """What answers a request; see Child.ask."""

    def ask(self, request: Request, on_progress: Callable[[str], None] = ...) -> Answer: ...


class Pool(Protocol):
    """Whose workers run cases; see ChildPool."""

    def lease(self, process_ranks: bool) -> AbstractContextManager[Worker]: ...


def run_case(planned: PlannedCase, settings: RunSettings, pool: Pool) -> CaseLine:
    """The record line of one case; whatever goes wrong on our side becomes a harness_error, never a lost case."""
    asked = planned.case, planned.ranks.backend(settings.device), settings.device
    if refusal := settings.capabilities.refusal(*asked):
        return _line(planned, settings, Judgement(Verdict.UNSUPPORTED, refusal))
    settings = replace(settings, capabilities=settings.capabilities.serving(*asked))
    if missing := missing_devices(planned, settings.device, settings.num_started):
        return _line(planned, settings, Judgement(Verdict.NOT_RUN, missing))
    request = Request(case=planned.case_id, ranks=planned.ranks, device=settings.device,
                      runs=max(settings.runs, REPEATED.get(planned.case_id, 0)), time_limit=settings.time_limit,
                      other_batches=not left_out(planned, settings.capabilities))
    covering = settings.covering(planned.case_id)
    try:
        with pool.lease(planned.ranks is not Ranks.LOCAL) as child:
            answer = child.ask(request, lambda text: settings.tell(planned.case_id, text))
    except ChildHung as error:
        hang = Judgement(Verdict.HANG, f"after {settings.time_limit:g} s, {error}")
        return _line(planned, settings, excused(hang, covering))
    except ChildDied as error:
        return _line(planned, settings, excused(Judgement(Verdict.CRASH, str(error)), covering))
    except CannotServe as error:
        return unrun_line(planned, settings, str(error))
    except Exception as error:
        return _line(planned, settings, _harness_error(error))
    if failed := [(rank, report) for rank, report in enumerate(answer.reply.ranks) if report.error]:
        return _line(planned, settings, excused(_crash(failed, planned.case), covering), answer)
    try:
        return _judged(planned, settings, answer)
    except OverflowError as error:
        # gamma_n has no value: the declared accumulation format is too coarse for a sum this long.
        return _line(planned, settings, Judgement(Verdict.UNSUPPORTED, f"no bound exists: {error}"), answer)
    except Exception as error:
        return _line(planned, settings, _harness_error(error), answer)


def unrun_line(planned: PlannedCase, settings: RunSettings, reason: str) -> CaseLine:
    """The record line of a case that is left out, with the reason."""
    return _line(planned, settings, Judgement(Verdict.NOT_RUN, reason))


def _harness_error(error: Exception) -> Judgement:
    text = "".join(traceback.format_exception(error))[-2000:]
    reason = f"not a verdict on the implementation: {type(error).__name__}: {error}\n{text}"
    return Judgement(Verdict.HARNESS_ERROR, reason)


def missing_devices(planned: PlannedCase, device: str, num_started: int) -> str:
    """Why this machine, or the ranks that torchrun started, cannot run the case; empty when they can."""
    if planned.ranks is Ranks.TORCHRUN:
        if num_started == 0:
            return "torchrun ranks need a run that torchrun started: torchrun ... -m moe_ref verify"
        needed = planned.case.parallel.size
        return f"torchrun started {num_started} ranks, {needed} needed" if needed > num_started else ""
    if planned.ranks is Ranks.NCCL and device != "cuda":
        return "nccl ranks need CUDA devices"
    if planned.ranks is Ranks.NCCL and torch.cuda.device_count() < planned.case.parallel.size:
        return f"nccl needs one device per rank: {torch.cuda.device_count()} found, {planned.case.parallel.size} needed"
    return ""


USAGE_PREFIX = "wrong use: "
_SECONDARY = ("closed by peer", "reset by peer", "was waiting for a rank that failed", "Broken pipe")
_ERROR_LIMIT = 240


def _crash(failed: list[tuple[int, RankReport]], case: Case) -> Judgement:
    """One line for all ranks; wrong use is told apart, since then the caller is to blame, not a kernel."""
    # A rank that only lost its connection to another one is not where the trouble began.
    rank, first = min(failed, key=lambda pair: (any(text in pair[1].error for text in _SECONDARY), pair[0]))
    error = cut_lines(first.error.strip(), 1000).partition("\n")[0][:_ERROR_LIMIT]
    same = [number for number, report in failed if report.error == first.error]
    where = f"on all {case.parallel.size} ranks" if len(same) == case.parallel.size else f"on rank {rank}"
    if first.kind == "usage":
        return Judgement(Verdict.CRASH, f"{USAGE_PREFIX}{error} [{where}]")
    if first.kind == "struct":
        return Judgement(Verdict.STRUCT, f"{error.removeprefix('StructError: ')} [{where}]")
    return Judgement(Verdict.CRASH, f"{error} [{where}]\n{cut_lines(first.traceback, 6)}")


def _judged(planned: PlannedCase, settings: RunSettings, answer: Answer) -> CaseLine:
    started, case, capabilities = time.monotonic(), planned.case, settings.capabilities
    inputs = build_inputs(case.problem)
    if inputs.digest() != answer.reply.inputs_digest:
        raise RuntimeError(f"inputs digest {answer.reply.inputs_digest} in the child, {inputs.digest()} here")
    numerics = capabilities.contract(case.problem)
    inputs = decoded_inputs(inputs, numerics)
    model = RoundingModel.of(settings.tolerances, settings.hardware or settings.device, numerics, case.problem.dtype)
    file = settings.tolerances.file
    covering = settings.covering(planned.case_id)
    judged: list[Judgement] = []
    measured: list[Measurement] = []
    runs = [in_every_slot(case, ranks) for ranks in answer.runs]
    for number, ranks in enumerate(runs):
        is_untraced = answer.reply.untraced and number == len(runs) - 1
        shown = replace(capabilities, stages=()) if is_untraced else capabilities
        measurement = measure_case(case, inputs, ranks, shown, model,
                                   lambda text: settings.tell(planned.case_id, text))
        facts = _facts(case, settings, answer, measurement)
        judgement = judge(measurement, facts, file.limits.ratio.max, file.power_guard.zeros.factor,
                          needed(file, numerics))
        if is_untraced and judgement.verdict is not Verdict.MISMATCH:
            # An output alone may leave nothing to say, and what else is wrong the other runs say.
            continue
        if is_untraced:
            judgement = replace(judgement, reason=f"without a trace, {judgement.reason}")
        judged.append(excused(judgement, covering, measurement.stages, file.limits.ratio.max))
        measured.append(measurement)
    # Runs that differ are all judged.
    index, judgement = speaks_for_all(judged, covering)
    compared = []
    if judgement.verdict is Verdict.MISMATCH and small_enough(case):
        compared = _semantic_lines(semantic(case, inputs, runs[index], numerics))
    found = _diagnosed(case, inputs, runs[index], capabilities, judgement)
    measurement = measured[index]
    if judgement.verdict is Verdict.MISMATCH and judgement.first_stage is not None and mappable(case):
        shown = replace(capabilities, stages=()) if answer.reply.untraced and index == len(runs) - 1 else capabilities
        found_map = measure_map(case, inputs, runs[index], shown, model, judgement.first_stage)
        measurement = _with_map(measurement, judgement.first_stage, found_map)
    return _line(planned, settings, judgement, answer, measurement, time.monotonic() - started, compared, found)


def _with_map(measurement: Measurement, first: Stage, found: ErrorMap | None) -> Measurement:
    """The measurement with a map at its first failing stage."""
    return replace(measurement, stages=tuple(
        msgspec.structs.replace(stage, error_map=found) if stage.stage == first else stage
        for stage in measurement.stages))


def _diagnosed(case: Case, inputs: Inputs, ranks: list[RankTensors], capabilities: Capabilities,
               judgement: Judgement) -> DiagnosisLine | None:
    """The fault that explains a mismatch of a small case."""
    if judgement.verdict is not Verdict.MISMATCH or judgement.first_stage is None or not diagnosable(case):
        return None
    numerics = capabilities.contract(case.problem)
    try:
        found = diagnose(case, inputs, ranks, numerics, Stage(judgement.first_stage))
    except Exception:
        # A subject can be wrong in ways that no hypothesis is made for; the verdict stands without a name.
        return None
    if found is None:
        return None
    return DiagnosisLine(fault=found.fault, share=to_number(found.share), next_share=to_number(found.next_share))


def _semantic_lines(found: Semantic) -> list[SemanticLine]:
    return [SemanticLine(stage=one.stage, subject_share=to_number(one.subject_share),
                         sibling_share=to_number(one.sibling_share), ratio=to_number(one.ratio))
            for one in found.stages]


def needed(file: TolerancesFile, numerics: Numerics) -> Guard:
    """What tolerances.yaml wants of a case under this contract besides that zeros fail it.

    The floor is that of the coarsest format in which something is stored, added between ranks or multiplied. How long
    sums are accumulated has no part in it: a contract too loose there is what floors are for. Logits of 16 bits move
    weights by any amount, so that there is none.
    """
    narrow = file.formats[Format.FP16].significand_bits
    declared = [*numerics.storage.values(), numerics.reduce, numerics.activation, numerics.merge,
                Format.TF32 if numerics.products == "tf32" else None,
                Format.E4M3 if numerics.products in ROUNDED_OPERANDS else None]
    bits = min(file.formats[one].significand_bits for one in declared if one is not None)
    dtype = next((dtype for dtype in (Dtype.BF16, Dtype.FP16)
                  if bits <= file.formats[Format(dtype.value)].significand_bits), Dtype.FP32)
    logits, guard = numerics.storage.get(Stage.LOGITS, Format.FP64), file.power_guard
    floor = 0.0 if file.formats[logits].significand_bits <= narrow else guard.floors[dtype].floor
    return Guard(floor, {"k_tile": guard.k_tile.factor, "w_1ulp": guard.w_1ulp.factor,
                         "tp_partial": guard.tp_partial.factor, "store_rz": guard.store_rz.factor})


def _facts(case: Case, settings: RunSettings, answer: Answer, measurement: Measurement) -> RunFacts:
    reply = answer.reply
    # A call in a group of one rank moves nothing; whether it is made is nobody's business.
    moving = {group for group, size in (("tp", case.parallel.tp), ("ep", case.parallel.ep)) if size > 1}
    return RunFacts(
        calls=tuple(tuple((name, elements) for name, elements, _ in report.calls if name.partition(".")[0] in moving)
                    for report in reply.ranks),
        wanted_calls=wanted_calls(case, measurement) if settings.capabilities.collectives_through_groups else (),
        same_bits=reply.same_bits, differing_stages=tuple(reply.differing_stages),
        promised_deterministic=settings.capabilities.deterministic,
        promised_equal_ranks=settings.capabilities.equal_ranks, changed_inputs=tuple(reply.changed_inputs),
        differing_batches=tuple((name, words) for name, words in reply.batches.items() if words != SAME),
        promised_batch_invariant=settings.capabilities.batch_invariant)


def wanted_calls(case: Case, measurement: Measurement) -> tuple[WantedCalls, ...]:
    """What each rank should communicate, for the routing that it took."""
    moved = measurement.rows_moved or ((0, 0),) * case.parallel.size
    wanted = []
    for share, (sent, served) in zip(rank_shares(case), moved, strict=True):
        planned = transfers(case, share, sent, served)
        wanted.append(WantedCalls(
            payload=tuple((one.name, one.num_elements) for one in planned if not one.describes),
            describing=tuple((one.name, one.num_elements) for one in planned if one.describes)))
    return tuple(wanted)


def _line(planned: PlannedCase, settings: RunSettings, judgement: Judgement, answer: Answer | None = None,
          measurement: Measurement | None = None, oracle_seconds: float = 0.0,
          compared: list[SemanticLine] | None = None, found: DiagnosisLine | None = None) -> CaseLine:
    reply, case_id = answer.reply if answer else Reply(ranks=[]), planned.case_id
    command = "moe-ref"
    if planned.ranks is Ranks.TORCHRUN:
        command = f"torchrun --nproc-per-node {planned.case.parallel.size} -m moe_ref"
    replay = (f"{command} replay {case_id} --impl {shlex.quote(settings.implementation.name)} --ranks {planned.ranks} "
              f"--device {settings.device}{settings.replay_options}")
    if settings.replay_as:
        replay = settings.replay_as.replace("{case}", case_id)
    numerics = settings.capabilities.numerics_of(planned.case.problem)
    reason = left_out(planned, settings.capabilities)
    mutants = {name: MutantLine(factor=to_number(one.factor), where=one.where)
               for name, one in measurement.mutants.items()} if measurement else {}
    line = CaseLine(
        run=settings.run, case=case_id, purpose=planned.purpose, implementation=settings.implementation,
        ranks=planned.ranks, device=settings.device, verdict=judgement.verdict, reason=judgement.reason,
        first_stage=judgement.first_stage, stages=list(measurement.stages) if measurement else [],
        collectives=_count(reply.ranks[0].calls) if reply.ranks else [], guard=reply.guard, runs=reply.runs,
        same_bits=reply.same_bits, batches={LEFT_OUT: reason} if reason and settings.capabilities.batch_invariant
        else reply.batches, numerics=numerics_words(numerics),
        power=to_number(measurement.power) if measurement else 0.0,
        mutants=mutants, signal=to_number(measurement.signal) if measurement else 0.0,
        semantic=compared or [], diagnosis=found, inputs_digest=reply.inputs_digest,
        subject_seconds=round(reply.seconds, 4), oracle_seconds=round(oracle_seconds, 4), replay=replay)
    return msgspec.structs.replace(line, message=explain(line, planned.case))


def _count(calls: list[tuple[str, int, int]]) -> list[CollectiveCount]:
    return [CollectiveCount(operation=name, calls=sum(call[0] == name for call in calls),
                            num_elements=sum(call[1] for call in calls if call[0] == name),
                            num_bytes=sum(call[2] for call in calls if call[0] == name))
            for name in sorted({call[0] for call in calls})]


def numerics_words(numerics: Numerics | None) -> dict[str, str]:
    """The rounding contract as a record keeps it."""
    if numerics is None:
        return {}
    stored = {stage.value: stored.value for stage, stored in numerics.storage.items()}
    inner = {name: stored.value for name, stored in (("inside_activation", numerics.activation),
                                                     ("inside_merge", numerics.merge),
                                                     ("decoded", numerics.decoded)) if stored is not None}
    return {**stored, "accumulate": numerics.accumulate.value, "between_ranks": numerics.reduce.value,
            "weight_at": numerics.weight_at, "products": numerics.products, **inner,
            **({"promoted_after": str(numerics.promoted_after)} if numerics.promoted_after is not None else {}),
            **({"gradient_rows": numerics.gradient_rows} if numerics.gradient_rows != "both" else {})}
