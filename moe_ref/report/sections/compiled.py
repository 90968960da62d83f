"""What kernels take on GPUs that need not be there: runs of `moe-ref compile`."""

from typing import TYPE_CHECKING

from moe_ref.report.compiled import compile_faults, compile_words, kernel_table, regressions
from moe_ref.report.sections.view import View, fill

if TYPE_CHECKING:
    from markupsafe import Markup

_LISTED = 50
"""Failures; a compiler that is missing makes thousands of one kind."""


def compiled_section(view: View) -> "Markup | str":
    """Regressions, faults, and a table by architecture and kernel; "" without such a run."""
    runs = view.evidence.compiled
    if not runs:
        return ""
    return fill("sections/compiled.html.j2", runs=runs, regressions=regressions, faults=compile_faults,
                table=kernel_table, words=compile_words, listed=_LISTED)
