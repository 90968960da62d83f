"""A whole run: plan, children, records, resume, exit code."""

import math
import signal
import threading
import time
import uuid
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from pathlib import Path
from types import FrameType

import torch

import moe_ref
from moe_ref.adapters.catalogue import find
from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import EXECUTED_VERDICTS, RED_VERDICTS, Verdict
from moe_ref.records.schema import CaseLine, EndLine, Implementation, RunLine, to_number
from moe_ref.records.store import FILE_NAME, RecordWriter, holds_lines, read_run
from moe_ref.tiers.tiers import PlannedCase
from moe_ref.tolerances.load import load_tolerances
from moe_ref.tolerances.numbers import numbers_of
from moe_ref.verify.run.batches import batch_words
from moe_ref.verify.run.case_runner import USAGE_PREFIX, Pool, RunSettings, run_case, unrun_line
from moe_ref.verify.run.children import Child, ChildPool
from moe_ref.verify.run.environment import environment
from moe_ref.verify.run.untried import untried

EXIT_OK, EXIT_MISMATCH, EXIT_USAGE, EXIT_HARNESS, EXIT_TOO_FEW = range(5)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run and how; pairs: axis pairs covered and possible, (0, 0) for hand-picked cases.

    deadline: seconds after which no further case is started; those left are recorded as not run. num_started, hosts:
    ranks that torchrun started, and where. lane: of ci/lanes.yaml, "" outside of them.
    """

    implementation: str
    cases: list[PlannedCase]
    tier: str
    minimum_executed: int
    pairs: tuple[int, int] = (0, 0)
    device: str = "cpu"
    lanes: int = 2
    runs: int = 2
    time_limit: float = 300.0
    memory_gib: float = 0.0
    deadline: float = math.inf
    record: Path | None = None
    resume: bool = False
    num_started: int = 0
    hosts: str = ""
    lane: str = ""


DEADLINE_PREFIX = "the run's deadline"


@dataclass(frozen=True)
class RunResult:
    """All lines in plan order, what the run ends with, what is declared but was in no case that ran, and what other
    batches did to rows.
    """

    header: RunLine
    lines: list[CaseLine]
    end: EndLine
    untried: list[str] = field(default_factory=list)
    batches: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Observer:
    """Who watches a run: `line` gets every finished case, `tell` what a case in progress does (id, words)."""

    line: Callable[[CaseLine], None] = lambda line: None
    tell: Callable[[str, str], None] = lambda case_id, text: None


def run_plan(plan: Plan, observer: Observer = Observer()) -> RunResult:
    """Run every case; each line is on disk before the next is reported. Raises UsageValueError on wrong use."""
    torch.set_num_threads(1)
    started = time.monotonic()
    pool, first = ChildPool(plan.implementation, plan.memory_gib), Child(plan.implementation, plan.memory_gib)
    capabilities = first.capabilities()
    pool.adopt(first)
    try:
        return run_with(plan, pool, capabilities, first.source_digest, started, observer)
    finally:
        pool.close()


def run_with(plan: Plan, pool: Pool, capabilities: Capabilities, source_digest: str, started: float,
             observer: Observer) -> RunResult:
    """run_plan on ranks that are there already; started: when, on the monotonic clock."""
    # The writer first: what it has locked nobody else adds to while it is read.
    with RecordWriter(plan.record) if plan.record else nullcontext() as writer:
        append = writer.append if writer else lambda line: None
        header, done = new_header(plan, capabilities, source_digest), None
        if writer and holds_lines(writer.path):
            header, done = _resumed(plan, header)
        settings = replace(run_settings(plan, header, capabilities), tell=observer.tell)
        if done is None:
            append(header)
        lines = dict(done or {})
        left = [one for one in plan.cases if one.case_id not in lines]
        with closing(_run_cases(left, settings, plan, pool, started)) as ready:
            for line in ready:
                lines[line.case] = line
                append(line)
                observer.line(line)
        end = end_line(plan, header.run, list(lines.values()), time.monotonic() - started)
        append(end)
    ran = [one.case for one in plan.cases if lines[one.case_id].verdict in EXECUTED_VERDICTS]
    return RunResult(header, [lines[one.case_id] for one in plan.cases], end, untried(capabilities, ran),
                     batch_words(capabilities.batch_invariant, lines.values()))


def new_header(plan: Plan, capabilities: Capabilities, source_digest: str) -> RunLine:
    """The run line of a new run."""
    implementation = Implementation(name=plan.implementation, version=capabilities.version,
                                    source_digest=source_digest)
    tolerances = load_tolerances(today=_today())
    return RunLine(run=uuid.uuid4().hex[:12], started=_now(), implementation=implementation, tier=plan.tier,
                   lane=plan.lane, cases=[one.case_id for one in plan.cases], minimum_executed=plan.minimum_executed,
                   axis_pairs=plan.pairs, environment=environment(plan.device) | _hosts(plan) | _packages(plan),
                   tolerances_digest=tolerances.digest, oracle_version=moe_ref.__version__,
                   tolerances={path: to_number(value) for path, value in numbers_of(tolerances.file).items()})


def _hosts(plan: Plan) -> dict[str, str]:
    return {"ranks": str(plan.num_started), "hosts": plan.hosts} if plan.num_started else {}


def _packages(plan: Plan) -> dict[str, str]:
    """What an adapter is an adapter of."""
    adapter = find(plan.implementation)
    found = [f"{library.distribution} {library.found()}" for library in adapter.libraries] if adapter else []
    return {"packages": ", ".join(found)} if found else {}


def run_settings(plan: Plan, header: RunLine, capabilities: Capabilities) -> RunSettings:
    """What all cases of the run share."""
    today = _today()
    return RunSettings(run=header.run, implementation=header.implementation, capabilities=capabilities,
                       tolerances=load_tolerances(today=today), device=plan.device, runs=plan.runs,
                       time_limit=plan.time_limit, replay_options=_replay_options(plan), num_started=plan.num_started,
                       hardware=header.environment["hardware"], today=today)


def _replay_options(plan: Plan) -> str:
    """The options that a replay needs to see what this run saw; defaults are left out."""
    chosen = (("--runs", plan.runs, 2), ("--time-limit", plan.time_limit, 300.0),
              ("--memory-gib", plan.memory_gib, 0.0))
    return "".join(f" {option} {value:g}" for option, value, default in chosen if value != default)


def _resumed(plan: Plan, fresh: RunLine) -> tuple[RunLine, dict[str, CaseLine]]:
    """Header and lines of the run in the record folder, if it is the same run that was cut short."""
    assert plan.record is not None
    path = plan.record / FILE_NAME
    if not plan.resume:
        raise UsageValueError(f"{path} holds a run already; give --resume, or another --record folder")
    run = read_run(path)
    wanted = {one.case_id: one.ranks for one in plan.cases}
    if other := [line.case for line in run.cases.values() if line.ranks != wanted.get(line.case, line.ranks)]:
        raise UsageValueError(f"{path}: {len(other)} recorded cases ran on other ranks, such as {other[0]}; "
                              "cannot resume")
    same = ("implementation", "cases", "tolerances_digest", "oracle_version")
    differing = [name for name in same if getattr(run.header, name) != getattr(fresh, name)]
    # The source digest in `implementation` says more than the commit, which may only have gained a document.
    old, new = ({name: value for name, value in header.environment.items() if name != "commit"}
                for header in (run.header, fresh))
    differing += [f"environment.{name}" for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if differing:
        raise UsageValueError(f"{path}: {', '.join(differing)} of the recorded run differ from this one; cannot resume")
    # What a deadline left out is what there is to go on with.
    return run.header, {name: line for name, line in run.cases.items() if not line.reason.startswith(DEADLINE_PREFIX)}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _today() -> date:
    return datetime.now(UTC).date()


def weight_elements(planned: PlannedCase) -> int:
    """Elements of all experts that tokens may visit: what a case costs, roughly."""
    spec, tokens = planned.case.problem.spec, planned.case.problem.num_tokens
    return 3 * spec.hidden_size * spec.intermediate_size * min(spec.num_experts, 1 + tokens * spec.top_k)


def _run_cases(cases: list[PlannedCase], settings: RunSettings, plan: Plan, pool: Pool,
               started: float) -> Generator[CaseLine, None, None]:
    """Lines as they are ready, the most expensive cases first so that no lane is left with one at the end."""
    threads, stop = ThreadPoolExecutor(plan.lanes), threading.Event()

    def run_one(one: PlannedCase) -> CaseLine | None:
        if stop.is_set():
            return None
        if time.monotonic() - started > plan.deadline:
            return unrun_line(one, settings, f"{DEADLINE_PREFIX}, {plan.deadline:g} s, had passed")
        return run_case(one, settings, pool)

    try:
        futures = [threads.submit(run_one, one) for one in sorted(cases, key=weight_elements, reverse=True)]
        for future in as_completed(futures):
            line = future.result()
            if line is not None:
                yield line
    finally:
        # Also on an interrupt: what is recorded stays, children end, waiting cases are dropped.
        stop.set()
        threads.shutdown(wait=False, cancel_futures=True)


def end_line(plan: Plan, run: str, lines: list[CaseLine], seconds: float) -> EndLine:
    """The end line: counts by verdict, and the exit code they mean."""
    verdicts = {verdict.value: count for verdict in Verdict
                if (count := sum(line.verdict == verdict for line in lines))}
    executed = sum(line.verdict in EXECUTED_VERDICTS for line in lines)
    return EndLine(run=run, finished=_now(), seconds=round(seconds, 2), verdicts=verdicts, executed=executed,
                   exit_code=exit_code(lines, executed, plan.minimum_executed))


def exit_code(lines: list[CaseLine], executed: int, minimum: int) -> int:
    """0 as expected, 1 mismatch, 2 wrong use, 3 harness error, 4 too few executed, or cut short by a deadline.

    Wrong use only where nothing else went wrong: beside a mismatch it is one more crash.
    """
    if any(map(_is_usage, lines)) and all(_is_usage(line) for line in lines if _is_red(line)):
        return EXIT_USAGE
    if any(map(_is_red, lines)):
        return EXIT_MISMATCH
    if any(line.verdict == Verdict.HARNESS_ERROR for line in lines):
        return EXIT_HARNESS
    if any(line.reason.startswith(DEADLINE_PREFIX) for line in lines):
        return EXIT_TOO_FEW
    return EXIT_TOO_FEW if executed < minimum else EXIT_OK


def _is_red(line: CaseLine) -> bool:
    return line.verdict in RED_VERDICTS


def _is_usage(line: CaseLine) -> bool:
    return line.verdict == Verdict.CRASH and line.reason.startswith(USAGE_PREFIX)


def usage_errors(lines: list[CaseLine]) -> list[str]:
    """One line per distinct wrong use that ranks reported."""
    return sorted({line.reason.removeprefix(USAGE_PREFIX).partition("\n")[0] for line in lines if _is_usage(line)})


def end_on_terminate() -> None:
    """Turn SIGTERM into an interrupt, so that children end with us."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
