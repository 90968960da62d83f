"""junit.xml: the run as CI servers read it, written case by case. Elements as Jenkins, GitLab and pytest have them."""

import re
from collections import Counter
from collections.abc import Iterator
from xml.sax.saxutils import escape, quoteattr

from moe_ref.contract.vocabulary import RED_VERDICTS, Verdict
from moe_ref.records.schema import CaseLine
from moe_ref.records.store import Run
from moe_ref.report.axes import case_axes
from moe_ref.report.baseline import slug
from moe_ref.report.compare import Comparison
from moe_ref.report.facts import case_lines, culprit, margin_stage
from moe_ref.report.head import shortfalls, stale
from moe_ref.report.shards import suite_name
from moe_ref.report.words import first_line, format_ratio, one_line, refused_words, replay, where

_ERRORS = (Verdict.CRASH, Verdict.HANG, Verdict.HARNESS_ERROR)
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What no XML document may hold, https://www.w3.org/TR/xml/#charsets: one such character makes all of it unreadable."""

_REFUSED_NAMED = 200


def junit(run: Run, comparison: Comparison | None = None) -> Iterator[str]:
    """The document in pieces: a suite of what concerns the whole run, then one for each tier."""
    suites: dict[str, list[CaseLine]] = {}
    for line in case_lines(run).values():
        suites.setdefault(run.suite_of.get(line.run) or suite_name(run), []).append(line)
    whole = _whole(run, comparison)
    name = slug(run.header.implementation.name) or "implementation"
    counts = Counter(outcome(line) for lines in suites.values() for line in lines) + Counter(one[1] for one in whole)
    seconds = sum(_seconds(line) for lines in suites.values() for line in lines)
    yield '<?xml version="1.0" encoding="utf-8"?>\n'
    yield f"<testsuites name={_quoted(name)} {_counts(counts)} time=\"{seconds:.3f}\">\n"
    yield f'<testsuite name="run" {_counts(Counter(one[1] for one in whole))} time="0">\n'
    for title, kind, message, text in whole:
        yield _testcase(f"{name}.run", title, 0.0, _result(kind, kind, message, text))
    yield "</testsuite>\n"
    for suite, lines in suites.items():
        yield (f"<testsuite name={_quoted(suite)} {_counts(Counter(map(outcome, lines)))} "
               f"time=\"{sum(map(_seconds, lines)):.3f}\" timestamp={_quoted(run.header.started[:19])}>\n")
        yield from (_case(name, line) for line in lines)
        yield "</testsuite>\n"
    yield "</testsuites>\n"


def outcome(line: CaseLine) -> str:
    """The element that says what became of a case: failure, error, skipped, or "" for a pass."""
    if line.verdict == Verdict.PASS:
        return ""
    if line.verdict in _ERRORS:
        return "error"
    return "failure" if line.verdict in RED_VERDICTS else "skipped"


def _whole(run: Run, comparison: Comparison | None) -> list[tuple[str, str, str, str]]:
    """(title, element, message, text): what makes a run red though no case of it is."""
    short = shortfalls(run)
    refused = [f"{one.place}: {one.reason}" for one in run.refused[:_REFUSED_NAMED]]
    found = [("finished, and executed enough", "failure" if short else "", ", ".join(short), ""),
             ("all records could be read", "error" if refused else "", refused_words(run.refused), "\n".join(refused))]
    if run.header.expectations:
        found.append(("every expectation covers a case that ran", "failure" if stale(run) else "",
                      f"{len(stale(run))} stale in the expectations", "\n".join(stale(run))))
    if comparison:
        lost = [f"{case}: {reason}" for case, reason in comparison.coverage_lost]
        found.append(("all cases of the baseline executed", "failure" if lost else "",
                      f"{len(lost)} cases of the baseline did not run", "\n".join(lost)))
    return found


def _case(name: str, line: CaseLine) -> str:
    axes, stage, kind = case_axes(line.case), culprit(line) if outcome(line) else margin_stage(line), outcome(line)
    text = "\n".join(filter(None, [line.message or line.reason, where(line), replay(line)])) if kind else ""
    message = first_line(line.message if line.message and kind == "failure" else line.reason) or str(line.verdict)
    if line.verdict == Verdict.KNOWN_FAILURE:
        message = f"known failure: {message}"
    properties = "".join(f"<property name={_quoted(key)} value={_quoted(value)}/>" for key, value in (
        ("stage", stage.stage), ("ratio", format_ratio(stage.ratio)))) if stage else ""
    inner = f"<properties>{properties}</properties>" if properties else ""
    class_name = f"{name}.{axes['dtype']}.tp{axes['tp']}" if "dtype" in axes else f"{name}.unreadable"
    return _testcase(class_name, line.case, _seconds(line), inner + _result(kind, line.verdict, message, text))


def _testcase(class_name: str, name: str, seconds: float, inner: str) -> str:
    head = f"<testcase classname={_quoted(class_name)} name={_quoted(name)} time=\"{seconds:.3f}\""
    return f"{head}>{inner}</testcase>\n" if inner else f"{head}/>\n"


def _result(kind: str, verdict: str, message: str, text: str) -> str:
    if not kind:
        return ""
    return f"<{kind} type={_quoted(verdict)} message={_quoted(one_line(message))}>{escape(_legal(text))}</{kind}>"


def _counts(found: Counter[str]) -> str:
    return (f'tests="{found.total()}" failures="{found["failure"]}" errors="{found["error"]}" '
            f'skipped="{found["skipped"]}"')


def _seconds(line: CaseLine) -> float:
    return line.subject_seconds + line.oracle_seconds


def _quoted(text: str) -> str:
    return quoteattr(_legal(text))


def _legal(text: str) -> str:
    return _ILLEGAL.sub("\ufffd", text)
