"""How errors grow with the length of sums: runs of `moe-ref diverge`."""

from typing import TYPE_CHECKING

from moe_ref.report.growth import (
    difference_table,
    error_table,
    growth_end,
    growth_faults,
    growth_reasons,
    law_table,
)
from moe_ref.report.growth_plot import growth_svg
from moe_ref.report.sections.view import View, drawing, fill

if TYPE_CHECKING:
    from markupsafe import Markup


def growth_section(view: View) -> "Markup | str":
    """Curves with their bands, exponents and classes, and whether a difference is a bug; "" without such a run."""
    runs = view.evidence.growth
    if not runs:
        return ""
    return fill("sections/growth.html.j2", runs=[(run, drawing(growth_svg(run))) for run in runs], law=law_table,
                errors=error_table, differences=difference_table, faults=growth_faults, reasons=growth_reasons,
                end=growth_end)
