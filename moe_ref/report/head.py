"""The five head lines, the same words in terminal, Markdown, HTML and JSON; and the exit code."""

from collections import Counter

from moe_ref.contract.vocabulary import RED_VERDICTS, Verdict
from moe_ref.records.schema import CaseLine
from moe_ref.records.store import Run
from moe_ref.report.axes import case_axes, size_of
from moe_ref.report.baseline import Baseline
from moe_ref.report.compare import Comparison
from moe_ref.report.facts import (
    case_lines,
    culprit,
    failures,
    is_executed,
    is_red,
    margin_stage,
    nearest_pass,
    reasons,
)
from moe_ref.report.words import excess, format_ratio, one_line, plural, replay, where

PASS, FAILED, HARNESS_ERROR, TOO_FEW = 0, 1, 3, 4
_ENVIRONMENT = {"device": "", "cpu_count": "CPUs ", "kernels": "kernels: ",
                "driver": "driver ", "cuda": "CUDA ", "nccl": "NCCL ", "torch": "torch ", "triton": "triton ",
                "numpy": "numpy ", "python": "python ", "commit": "commit "}
_REASONS_SHOWN = 2


def head_lines(run: Run, comparison: Comparison | None = None,
               baseline: Baseline | None = None) -> tuple[str, ...]:
    """Verdict and change; on what; how much really ran; where to look first; closest to its limit."""
    lines = case_lines(run)
    return (_verdict_line(run, lines, comparison), _machine_line(run), _count_line(run, lines),
            _first_line(run, lines, comparison), _close_line(lines, baseline))


def exit_code(run: Run, comparison: Comparison | None = None) -> int:
    """0 ok; 1 failures or coverage lost; 3 harness errors only; 4 cut short or fewer run than the minimum."""
    lines = case_lines(run).values()
    if any(map(is_red, lines)) or (comparison and comparison.coverage_lost):
        return FAILED
    if any(line.verdict == Verdict.HARNESS_ERROR for line in lines):
        return HARNESS_ERROR
    return TOO_FEW if shortfalls(run) else PASS


def shortfalls(run: Run) -> list[str]:
    """Why the run tested less than it should have, in words; empty if it did not."""
    executed = sum(map(is_executed, case_lines(run).values()))
    minimum = max(run.header.minimum_executed, 1)
    return ["run was cut short"] * (run.end is None) + [
        f"executed {executed} of at least {minimum}"] * (executed < minimum)


def _verdict_line(run: Run, lines: dict[str, CaseLine], comparison: Comparison | None) -> str:
    implementation = run.header.implementation
    digest = f"+{implementation.source_digest[:7]}" if implementation.source_digest else ""
    name = one_line(f"{implementation.name} {implementation.version}{digest}", 80)
    errors = sum(line.verdict == Verdict.HARNESS_ERROR for line in lines.values())
    parts = shortfalls(run) + [plural(errors, "harness error")] * bool(errors)
    if comparison is None:
        parts.append(plural(sum(map(is_red, lines.values())), "failure"))
        change = "no baseline given"
    else:
        parts.append(plural(len(comparison.new_failures), "new failure"))
        parts += [plural(len(comparison.old_failures), "old failure")] * bool(comparison.old_failures)
        parts += [f"{len(comparison.fixed)} fixed",
                  f"coverage -{len(comparison.coverage_lost)} +{len(comparison.coverage_gained)}",
                  f"drift +{len(comparison.drift)}"]
        parts += [f"{len(comparison.excused)} newly excused"] * bool(comparison.excused)
        change = f"vs {one_line(comparison.baseline, 80)}"
    return f"{'FAIL' if exit_code(run, comparison) else 'PASS'}  {name}: {', '.join(parts)}; {change}"


def _machine_line(run: Run) -> str:
    header = run.header
    facts = dict(header.environment)
    if facts.get("device") and facts.get("device_count", "1") != "1":
        facts["device"] = f"{facts['device_count']}x {facts['device']}"
    found = [word + one_line(facts[key], 60) for key, word in _ENVIRONMENT.items() if facts.get(key)]
    duration = f"{run.end.seconds:.0f} s" if run.end and run.end.seconds < 120 else (
        f"{run.end.seconds / 60:.0f} min" if run.end else "unknown duration")
    machine = ", ".join(found) or "an unrecorded machine"
    tier = f"tier {one_line(header.tier, 40)}" if header.tier else "cases named by hand"
    return f"on    {machine}; {tier}, {duration}"


def _count_line(run: Run, lines: dict[str, CaseLine]) -> str:
    found = Counter(line.verdict for line in lines.values())
    red = {str(verdict): found[verdict] for verdict in Verdict if verdict in RED_VERDICTS and found[verdict]}
    kinds = f" ({', '.join(f'{number} {verdict}' for verdict, number in red.items())})" if red else ""
    parts = [f"{found[Verdict.PASS]} pass", f"{sum(red.values())} FAIL{kinds}",
             plural(found[Verdict.KNOWN_FAILURE], "known failure"),
             f"{found[Verdict.UNSUPPORTED]} unsupported{_reasons(lines, Verdict.UNSUPPORTED)}",
             f"{found[Verdict.NOT_RUN]} not run{_reasons(lines, Verdict.NOT_RUN)}"]
    if errors := found[Verdict.HARNESS_ERROR]:
        parts.append(plural(errors, "harness error") + _reasons(lines, Verdict.HARNESS_ERROR))
    executed = sum(map(is_executed, lines.values()))
    return (f"cases {len(lines)} chosen, {executed} executed (minimum {run.header.minimum_executed}): "
            + ", ".join(parts))


