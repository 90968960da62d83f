"""One run of `moe-ref bench`: limits, then every shape and operation, subjects compared with the truth and timed."""

import math
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import torch
from msgspec.structs import replace

from moe_ref.bench.judge import Judge
from moe_ref.bench.kernels import PARTS, Kernel, profiled
from moe_ref.bench.limits import measure_limits
from moe_ref.bench.memory import free_bytes, needed_bytes
from moe_ref.bench.problem import Batch, Operation, RankLayer, draw_batch, draw_probes, draw_weights, rank_layer
from moe_ref.bench.subjects import Subject, find_subject
from moe_ref.bench.timing import Call, CudaClock, HostClock, Prepared, Spread, clock_of, interleaved
from moe_ref.bench.work import Load, Work, operation_work, part_work
from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.errors import UsageError, positive_faults, raise_faults, size_faults
from moe_ref.contract.vocabulary import Dtype
from moe_ref.contract.weights import MoEWeights
from moe_ref.records.bench import BenchLine, BenchRecordLine, KernelResult, LimitLine, PartResult, TimingLine
from moe_ref.records.schema import EndLine, Number, to_number
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.hardware import hardware_class

EXIT_MISMATCH, EXIT_FEW = 1, 4
_KEPT_KERNELS = 24

AnyClock = HostClock | CudaClock


@dataclass(frozen=True, kw_only=True)
class BenchPlan:
    """Subjects by name, and the shapes. budget: seconds of timing for one subject on one shape, on CUDA; deadline:
    seconds after which no further shape is started. labels: what numbers of tokens stand for.
    """

    subjects: tuple[str, ...]
    models: tuple[str, ...]
    tp: tuple[int, ...]
    tokens: tuple[int, ...]
    operations: tuple[Operation, ...]
    dtype: Dtype = Dtype.BF16
    device: str = "cpu"
    seed: int = 0
    budget: float = 0.3
    deadline: float = float("inf")
    kernels: bool = True
    preset: str = ""
    labels: tuple[tuple[int, str], ...] = ()

    def __post_init__(self) -> None:
        raise_faults("bench", [fault for tokens in self.tokens for fault in positive_faults(tokens=tokens)]
                     + size_faults(0, seed=self.seed))
        for model in self.models:
            for tp in self.tp:
                rank_layer(model, tp, self.dtype)

    @property
    def num_shapes(self) -> int:
        """Layers, numbers of tokens and operations."""
        return len(self.models) * len(self.tp) * len(self.tokens) * len(self.operations)


Keep = Callable[[BenchRecordLine], None]
Tell = Callable[[str], None]


def run_bench(plan: BenchPlan, environment: dict[str, str], keep: Keep, tell: Tell = lambda doing: None) -> int:
    """Run all and hand every line of the record to `keep`; the exit code: 1 a subject wrong or crashed, 4 none timed.

    UsageValueError on names that are not known, before anything is timed.
    """
    bench = _Bench(plan, uuid.uuid4().hex[:12], [find_subject(name) for name in plan.subjects], keep, tell)
    keep(bench.header(environment))
    code = bench.run()
    keep(EndLine(run=bench.name, finished=_now(), seconds=round(time.monotonic() - bench.began, 3),
                 verdicts=dict(bench.statuses), executed=bench.statuses["TIMED"], exit_code=code))
    return code


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class _Shape:
    """What subjects are compared on."""

    layer: RankLayer
    weights: MoEWeights
    batch: Batch
    operation: Operation
    judge: Judge

    @property
    def load(self) -> Load:
        return Load(len(self.batch.x_TH), self.batch.num_rows, self.batch.num_visited,
                    TORCH_DTYPES[self.layer.dtype].itemsize)

    @property
    def work(self) -> Work:
        return operation_work(self.layer.spec, self.operation, self.load)


