"""The Markdown summary for job summaries and review comments: text only, below a stated size."""

from collections.abc import Sequence

from moe_ref.contract.vocabulary import Verdict
from moe_ref.records.schema import CaseLine
from moe_ref.records.store import Run
from moe_ref.report.bounds import BoundChange, shown
from moe_ref.report.compare import DRIFT_FACTOR, DRIFT_FLOOR, Comparison
from moe_ref.report.coverage import axis_pairs_covered, coverage
from moe_ref.report.facts import case_lines, culprit, failures, reasons
from moe_ref.report.failure_groups import failure_groups
from moe_ref.report.lanes import LaneRow, head_section, lane_section
from moe_ref.report.markdown import Section, block, cell, code, fit
from moe_ref.report.speed import share
from moe_ref.report.words import format_ratio, printable, replay, where, worst_element

SUMMARY_BUDGET = 60_000
"""Characters; a comment may hold 65,536, a job summary 1 MiB."""

_MESSAGES_SHOWN = 5
_FAULTS_SHOWN = 4
_MESSAGE_LIMIT = 2000


def summary(run: Run, head: Sequence[str], comparison: Comparison | None = None,
            lanes: Sequence[LaneRow] = ()) -> str:
    """The summary as Markdown, at most SUMMARY_BUDGET characters; what was cut is counted in its place."""
    lines = list(case_lines(run).values())
    sections = [lane_section(lanes), _group_section(lines, comparison), *_failure_sections(lines, comparison),
                _refused_section(run)]
    if comparison:
        sections += [section for section in _comparison_sections(comparison) if section.rows]
    sections += [_coverage_section(run, lines)]
    sections += [_reason_section(lines, verdict, title) for verdict, title in (
        (Verdict.UNSUPPORTED, "Unsupported, by declared reason"), (Verdict.NOT_RUN, "Not run"),
        (Verdict.HARNESS_ERROR, "Harness errors, not verdicts on the implementation"),
        (Verdict.KNOWN_FAILURE, "Known failures, by reason"))]
    sections.append(head_section(lanes))
    environment = run.header.environment | {
        "run": run.header.run, "started": run.header.started, "tolerances": run.header.tolerances_digest,
        "oracle": run.header.oracle_version}
    sections.append(Section("Environment", ("what", "value"),
                            [(cell(key), cell(environment[key])) for key in sorted(environment)], 40))
    top = block("\n".join(head)) + "\n\n"
    return fit(top, [section for section in sections if section.rows or section.text], SUMMARY_BUDGET)


def _group_section(lines: list[CaseLine], comparison: Comparison | None) -> Section:
    """Failures by the stage in which they start, where that is more than the head line says."""
    groups = failure_groups(lines, frozenset(comparison.new_failures) if comparison else ())
    rows = [(cell(group.name), f"{len(group.lines)} of {group.num_ran}",
             cell("; ".join(f"{fault} ({number})" for fault, number in group.faults[:_FAULTS_SHOWN])),
             cell(f"{group.besides[0]} ({group.besides[1]})" if group.besides[1] else ""),
             cell("; ".join(f"{one.axis} " + ", ".join(f"{value} ({red} of {ran})" for value, red, ran in one.values)
                            for one in group.separations)))
            for group in groups if len(group.lines) > 1]
    columns = ("stage", "cases that ran", "look like", "besides", "by axis: failed of ran")
    return Section("Where failures start", columns, rows, 12)


def _failure_sections(lines: list[CaseLine], comparison: Comparison | None) -> list[Section]:
    new = set(comparison.new_failures) if comparison else set()
    red = sorted(failures(lines), key=lambda line: line.case not in new)
    rows = []
    for line in red:
        stage = culprit(line)
        rows.append((cell(line.first_stage or line.verdict),
                     code(line.case) + " **new**" * (line.case in new),
                     format_ratio(stage.ratio) if stage else "-", cell(where(line)), code(replay(line))))
    messages = [(f"**{cell(line.case)}**\n\n{block(_message(line))}\n",) for line in red[:_MESSAGES_SHOWN]]
    return [Section(f"Failures: {len(rows)}", ("stage", "case", "ratio", "where", "replay"), rows, 60,
                    "" if rows else "None."),
            Section("First messages", (), messages, _MESSAGES_SHOWN)]


def _refused_section(run: Run) -> Section:
    rows = [(cell(one.path), "" if one.line is None else str(one.line), cell(one.reason)) for one in run.refused]
    return Section(f"Refused records: {sum(one.number for one in run.refused)}", ("file", "line", "reason"), rows, 40)