def _reasons(lines: dict[str, CaseLine], verdict: Verdict) -> str:
    """' (12 not declared: ep 2; 3 ...; and 4 for 2 more reasons)', or ''."""
    found = reasons(lines.values(), verdict)
    words = [f"{number} {one_line(reason, 60)}" for reason, number in found[:_REASONS_SHOWN]]
    rest = found[_REASONS_SHOWN:]
    if rest:
        words.append(f"{sum(number for _, number in rest)} for {plural(len(rest), 'more reason')}")
    return f" ({'; '.join(words)})" if words else ""


def _first_line(run: Run, lines: dict[str, CaseLine], comparison: Comparison | None) -> str:
    red, new = failures(lines.values()), comparison.new_failures if comparison else ()
    if new:
        red = [line for line in red if line.case in new]
    if red:
        return "first " + _where_failures_are(red, list(lines.values()), bool(new))
    errors = [line for line in lines.values() if line.verdict == Verdict.HARNESS_ERROR]
    if errors:
        return ("first harness error, not a verdict on the implementation: "
                f"{one_line(errors[0].reason, 120)}; repro: {one_line(replay(errors[0]))}")
    if comparison and comparison.coverage_lost:
        case, reason = comparison.coverage_lost[0]
        note = f" ({one_line(comparison.notes[0])})" if comparison.notes else ""
        number = plural(len(comparison.coverage_lost), "case")
        return (f"first nothing failed, but {number} of the baseline did not run{note}, such as "
                f"{one_line(case)}: {one_line(reason, 120)}")
    if shortfalls(run):
        return "first nothing failed in what ran, which is too little to say more"
    if comparison and comparison.drift:
        drift = comparison.drift[0]
        return (f"first nothing failed; largest drift: {one_line(drift.stage)} of {one_line(drift.case)} "
                f"{format_ratio(drift.before)} -> {format_ratio(drift.now)} of its bound")
    return "first nothing failed"


def _where_failures_are(red: list[CaseLine], lines: list[CaseLine], new: bool) -> str:
    """The groups of failures, what the largest shares, and the smallest case of it to begin with."""
    groups: dict[str, list[CaseLine]] = {}
    for line in red:
        groups.setdefault(_ending(line, len(red)), []).append(line)
    ranked = sorted(groups.items(), key=lambda group: -len(group[1]))
    words = [f"{len(members) if len(groups) > 1 else ''} {name}".strip() for name, members in ranked[:3]]
    words[0] += _traits(ranked[0][1], lines)
    if rest := sum(len(members) for _, members in ranked[3:]):
        words.append(f"{rest} elsewhere")
    simplest = min(ranked[0][1], key=lambda line: (size_of(line.case), line.case))
    stage = culprit(simplest)
    size = f"{excess(stage)}, " if stage and stage.num_bad else ""
    count = plural(len(red), "new failure" if new else "failure") + ":" * (len(groups) > 1)
    return (f"{count} {', '.join(words)}; {'smallest: ' if len(ranked[0][1]) > 1 else ''}"
            f"{size}{one_line(where(simplest), 160)}; repro: {one_line(replay(simplest))}")


def _ending(line: CaseLine, number: int) -> str:
    verb = "s" if number == 1 else ""
    if line.first_stage:
        return f"start{verb} in {one_line(line.first_stage, 40)}"
    return f"end{verb} in {line.verdict}"


def _traits(red: list[CaseLine], lines: list[CaseLine]) -> str:
    """What all failures share and others rarely have: ', all with tp 4 and ... (2 of the 2 such ...)'."""
    if len(red) < 2:
        return ""
    ran = [case_axes(line.case) for line in lines if is_executed(line)]
    axes = [case_axes(line.case) for line in red]
    shared = {name: value for name, value in axes[0].items()
              if all(other.get(name) == value for other in axes)}
    frequency = {name: sum(other.get(name) == value for other in ran) for name, value in shared.items()}
    telling = [name for name in shared if frequency[name] < len(ran)]
    traits = {name: shared[name] for name in sorted(telling, key=lambda name: frequency[name])[:2]}
    if not traits:
        return ""
    such = sum(traits.items() <= other.items() for other in ran)
    words = " and ".join(f"{name} {value}" for name, value in traits.items())
    return f", all with {words} ({len(red)} of the {such} such that ran)"


def _close_line(lines: dict[str, CaseLine], baseline: Baseline | None) -> str:
    nearest = nearest_pass(lines.values())
    stage = margin_stage(nearest) if nearest else None
    if nearest is None or stage is None:
        return "close no passing case with a measured ratio"
    before = baseline.cases[nearest.case].stages.get(stage.stage) if (
        baseline and nearest.case in baseline.cases) else None
    was = f" (was {format_ratio(before)})" if before is not None else ""
    return (f"close nearest pass: {one_line(stage.stage)} of {one_line(nearest.case)} at "
            f"{format_ratio(stage.ratio)} of its bound{was}; repro: {one_line(replay(nearest))}")

