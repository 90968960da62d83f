"""What changed since the accepted run."""

from typing import TYPE_CHECKING

from moe_ref.report.bounds import shown
from moe_ref.report.sections.view import View, fill
from moe_ref.report.speed import share

if TYPE_CHECKING:
    from markupsafe import Markup


def baseline_section(view: View) -> "Markup":
    """New, fixed, drifting and lost cases; without a baseline a sentence that says so."""
    return fill("sections/baseline.html.j2", comparison=view.comparison, anchors=view.anchors, shown=shown,
                share=share)
