"""The five head lines, the same words in terminal, Markdown, HTML and JSON; and the exit code."""

import re
from collections import Counter
from collections.abc import Sequence

from moe_ref.contract.vocabulary import RED_VERDICTS, Verdict
from moe_ref.records.schema import CaseLine, from_number
from moe_ref.records.store import Run
from moe_ref.report.axes import size_of
from moe_ref.report.baseline import Baseline
from moe_ref.report.bounds import looser_words
from moe_ref.report.compare import Comparison, DriftGroup
from moe_ref.report.facts import (
    case_lines,
    culprit,
    failures,
    is_executed,
    is_red,
    margin_stage,
    nearest_pass,
    ratio_of,
    reasons,
)
from moe_ref.report.traits import traits
from moe_ref.report.words import excess, format_ratio, one_line, plural, refused_words, replay, where

PASS, FAILED, HARNESS_ERROR, TOO_FEW = 0, 1, 3, 4
_ENVIRONMENT = {"device": "", "cpu_count": "CPUs ", "kernels": "kernels: ",
                "driver": "driver ", "cuda": "CUDA ", "nccl": "NCCL ", "torch": "torch ", "triton": "triton ",
                "numpy": "numpy ", "python": "python ", "commit": "commit "}
_REASONS_SHOWN = 2


def head_lines(run: Run, comparison: Comparison | None = None,
               baseline: Baseline | None = None, missing: str = "") -> tuple[str, ...]:
    """Verdict and change; on what; how much really ran; where to look first; closest to its limit.

    missing: the file that a folder of baselines does not hold.
    """
    lines = case_lines(run)
    return (_verdict_line(run, lines, comparison, missing), _machine_line(run), _count_line(run, lines),
            _first_line(run, lines, comparison), _close_line(lines, baseline))


def exit_code(run: Run, comparison: Comparison | None = None) -> int:
    """0 ok; 1 failures, stale expectations, coverage lost, bounds looser or contracts other than accepted; 3 harness
    errors or refused records; 4 cut short or fewer run than the minimum.
    """
    lines = case_lines(run).values()
    if any(map(is_red, lines)) or stale(run) or (comparison and (comparison.coverage_lost or comparison.looser
                                                   or comparison.other_contract)):
        return FAILED
    if run.refused or any(line.verdict == Verdict.HARNESS_ERROR for line in lines):
        return HARNESS_ERROR
    return TOO_FEW if shortfalls(run) else PASS


def stale(run: Run) -> list[str]:
    """A sentence for each entry of the expectations that covers no case that ran."""
    return run.end.stale if run.end else []


def shortfalls(run: Run) -> list[str]:
    """Why the run tested less than it should have, in words; empty if it did not."""
    executed = sum(map(is_executed, case_lines(run).values()))
    minimum = max(run.header.minimum_executed, 1)
    return ["run was cut short"] * (run.end is None) + [
        f"executed {executed} of at least {minimum}"] * (executed < minimum) + [
        f"executed {part.executed} of at least {part.minimum_executed} of {one_line(part.name, 40)}"
        for part in run.tiers if part.executed < part.minimum_executed]


def _verdict_line(run: Run, lines: dict[str, CaseLine], comparison: Comparison | None, missing: str) -> str:
    implementation = run.header.implementation
    digest = f"+{implementation.source_digest[:7]}" if implementation.source_digest else ""
    name = one_line(f"{implementation.name} {implementation.version}{digest}", 80)
    errors = sum(line.verdict == Verdict.HARNESS_ERROR for line in lines.values())
    parts = shortfalls(run) + [refused_words(run.refused)] * bool(run.refused)
    parts += [plural(errors, "harness error")] * bool(errors)
    parts += [f"{len(stale(run))} stale in the expectations"] * bool(stale(run))
    if comparison is None:
        parts.append(plural(sum(map(is_red, lines.values())), "failure"))
        change = f"nothing accepted yet as {missing}" if missing else "no baseline given"
    else:
        parts += _changes(comparison)
        change = f"vs {one_line(comparison.baseline, 80)}"
    return f"{'FAIL' if exit_code(run, comparison) else 'PASS'}  {name}: {', '.join(parts)}; {change}"


