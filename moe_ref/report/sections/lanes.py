"""The lanes that the report answers for: what ran, what did not, and why."""

from typing import TYPE_CHECKING

from moe_ref.report.lanes import LEFT_OUT, in_order, words_of
from moe_ref.report.sections.view import View, fill

if TYPE_CHECKING:
    from markupsafe import Markup


def lane_section(view: View) -> "Markup":
    """A table, red lanes first, and who was left out; empty where the report does not answer for lanes."""
    lanes = in_order(view.evidence.lanes)
    return fill("sections/lanes.html.j2", rows=[(row, words_of(row)) for row in lanes if row.verdict != LEFT_OUT],
                left_out=[row for row in lanes if row.verdict == LEFT_OUT])