def _message(line: CaseLine) -> str:
    """The recorded message without control characters; failing that, reason and worst element."""
    stage = culprit(line)
    text = line.message or "\n".join(filter(None, [line.reason, worst_element(stage) if stage else ""]))
    kept = "\n".join(printable(row) for row in text.split("\n"))
    return kept[:_MESSAGE_LIMIT] or "no message recorded"


def _comparison_sections(comparison: Comparison) -> list[Section]:
    drift = [(cell(drift.stage), code(drift.case), format_ratio(drift.before), format_ratio(drift.now))
             for drift in comparison.drift]
    grouped = "; ".join(f"{group.number} in {cell(group.stage)}" + f", {cell(group.traits)}" * bool(group.traits)
                        for group in comparison.drift_groups)
    return [
        Section(f"Bounds looser than accepted: {len(comparison.looser)}", ("number", "before", "now"),
                [_bound_cells(change) for change in comparison.looser], 40, _effect_words(comparison)),
        Section("Notes on the comparison", ("note",), [(cell(note),) for note in comparison.notes], 10),
        Section(f"Coverage lost: {len(comparison.coverage_lost)}", ("what", "cases", "such as", "why"),
                [(cell(loss.name or "others"), str(loss.number), code(loss.case), cell(loss.reason))
                 for loss in comparison.losses], 10),
        *_speed_sections(comparison),
        Section(f"Fixed: {len(comparison.fixed)}", ("case",),
                [(code(case),) for case in comparison.fixed], 40),
        Section(f"Drift: {len(drift)}", ("stage", "case", "before", "now"), drift, 40,
                f"Passing stages whose error / allowed grew more than {DRIFT_FACTOR} times, to above "
                f"{DRIFT_FLOOR}. {grouped}".strip()),
        Section(f"Lost cases: {len(comparison.coverage_lost)}", ("case", "why"),
                [(code(case), cell(reason)) for case, reason in comparison.coverage_lost], 20),
        Section(f"Coverage gained: {len(comparison.coverage_gained)}", ("case",),
                [(code(case),) for case in comparison.coverage_gained], 20),
        Section(f"Newly excused by an expectation: {len(comparison.excused)}", ("case",),
                [(code(case),) for case in comparison.excused], 40)]


def _bound_cells(change: BoundChange) -> tuple[str, str, str]:
    return cell(change.path), cell(shown(change.before)), cell(shown(change.now))


def _effect_words(comparison: Comparison) -> str:
    if not comparison.looser or comparison.effect is None:
        return ""
    return f"Of tolerances.yaml; {comparison.effect.words}. The run fails until this is accepted on purpose."


def _speed_sections(comparison: Comparison) -> list[Section]:
    columns = ("subject", "what", "beside", "before", "now", "factor", "of limit before", "of limit now")
    found = []
    for speed in comparison.speed:
        for word, changes in (("Slower", speed.slower), ("Faster", speed.faster)):
            rows = [(cell(change.subject), cell(f"{change.place}, {change.dtype}, {change.mode}"), cell(change.peer),
                     f"{change.before:.2f}", f"{change.now:.2f}", f"{change.now / change.before:.2f}",
                     share(change.limit_before), share(change.limit_now)) for change in changes]
            text = (f"{speed.num_compared} times beside those accepted on {cell(speed.accepted)}, each over its peer's "
                    "in the same run. Times fail no report.") if word == "Slower" else ""
            found.append(Section(f"{word}: {len(rows)}{speed.mark}", columns, rows, 20, text))
        found.append(Section(f"Accepted speeds not taken again: {len(speed.missing)}", ("what", "why"),
                             [(cell(place), cell(why)) for place, why in speed.missing], 10))
    return found


def _coverage_section(run: Run, lines: list[CaseLine]) -> Section:
    rows = [(cell(entry.axis), cell(entry.value), str(entry.passed), str(entry.failed),
             str(entry.unsupported), str(entry.not_run)) for entry in coverage(lines)]
    return Section("Coverage", ("axis", "value", "pass", "fail", "unsupported", "not run"), rows, 150,
                   f"{axis_pairs_covered(run)} Fail counts known failures too, not run counts harness "
                   "errors too.")


def _reason_section(lines: list[CaseLine], verdict: Verdict, title: str) -> Section:
    found = reasons(lines, verdict)
    return Section(f"{title}: {sum(number for _, number in found)}", ("cases", "reason"),
                   [(str(number), cell(reason)) for reason, number in found], 40)