def _changes(comparison: Comparison) -> list[str]:
    """What differs from the baseline, the worst first."""
    parts = [f"bounds looser: {looser_words(comparison.bounds)}"] * bool(comparison.looser)
    if number := len(comparison.other_contract):
        parts.append(f"{plural(number, 'case')} of another numerics contract")
    parts.append(plural(len(comparison.new_failures), "new failure"))
    parts += [plural(len(comparison.old_failures), "old failure")] * bool(comparison.old_failures)
    lost = comparison.losses[0] if comparison.losses else None
    explained = f" ({lost.name})" if lost and lost.what else ""
    parts += [f"{len(comparison.fixed)} fixed",
              f"coverage -{len(comparison.coverage_lost)}{explained} +{len(comparison.coverage_gained)}",
              f"drift +{len(comparison.drift)}"]
    parts += [f"{len(comparison.excused)} newly excused"] * bool(comparison.excused)
    for speed in comparison.speed:
        faster = f", {len(speed.faster)} faster" * bool(speed.faster)
        parts.append(f"{len(speed.slower)} slower{faster}{speed.mark}")
    return parts


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
    if run.refused:
        one = run.refused[0]
        return f"first nothing failed in what was read; refused: {one_line(one.place)}: {one_line(one.reason, 160)}"
    if stale(run):
        return f"first nothing failed, but the expectations are {one_line(stale(run)[0], 300)}"
    if comparison and (worse := _nothing_failed_but(comparison)):
        return f"first nothing failed, but {worse}"
    if shortfalls(run):
        return "first nothing failed in what ran, which is too little to say more"
    return "first nothing failed" + (_moved(comparison) if comparison else "")


def _nothing_failed_but(comparison: Comparison) -> str:
    """Bounds that are looser, other contracts and cases that are gone, or ''."""
    parts = []
    if number := len(comparison.other_contract):
        parts.append(f"{plural(number, 'case')}, as {one_line(comparison.other_contract[0])}, declare other roundings "
                     "than were accepted; `moe-ref accept` where that is on purpose")
    if comparison.looser:
        assert comparison.effect is not None
        parts.append(f"bounds are looser than accepted: {looser_words(comparison.bounds)} ({comparison.effect.words}); "
                     "`moe-ref accept` where that is on purpose")
    if comparison.losses:
        tier = next((one_line(note) for note in comparison.notes if note.startswith("tier ")), "")
        note = f" ({tier})" if tier else ""
        number = plural(len(comparison.coverage_lost), "case")
        first = comparison.losses[0]
        words = first.words if first.is_lane else (
            f"{number} of the baseline did not run{note}"
            + ", ".join([f": {first.words}" if first.what else f", {first.example}",
                         *(loss.words for loss in comparison.losses[1:3])]))
        parts.append(words)
    return "; and ".join(parts)


def _moved(comparison: Comparison) -> str:
    """What is slower, then what drifts: times that are no evidence come last."""
    def slower(evidence: bool) -> list[str]:
        return [f"{speed.slower[0].words}{speed.mark}" for speed in comparison.speed
                if speed.slower and speed.evidence is evidence]
    drift = [_drift_words(comparison.drift_groups)] if comparison.drift_groups else []
    told = [*slower(True), *drift, *slower(False)]
    return "; " + "; ".join(told) if told else ""


def _drift_words(groups: Sequence[DriftGroup]) -> str:
    """'drift in 40 stages: 38 act, all with ...; largest: act of CASE 0.3 -> 0.6 of its bound'."""
    largest = max((group.largest for group in groups), key=lambda drift: ratio_of(drift.now))
    words = (f"{one_line(largest.stage)} of {one_line(largest.case)} {format_ratio(largest.before)} -> "
             f"{format_ratio(largest.now)} of its bound")
    number = sum(group.number for group in groups)
    if number == 1:
        return f"drift: {words}"
    shown = [f"{group.number} in {one_line(group.stage, 40)}" + f", {group.traits}" * bool(group.traits)
             for group in groups[:2]]
    more = f" and {sum(group.number for group in groups[2:])} elsewhere" if len(groups) > 2 else ""
    return f"drift of {number}: {'; '.join(shown)}{more}; largest: {words}"


