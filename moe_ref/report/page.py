"""The HTML page: one file, no outer resources, light and dark, readable without scripts."""

import base64
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moe_ref.report.compare import Comparison
from moe_ref.report.evidence import Evidence
from moe_ref.report.facts import case_lines
from moe_ref.report.failure_groups import failure_groups
from moe_ref.report.sections.absent import absent_section
from moe_ref.report.sections.baseline import baseline_section
from moe_ref.report.sections.bench import bench_section
from moe_ref.report.sections.cases import case_section, environment_section
from moe_ref.report.sections.compiled import compiled_section
from moe_ref.report.sections.coverage import coverage_section
from moe_ref.report.sections.curves import bias_section, ladder_section, length_section
from moe_ref.report.sections.failures import failure_section
from moe_ref.report.sections.growth import growth_section
from moe_ref.report.sections.history import history_section
from moe_ref.report.sections.lanes import lane_section
from moe_ref.report.sections.matrix import matrix_section
from moe_ref.report.sections.pairs import pair_section
from moe_ref.report.sections.places import VERDICT_ORDER, anchors
from moe_ref.report.sections.refused import refused_section
from moe_ref.report.sections.score import score_section
from moe_ref.report.sections.view import View, fill, script

if TYPE_CHECKING:
    from markupsafe import Markup

_SECTIONS: tuple[tuple[str, str, Callable[[View], "Markup | str"]], ...] = (
    ("lanes", "Lanes", lane_section),
    ("failures", "Failures", failure_section),
    ("refused", "Refused", refused_section),
    ("baseline", "Baseline", baseline_section),
    ("matrix", "Matrix", matrix_section),
    ("history", "History", history_section),
    ("length", "Against K and load", length_section),
    ("ladder", "TP/EP ladder", ladder_section),
    ("bias", "Bias and scale", bias_section),
    ("growth", "Divergence", growth_section),
    ("score", "Mutation score", score_section),
    ("compiled", "Cross-compile", compiled_section),
    ("bench", "Speed", bench_section),
    ("coverage", "Coverage", coverage_section),
    ("pairs", "Pairs", pair_section),
    ("cases", "All cases", case_section),
    ("environment", "Environment", environment_section),
    ("absent", "Not in this report", absent_section))
"""(id of its heading, words in the navigation, what makes it); one that is empty is left out of both."""


def page(evidence: Evidence, head: Sequence[str], comparison: Comparison | None = None) -> str:
    """The page as HTML; everything from records is escaped, a missing part says that it is missing."""
    lines = tuple(case_lines(evidence.run).values())
    groups = failure_groups(lines, frozenset(comparison.new_failures) if comparison else ())
    view = View(evidence, lines, anchors(lines, groups), comparison, groups)
    made = [(anchor, title, section(view)) for anchor, title, section in _SECTIONS]
    code = script("page.js")
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    found = {line.verdict for line in lines}
    return fill("page.html.j2", head=head, run=evidence.run, sections=[one for one in made if one[2].strip()],
                verdicts=[verdict for verdict in VERDICT_ORDER if verdict in found],
                script=code, script_digest=digest)
