"""Kinds of evidence that a report has no records of, and what makes them: NOT RUN is never silent."""

import shlex
from typing import TYPE_CHECKING

from moe_ref.report.evidence import Evidence
from moe_ref.report.sections.view import View, fill

if TYPE_CHECKING:
    from markupsafe import Markup


def absent(evidence: Evidence) -> list[tuple[str, str]]:
    """(what, the command that makes its records) of every kind that is missing."""
    name = shlex.quote(evidence.run.header.implementation.name)
    kinds = ((evidence.growth, "how errors grow with K", "moe-ref diverge SUBJECT torch:loop --record DIR"),
             (evidence.score, "mutation score", "moe-ref score --record DIR"),
             (evidence.compiled, "cross-compiling", f"moe-ref compile {name} --record DIR"),
             (evidence.bench, "speed", f"moe-ref bench {name} --record DIR"))
    return [(what, command) for found, what, command in kinds if not found]


def absent_section(view: View) -> "Markup | str":
    """One line; "" where a report has everything."""
    missing = absent(view.evidence)
    return fill("sections/absent.html.j2", missing=missing) if missing else ""