@dataclass
class _Bench:
    """State of one run."""

    plan: BenchPlan
    name: str
    subjects: list[Subject]
    keep: Keep
    tell: Tell
    statuses: Counter[str] = field(default_factory=Counter)
    began: float = field(default_factory=time.monotonic)

    def header(self, environment: dict[str, str]) -> BenchLine:
        plan = self.plan
        return BenchLine(run=self.name, started=_now(), subjects=list(plan.subjects), models=list(plan.models),
                         tp=list(plan.tp), tokens=list(plan.tokens), operations=[str(one) for one in plan.operations],
                         dtype=plan.dtype, seed=plan.seed, preset=plan.preset, labels=list(plan.labels),
                         device=plan.device, evidence=plan.device == "cuda", environment=environment,
                         tolerances_digest=load_tolerances().digest)

    def run(self) -> int:
        """Every line but the first and the last; the exit code."""
        plan, clock = self.plan, clock_of(self.plan.device)
        self.tell("limits")
        for limit in measure_limits(plan.dtype, clock):
            self.keep(LimitLine(run=self.name, name=limit.name, per_s=to_number(limit.per_s), words=limit.words,
                                seconds=_numbers(limit.spread), repetitions=limit.spread.repetitions))
        for subject in self.subjects:
            if subject.missing:
                self._keep(_line(self.name, subject, None, "NOT INSTALLED", subject.missing))
        for model in plan.models:
            for tp in plan.tp:
                self._layer(rank_layer(model, tp, plan.dtype), clock)
        if self.statuses["WRONG"] or self.statuses["CRASHED"]:
            return EXIT_MISMATCH
        return 0 if self.statuses["TIMED"] else EXIT_FEW

    def _keep(self, line: TimingLine) -> None:
        self.statuses[line.status] += 1
        self.keep(line)

    @property
    def installed(self) -> list[Subject]:
        return [subject for subject in self.subjects if not subject.missing]

    def _not_run(self, layer: RankLayer, tokens: int, operation: Operation, reason: str) -> None:
        for subject in self.installed:
            self._keep(_line(self.name, subject, _Place(layer, tokens, operation), "NOT RUN", reason))

    def _layer(self, layer: RankLayer, clock: AnyClock) -> None:
        """Everything with one set of weights, which is freed after it."""
        plan, device = self.plan, self.plan.device
        refused = self._refused(layer.num_bytes)
        shapes = [(tokens, operation) for tokens in plan.tokens for operation in plan.operations]
        if refused:
            for tokens, operation in shapes:
                self._not_run(layer, tokens, operation, refused)
            return
        weights = draw_weights(layer, device, plan.seed)
        probes = draw_probes(layer, weights, device, plan.seed)
        judge = Judge(layer, weights, probes, hardware_class(device).name)
        for tokens, operation in shapes:
            self.tell(f"{layer.model} tp {layer.tp}, {tokens} tokens, {operation}")
            needed = needed_bytes(layer, operation, tokens, len(self.installed)) - layer.num_bytes
            if refused := self._refused(needed):
                self._not_run(layer, tokens, operation, refused)
                continue
            batch = draw_batch(layer, weights, probes, tokens, device, plan.seed)
            self._shape(_Shape(layer, weights, batch, operation, judge), clock)

    def _refused(self, num_bytes: int) -> str:
        """Why nothing of that size is begun, or ""."""
        if time.monotonic() - self.began > self.plan.deadline:
            return f"the deadline of {self.plan.deadline:g} s was over"
        free = free_bytes(self.plan.device)
        if num_bytes <= free:
            return ""
        return f"does not fit: needs about {num_bytes / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"

    def _shape(self, shape: _Shape, clock: AnyClock) -> None:
        """Prepare every subject, compare what will be timed with the truth, time who is right in turns, write all."""
        lines, calls = dict[str, TimingLine](), dict[str, tuple[Call, Prepared]]()
        place, work, load = _Place(shape.layer, len(shape.batch.x_TH), shape.operation), shape.work, shape.load
        with clock.running():
            for subject in self.installed:
                status, reason, ratio = self._compared(subject, shape, clock, calls)
                lines[subject.name] = replace(
                    _line(self.name, subject, place, status, reason), ratio=ratio, rows=load.rows, visited=load.visited,
                    flop=work.flop, num_bytes=work.num_bytes)
            ranked = [name for name, line in lines.items() if line.status == "TIMED"]
            spreads = interleaved({name: calls[name][1].call for name in ranked}, clock,
                                  self.plan.budget * len(ranked) if self.plan.device == "cuda" else 0.0)
            for name, spread in spreads.items():
                call, prepared = calls[name]
                kernels, reason = self._profiled(call, clock)
                lines[name] = replace(lines[name], mode=prepared.mode, mode_reason=prepared.reason, reason=reason,
                                      seconds=_numbers(spread), repetitions=spread.repetitions,
                                      parts=_parts(kernels, shape), kernels=_kernels(kernels))
        for line in lines.values():
            self._keep(line)

    def _compared(self, subject: Subject, shape: _Shape, clock: AnyClock,
                  calls: dict[str, tuple[Call, Prepared]]) -> tuple[str, str, Number]:
        """(status, reason, ratio) of the very call that is timed, which is left in `calls`: a graph is replayed."""
        if refused := subject.refusal(shape.layer, shape.operation, self.plan.device):
            return "NOT RUN", refused, "nan"
        try:
            call = subject.call(shape.operation, shape.layer, shape.weights, shape.batch)
            prepared = clock.prepare(call)
            got, calls[subject.name] = prepared.call(), (call, prepared)
        except (UsageError, ImportError, NotImplementedError, torch.OutOfMemoryError) as error:
            return "NOT RUN", _words(error), "nan"
        except Exception as error:  # a subject may raise anything
            return "CRASHED", _words(error), "nan"
        if not isinstance(got, torch.Tensor | dict):
            return "CRASHED", f"returned {type(got).__name__}, but should return a tensor", "nan"
        try:
            ratio = shape.judge.ratio(shape.operation, subject.numerics(shape.layer), shape.batch, got)
        except OverflowError as error:
            return "NOT RUN", str(error), "nan"
        if math.isnan(ratio):
            return "NOT RUN", "no probe has a certain choice of experts, so that nothing can be compared", "nan"
        if ratio > 1:
            return "WRONG", f"an error is {ratio:.2g} times what is allowed", to_number(ratio)
        return "TIMED", "", to_number(ratio)

    def _profiled(self, call: Call, clock: AnyClock) -> tuple[list[Kernel], str]:
        """The kernels of a call, and why there are none; times are kept where a machine does not let itself be seen."""
        if not self.plan.kernels:
            return [], ""
        try:
            kernels = profiled(call, clock)
        except RuntimeError as error:
            return [], f"not profiled: {_words(error)}"
        return kernels, "" if kernels else "not profiled: no kernel was seen"


