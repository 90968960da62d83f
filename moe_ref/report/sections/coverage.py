"""What was tested, and what was not, by reason."""

from typing import TYPE_CHECKING

from moe_ref.contract.vocabulary import Verdict
from moe_ref.report.coverage import Coverage, axis_pairs_covered, coverage
from moe_ref.report.facts import reasons
from moe_ref.report.sections.view import View, fill

if TYPE_CHECKING:
    from markupsafe import Markup

_REASONED = {Verdict.NOT_RUN: "Not run", Verdict.UNSUPPORTED: "Unsupported, by declared reason"}
"""Harness errors and known failures stand with the failures."""

_COLUMNS = {"pass": "passed", "fail": "failed", "unsupported": "unsupported", "not run": "not_run"}


def coverage_section(view: View) -> "Markup":
    """Cases per value of every axis, and reasons of those that did not run."""
    idle = [(title, reasons(view.lines, verdict)) for verdict, title in _REASONED.items()]
    by_axis: dict[str, list[Coverage]] = {}
    entries = coverage(view.lines)
    for entry in entries:
        by_axis.setdefault(entry.axis, []).append(entry)
    columns = [(title, field) for title, field in _COLUMNS.items()
               if title in ("pass", "fail") or any(getattr(entry, field) for entry in entries)]
    pairs = axis_pairs_covered(view.evidence.run)
    return fill("sections/coverage.html.j2", coverage=by_axis, columns=columns, reasons=idle, pairs=pairs)
