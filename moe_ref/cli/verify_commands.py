"""`verify` runs a matrix, `replay` one case."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import msgspec

from moe_ref.cli.progress import watch
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import RED_VERDICTS, Ranks, Verdict
from moe_ref.records.schema import CaseLine, from_number
from moe_ref.tiers.tiers import MINIMUM_EXECUTED, PlannedCase, tier, with_tp
from moe_ref.verify.run.environment import default_device
from moe_ref.verify.run.run import EXIT_USAGE, Plan, RunResult, end_on_terminate, run_plan, usage_errors
from moe_ref.verify.run.torchrun import Run, run_on_torchrun

_SHOWN_FAILURES = 10


def _positive(context: click.Context, parameter: click.Parameter, value: float) -> float:
    if not 0 < value < math.inf:
        raise click.BadParameter(f"{value}, but should be positive and finite")
    return value


_RUN_OPTIONS = [
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
    click.option("--runs", type=click.IntRange(1), default=2, show_default=True,
                 help="Runs per case; memory is poisoned differently in each; fewer than 2 cannot see nondeterminism."),
    click.option("--time-limit", type=float, default=300.0, show_default=True, callback=_positive,
                 help="Seconds per case."),
    click.option("--memory-gib", type=click.FloatRange(0.0, 1e6), default=0.0, show_default=True,
                 help="Private memory a child may take; 0 is no limit."),
    click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output."),
]


def _run_options(command: Callable) -> Callable:
    for option in reversed(_RUN_OPTIONS):
        command = option(command)
    return command


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(text) for text in value.split(",")) if value else ()
    except ValueError as error:
        raise click.BadParameter(f"{value!r}, but should be numbers with commas, as 1,2,4") from error


def _shard(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int]:
    try:
        index, count = (int(text) for text in (value or "1/1").split("/"))
    except ValueError as error:
        raise click.BadParameter(f"{value!r}, but should be as 2/3") from error
    if not 1 <= index <= count:
        raise click.BadParameter(f"{value!r}, but the first number should be from 1 to the second")
    return index, count


@click.command("verify")
@click.argument("implementation")
@click.option("--tier", "tier_name", type=click.Choice(list(MINIMUM_EXECUTED)), default=None,
              help="Which matrix to run; smoke when no case is named.")
@click.option("--case", "case_ids", multiple=True, help="A case id; may be given several times.")
@click.option("--tp", callback=_numbers,
              help="With a tier: only these tp degrees. With --case: each case at each of them.")
@click.option("--ranks", type=click.Choice([kind.value for kind in Ranks]), default=None,
              help="Run all cases on these ranks; the tier `ranks` already runs on gloo; torchrun: those of "
                   "`torchrun ... -m moe_ref verify`.")
@click.option("--shard", callback=_shard, help="i/n: every n-th of the list of cases, starting with the i-th.")
@click.option("--record", type=click.Path(path_type=Path), default=None,
              help="Folder for records.jsonl, which `moe-ref report` reads.")
@click.option("--resume", is_flag=True, help="Go on with the run in the record folder.")
@click.option("--lanes", type=click.IntRange(1), default=min(2, os.cpu_count() or 1), show_default=True,
              help="Processes that run cases side by side.")
@click.option("--deadline", type=float, default=math.inf, help="Seconds after which no further case is started.")
@click.option("--minimum", type=int, default=None,
              help="Fewest cases that must execute; default: the tier's own, which `moe-ref list` prints, divided by "
                   "the n of --shard; with --tp or --case 1.")
@click.option("--lane", envvar="MOE_LANE", show_envvar=True, default="",
              help="Lane of ci/lanes.yaml that this run is of, for the record.")
@_run_options
def verify_command(implementation: str, tier_name: str | None, case_ids: tuple[str, ...], tp: tuple[int, ...],
                   ranks: str | None, shard: tuple[int, int], record: Path | None, resume: bool, lanes: int,
                   deadline: float, minimum: int | None, lane: str, device: str, runs: int, time_limit: float,
                   memory_gib: float, as_json: bool) -> int:
    """Judge IMPLEMENTATION (a registered name, a module, or module:attr) on a matrix of cases."""
    plan = _plan_cases(tier_name, case_ids, tp)
    cases = plan.cases[shard[0] - 1::shard[1]]
    if not cases:
        raise UsageValueError(f"shard {shard[0]}/{shard[1]} holds none of the {len(plan.cases)} cases")
    if ranks:
        cases = [replace(one, ranks=Ranks(ranks)) for one in cases]
    whole = not tp and not case_ids
    share = plan.minimum_executed // shard[1] if whole else min(1, len(cases))
    least = minimum if minimum is not None else share
    pairs = plan.pairs if whole and shard[1] == 1 else (0, 0)
    plan = replace(plan, implementation=implementation, cases=cases, pairs=pairs, minimum_executed=least, lanes=lanes,
                   device=default_device() if device == "auto" else device, runs=runs, time_limit=time_limit,
                   memory_gib=memory_gib, deadline=deadline, record=record, resume=resume, lane=lane)
    return _on_ranks(ranks, plan, lambda run: _run(plan, as_json, run))


def run_and_tell(plan: Plan) -> int:
    """The exit code of a run whose summary was printed."""
    return _run(plan, False, run_plan)


def _on_ranks(ranks: str | None, plan: Plan, use: Callable[[Run], int]) -> int:
    """The exit code of use(run); under torchrun that of the first rank, while the others serve it."""
    if ranks != Ranks.TORCHRUN:
        return use(run_plan)
    if plan.memory_gib:
        raise UsageValueError(f"--memory-gib {plan.memory_gib:g} with --ranks torchrun, but there is no child to limit")
    return run_on_torchrun(plan.implementation, plan.device, plan.time_limit, use)


def _plan_cases(tier_name: str | None, case_ids: tuple[str, ...], tp: tuple[int, ...]) -> Plan:
    if case_ids and tier_name:
        raise UsageValueError("--tier and --case exclude each other; give one")
    if case_ids:
        cases = [PlannedCase(case=parse_case(text), purpose="named on the command line") for text in case_ids]
        if tp:
            cases = [with_tp(one, degree) for one in cases for degree in tp]
        unique = list({one.case_id: one for one in cases}.values())
        return Plan(implementation="", cases=unique, tier="", minimum_executed=len(unique))
    chosen = tier(tier_name or "smoke")
    cases = [one for one in chosen.cases if not tp or one.case.parallel.tp in tp]
    if not cases:
        raise UsageValueError(f"tier {chosen.name} has no case with tp {', '.join(map(str, tp))}")
    return Plan(implementation="", cases=cases, tier=chosen.name, minimum_executed=chosen.minimum_executed,
                pairs=(chosen.pairs_covered, chosen.pairs_possible))


def _run(plan: Plan, as_json: bool, run: Run) -> int:
    end_on_terminate()
    with watch(f"verify {plan.implementation}", len(plan.cases)) as observer:
        result = run(plan, observer)
    if result.end.exit_code == EXIT_USAGE:
        for text in usage_errors(result.lines):
            click.echo(f"moe-ref: {text}", err=True)
        return EXIT_USAGE
    click.echo(_json(result) if as_json else _summary(plan, result))
    return result.end.exit_code


def _json(result: RunResult) -> str:
    document = {"run": result.header, "cases": result.lines, "end": result.end, "untried": result.untried}
    return json.dumps(json.loads(msgspec.json.encode(document)), indent=1)


def _summary(plan: Plan, result: RunResult) -> str:
    """Failures in full, reasons of what did not run, the worst passing ratios, counts."""
    lines, end = [], result.end
    red = [line for line in result.lines if line.verdict in RED_VERDICTS | {Verdict.HARNESS_ERROR}]
    lines += [line.message + "\n" for line in red[:_SHOWN_FAILURES]]
    if len(red) > _SHOWN_FAILURES:
        lines.append(f"... and {len(red) - _SHOWN_FAILURES} more failures, all in the record\n")
    idle: dict[str, int] = {}
    for line in result.lines:
        if line.verdict in (Verdict.UNSUPPORTED, Verdict.NOT_RUN):
            idle[f"{line.verdict}: {line.reason}"] = idle.get(f"{line.verdict}: {line.reason}", 0) + 1
    lines += [f"{count} cases {reason}" for reason, count in sorted(idle.items())]
    lines += [f"declared, but in no case that ran: {', '.join(result.untried)}"] * bool(plan.tier and result.untried)
    lines += result.batches + _closest(result.lines)
    if plan.pairs[1]:
        lines.append(f"axis pairs covered: {plan.pairs[0]} of {plan.pairs[1]}")
    if plan.record:
        lines.append(f"record: {plan.record / 'records.jsonl'}")
    counts = ", ".join(f"{count} {verdict}" for verdict, count in end.verdicts.items())
    if plan.lane and end.executed < plan.minimum_executed:
        lines.append(f"lane {plan.lane} executed {end.executed} of at least {plan.minimum_executed} cases")
    enough = "" if end.executed >= plan.minimum_executed else f" (FEWER than the {plan.minimum_executed} required)"
    name = result.header.implementation
    lines.append(f"{'PASS' if end.exit_code == 0 else 'FAIL'}  {name.name} {name.version} on {plan.device}: "
                 f"{counts}; {end.executed} of {len(result.lines)} executed{enough} in {end.seconds:.1f} s")
    return "\n".join(lines)


def _closest(lines: list[CaseLine]) -> list[str]:
    """The passing case whose whole-layer result came nearest to its bound."""
    passing = [(from_number(stage.ratio), line.case) for line in lines if line.verdict == Verdict.PASS
               for stage in line.stages if stage.stage == "output"]
    if not passing:
        return []
    ratio, case = max(passing)
    return [f"closest to its limit: output at {ratio:.2g} in {case}"]


@click.command("replay")
@click.argument("case_id")
@click.option("--impl", "implementation", required=True, help="The implementation to run.")
@click.option("--ranks", type=click.Choice([kind.value for kind in Ranks]), default=Ranks.LOCAL.value,
              show_default=True)
@_run_options
def replay_command(case_id: str, implementation: str, ranks: str, device: str, runs: int, time_limit: float,
                   memory_gib: float, as_json: bool) -> int:
    """One case again, with every stage's numbers; the id fixes the inputs, so nothing else is needed."""
    planned = PlannedCase(case=parse_case(case_id), purpose="replay", ranks=Ranks(ranks))
    plan = Plan(implementation=implementation, cases=[planned], tier="", minimum_executed=1, lanes=1, runs=runs,
                device=default_device() if device == "auto" else device, time_limit=time_limit, memory_gib=memory_gib)
    return _on_ranks(ranks, plan, lambda run: _replay(plan, as_json, run))


def _replay(plan: Plan, as_json: bool, run: Run) -> int:
    end_on_terminate()
    with watch("replay", 1) as observer:
        result = run(plan, observer)
    if result.end.exit_code == EXIT_USAGE:
        click.echo(f"moe-ref: {usage_errors(result.lines)[0]}", err=True)
        return EXIT_USAGE
    line = result.lines[0]
    if as_json:
        click.echo(_json(result))
        return result.end.exit_code
    click.echo(line.message)
    for stage in line.stages:
        click.echo(f"  {stage.stage:8} error/allowed {from_number(stage.ratio):<10.4g} {stage.num_bad} of "
                   f"{stage.num_checked} above, scale {from_number(stage.scale):.6g}, bias "
                   f"{from_number(stage.bias):+.2g} {stage.note}")
    for call in line.collectives:
        click.echo(f"  {call.operation}: {call.calls} call of {call.num_elements} elements, "
                   f"{call.num_bytes} bytes per rank")
    click.echo(f"  {line.runs} runs, same bits {line.same_bits}, {line.subject_seconds:.2f} s subject, "
               f"{line.oracle_seconds:.2f} s oracle, inputs {line.inputs_digest}")
    return result.end.exit_code
