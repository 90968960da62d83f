"""Runs the ladder on a subject: what each step showed, and of the first that fails whose mistake it looks like."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.case import Case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.vocabulary import Ranks, Stage, Verdict
from moe_ref.inputs.build import build_inputs
from moe_ref.records.schema import CaseLine, from_number
from moe_ref.setup_cases.mapping import Explained, explained
from moe_ref.setup_cases.steps import Base, Step, base_of, ladder, square_twins
from moe_ref.tiers.tiers import PlannedCase
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.child.messages import Request
from moe_ref.verify.measure.placing import in_every_slot
from moe_ref.verify.run.case_runner import Pool, RunSettings, Worker, run_case
from moe_ref.verify.run.children import Answer

Outcome = Literal["pass", "fail", "not tried", "not declared", "says nothing"]

_UNRUN = {Verdict.UNSUPPORTED: "not declared", Verdict.NOT_RUN: "says nothing"}
_NUMBERS = (Verdict.MISMATCH, Verdict.PASS, Verdict.NOT_RUN, Verdict.NONDETERMINISTIC)
"""Verdicts after which there were tensors of the right shape."""


@dataclass(frozen=True)
class StepResult:
    """One step: how it ended, in words, and the line of the case that says so."""

    number: int
    name: str
    outcome: Outcome
    words: str
    line: CaseLine | None = None
    explained: Explained | None = None


@dataclass(frozen=True)
class SetupResult:
    """All steps, the first is that the subject loads and declares sense."""

    implementation: str
    device: str
    steps: tuple[StepResult, ...]

    @property
    def failure(self) -> StepResult | None:
        """The first step that fails."""
        return next((step for step in self.steps if step.outcome == "fail"), None)

    @property
    def num_passed(self) -> int:
        return sum(step.outcome == "pass" for step in self.steps)

    @property
    def verdict(self) -> str:
        """One line: which step fails and where to look."""
        failure = self.failure
        if failure is None:
            return f"setup: {self.num_passed} of {len(self.steps)} steps pass, none fails"
        return f"setup {failure.number} of {len(self.steps)} fails ({failure.name}): {failure.words}"


@dataclass
class _Keeping:
    """A pool whose last answer is kept, so that the numbers of a case are at hand beside its line."""

    pool: Pool
    last: list[Answer] = field(default_factory=list)

    @contextmanager
    def lease(self, process_ranks: bool) -> Iterator["_KeepingWorker"]:
        with self.pool.lease(process_ranks) as worker:
            yield _KeepingWorker(worker, self.last)


@dataclass
class _KeepingWorker:
    worker: Worker
    last: list[Answer]

    def ask(self, request: Request, on_progress: Callable[[str], None] = lambda text: None) -> Answer:
        self.last[:] = [self.worker.ask(request, on_progress)]
        return self.last[0]


def run_setup(settings: RunSettings, pool: Pool, spec: MoESpec | None = None) -> SetupResult:
    """Every step of the ladder on ranks that are there already; raises UsageValueError where nothing can be asked.

    spec: the mathematics to ask for, in small sizes; the plainest layer that is declared, and each option, without.
    """
    capabilities = settings.capabilities
    base = base_of(capabilities, spec)
    if settings.device not in capabilities.devices:
        raise UsageValueError(f"CAPABILITIES of {capabilities.name}: device {settings.device}, but should be one of "
                              f"{', '.join(capabilities.devices)}")
    steps = ladder(base, capabilities)
    ladder_run = _Ladder(settings, _Keeping(pool), len(steps) + 1)
    results = [StepResult(1, "loads", "pass", _declared(capabilities, base))]
    for number, step in enumerate(steps, 2):
        failed = [one.name for one in results if one.outcome == "fail" and one.name in step.stands_on]
        results.append(StepResult(number, step.name, "not tried", f"stands on {failed[0]}") if failed
                       else ladder_run.step(number, step))
    return SetupResult(settings.implementation.name, settings.device, tuple(results))


def _declared(capabilities: Capabilities, base: Base) -> str:
    router = base.spec.router
    what = f"{router.score} router, " if router else ""
    dtypes = ", ".join(capabilities.numerics)
    return f"asked in {base.dtype} (of {dtypes}): {what}{base.spec.experts.activation} experts, sizes of {base.size}"


MORE_TOKENS = 16


@dataclass(frozen=True)
class _Ladder:
    settings: RunSettings
    pool: _Keeping
    count: int

    def run(self, case: Case, purpose: str) -> CaseLine:
        """One case; process ranks only where virtual ones are not declared."""
        self.pool.last.clear()
        ranks = self.settings.capabilities.ranks
        kind = Ranks.LOCAL if Ranks.LOCAL in ranks or case.parallel.size == 1 else ranks[0]
        return run_case(PlannedCase(case=case, purpose=purpose, ranks=kind), self.settings, self.pool)  # pyrefly: ignore

    def step(self, number: int, step: Step) -> StepResult:
        """The first of its cases that fails, or what the worst of those that ran shows."""
        lines = []
        for index, case in enumerate(step.cases):
            line = self.run(case, f"setup: {step.name}")
            if self._fails(line, step):
                failed = self.failure(number, step, case, line)
                return replace(failed, words=f"{step.named[index]}: {failed.words}") if step.named else failed
            lines.append(line)
        ran = [line for line in lines if line.verdict not in _UNRUN or (step.only_runs and line.stages)]
        if not ran:
            return StepResult(number, step.name, _UNRUN[lines[0].verdict], lines[0].reason, lines[0])  # pyrefly: ignore
        return StepResult(number, step.name, "pass", _shown(step, ran, len(lines)), ran[0])

    @staticmethod
    def _fails(line: CaseLine, step: Step) -> bool:
        if line.verdict in (Verdict.PASS, *_UNRUN):
            return False
        return not (step.only_runs and line.verdict in _NUMBERS)

    def failure(self, number: int, step: Step, case: Case, line: CaseLine) -> StepResult:
        """With the mistake that explains it, looked for in square sizes too where matrices do not fit."""
        found = self.explain(case)
        if line.verdict in (Verdict.MISMATCH, Verdict.NONDETERMINISTIC):
            if found is not None and case.problem.num_tokens == 1:
                # One token has one expert: which order they are in, or whose choice it was, more tokens say.
                more = replace(case, problem=replace(case.problem, num_tokens=MORE_TOKENS))
                self.run(more, f"setup: {step.name}, more tokens")
                found = self.explain(more) or found
            return StepResult(number, step.name, "fail", _blamed(line, found), line, found)
        said = f"{line.verdict}: {line.reason.partition(chr(10))[0]}"
        if line.verdict == Verdict.HARNESS_ERROR:
            return StepResult(number, step.name, "fail", said, line)
        if found is not None:
            return StepResult(number, step.name, "fail", f"adapter: {said}; beside it, {found.words}", line, found)
        for twin in square_twins(case):
            if self.run(twin, f"setup: {step.name}, square").verdict == Verdict.MISMATCH:
                found = self.explain(twin)
                if found is not None:
                    spec = twin.problem.spec
                    where = f"with H {spec.hidden_size} and I {spec.intermediate_size} it runs: "
                    return StepResult(number, step.name, "fail", f"{said}; {where}{_blame(found)}", line, found)
        return StepResult(number, step.name, "fail", f"adapter: {said}", line)

    def explain(self, case: Case) -> Explained | None:
        """The mistake behind the last answer."""
        settings, [*answers] = self.settings, self.pool.last
        if not answers or not answers[0].runs:
            return None
        numerics = settings.capabilities.contract(case.problem)
        model = RoundingModel.of(settings.tolerances, settings.hardware or settings.device, numerics,
                                 case.problem.dtype)
        try:
            return explained(case, build_inputs(case.problem), in_every_slot(case, answers[0].runs[0]), numerics, model)
        except Exception:
            # A subject can be wrong in ways that no hypothesis is made for; the step has failed all the same.
            return None


def _shown(step: Step, ran: list[CaseLine], count: int) -> str:
    stages = [stage for line in ran for stage in line.stages if not step.only_runs]
    of_output = [from_number(stage.ratio) for stage in stages if stage.stage == Stage.OUTPUT]
    of_gradients = [from_number(stage.ratio) for stage in stages if Stage(stage.stage).is_gradient]
    what, ratios = ("gradients", of_gradients) if of_gradients else ("output", of_output)
    worst = f"{what} at {max(ratios):.2g} of what is allowed" if ratios else ""
    cases = f"{len(ran)} of {count} cases" if len(ran) < count else f"{count} cases" if count > 1 else ""
    differ = "other bits when called again, which is not promised" * any(line.same_bits is False for line in ran)
    return "; ".join(filter(None, (step.shows, cases, worst, differ)))


def _blame(found: Explained) -> str:
    if found.whose == "adapter":
        return f"adapter: {found.words}; check your adapter before reading other failures"
    return f"no mapping mistake explains it, a kernel's does: {found.words}"


def _blamed(line: CaseLine, found: Explained | None) -> str:
    """Whose mistake a mismatch is, as far as its numbers say."""
    if found is not None:
        return _blame(found)
    output = next((stage for stage in line.stages if stage.stage == Stage.OUTPUT), None)
    first = line.first_stage
    at = f"{first} at {_ratio(line, first):.2g} of what is allowed" if first else line.reason.partition("\n")[0]
    if first and Stage(first).is_gradient:
        return f"the forward pass is right, {at}: look at the backward pass, or at what the adapter keeps out of it"
    if first and first != Stage.OUTPUT and output is not None and from_number(output.ratio) <= 1:
        return (f"adapter: the output is right, but {at}: shown in another order, at another point or less rounded "
                "than declared")
    return f"no mapping mistake explains it ({at}): look at the kernel, at its declared numerics, or for two mistakes"


def _ratio(line: CaseLine, stage: str) -> float:
    return next((from_number(one.ratio) for one in line.stages if one.stage == stage), float("nan"))