@dataclass(frozen=True)
class _Place:
    """What a line is about."""

    layer: RankLayer
    tokens: int
    operation: Operation


def _line(run: str, subject: Subject, place: _Place | None, status: str, reason: str) -> TimingLine:
    """A line without times; place None: of the subject as a whole."""
    if place is None:
        return TimingLine(run=run, subject=subject.name, model="", tp=0, tokens=0, operation="", status=status,
                          reason=reason)
    return TimingLine(run=run, subject=subject.name, model=place.layer.model, tp=place.layer.tp, tokens=place.tokens,
                      operation=place.operation, status=status, reason=reason)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _numbers(spread: Spread) -> tuple[Number, Number, Number]:
    return to_number(spread.median), to_number(spread.low), to_number(spread.high)


def _kernels(kernels: list[Kernel]) -> list[KernelResult]:
    return [KernelResult(name=one.name, part=one.part, starts=to_number(one.starts), seconds=to_number(one.seconds))
            for one in kernels[:_KEPT_KERNELS]]


def _parts(kernels: list[Kernel], shape: _Shape) -> list[PartResult]:
    """Time of every part that has kernels; a backward pass has other products, and none of these names."""
    seconds = Counter[str]()
    for one in kernels:
        seconds[one.part] += one.seconds  # type: ignore[assignment]
    results = []
    for part in (part for part in PARTS if part in seconds and shape.operation is not Operation.BACKWARD):
        work = part_work(shape.layer.spec, part, shape.load) or Work(0.0, 0.0)
        results.append(PartResult(name=part, seconds=to_number(seconds[part]), flop=work.flop,
                                  num_bytes=work.num_bytes))
    return results