def _where_failures_are(red: list[CaseLine], lines: list[CaseLine], new: bool) -> str:
    """The groups of failures, what the largest shares, and the smallest case of it to begin with."""
    groups: dict[str, list[CaseLine]] = {}
    for line in red:
        groups.setdefault(_ending(line, len(red)), []).append(line)
    ranked = sorted(groups.items(), key=lambda group: -len(group[1]))
    words = [f"{len(members) if len(groups) > 1 else ''} {name}".strip() for name, members in ranked[:3]]
    shared = traits([line.case for line in ranked[0][1]], [line.case for line in lines if is_executed(line)])
    words[0] += f", {shared}" if shared else ""
    if rest := sum(len(members) for _, members in ranked[3:]):
        words.append(f"{rest} elsewhere")
    alike = _alike(ranked[0][1])
    simplest = min(alike or ranked[0][1], key=lambda line: (size_of(line.case), line.case))
    stage = culprit(simplest)
    size = f"{excess(stage)}, " if stage and stage.num_bad else ""
    count = plural(len(red), "new failure" if new else "failure") + ":" * (len(groups) > 1)
    return (f"{count} {', '.join(words)}; {_likely(alike, simplest, len(ranked[0][1]))}"
            f"{'smallest case: ' if len(ranked[0][1]) > 1 else ''}{size}{one_line(where(simplest), 160)}; "
            f"repro: {one_line(replay(simplest))}")


def _ending(line: CaseLine, number: int) -> str:
    verb = "s" if number == 1 else ""
    if line.first_stage:
        return f"start{verb} in {one_line(line.first_stage, 40)}"
    return f"end{verb} in {line.verdict}"


def _alike(red: list[CaseLine]) -> list[CaseLine]:
    """Those that most likely have the same fault; one that differs in its numbers alone is the same."""
    kinds: dict[str, list[CaseLine]] = {}
    for line in red:
        if line.diagnosis:
            kinds.setdefault(_kind(line.diagnosis.fault), []).append(line)
    return max(kinds.values(), key=len, default=[])


def _likely(alike: list[CaseLine], simplest: CaseLine, number: int) -> str:
    """'2 of 2 look like `last 32 columns of K left out of the down product` (explains 99 %); ', or ''."""
    if not alike or simplest.diagnosis is None:
        return ""
    look = f"{len(alike)} of {number} look" if number > 1 else "looks"
    share = min(from_number(line.diagnosis.share) for line in alike if line.diagnosis)
    return f"{look} like `{one_line(simplest.diagnosis.fault, 160)}` (explains {100 * share:.0f} %); "


def _kind(fault: str) -> str:
    """A fault without its numbers, which are those of one case's sizes."""
    return re.sub(r"\b\d+\b", "#", fault)


def _close_line(lines: dict[str, CaseLine], baseline: Baseline | None) -> str:
    nearest = nearest_pass(lines.values())
    stage = margin_stage(nearest) if nearest else None
    if nearest is None or stage is None:
        return "close no passing case with a measured ratio"
    if ratio_of(stage.ratio) == 0:
        return "close no passing case has an error: there is nothing to tell how much room is left"
    before = baseline.cases[nearest.case].stages.get(stage.stage) if (
        baseline and nearest.case in baseline.cases) else None
    was = f" (was {format_ratio(before)})" if before is not None else ""
    return (f"close nearest pass: {one_line(stage.stage)} of {one_line(nearest.case)} at "
            f"{format_ratio(stage.ratio)} of its bound{was}; repro: {one_line(replay(nearest))}")

