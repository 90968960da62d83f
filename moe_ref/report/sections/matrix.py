"""Stages against classes of cases, the worst ratio in each."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_ref.report.matrix import Cell, MatrixRow, matrix
from moe_ref.report.sections.view import View, fill

if TYPE_CHECKING:
    from markupsafe import Markup

ROWS_SHOWN = 200


@dataclass(frozen=True)
class Panel:
    """Some stages of the matrix, and the rows (with the cells of these stages) in which one of them was compared."""

    title: str
    stages: tuple[str, ...]
    rows: tuple[tuple[MatrixRow, tuple[Cell | None, ...]], ...]
    has_stageless: bool


def matrix_section(view: View) -> "Markup":
    """The matrix, forward and backward pass apart; each cell leads to the case that holds its value."""
    stages, rows = matrix(view.lines)
    shown = sorted(rows, key=lambda row: not row.failed)[:ROWS_SHOWN] if len(rows) > ROWS_SHOWN else rows
    forward = _panel("Forward", stages, shown, backward=False)
    backward = _panel("Gradients", stages, shown, backward=True)
    return fill("sections/matrix.html.j2", panels=[panel for panel in (forward, backward) if panel.rows],
                num_rows=len(rows), rows_shown=ROWS_SHOWN, anchors=view.anchors)


def _panel(title: str, stages: list[str], rows: list[MatrixRow], backward: bool) -> Panel:
    """Stages that every row leaves out are left out; cases without a stage stand with the forward pass."""
    chosen = [number for number, stage in enumerate(stages) if stage.startswith("grad_") == backward]
    cells = [(row, tuple(row.cells[number] for number in chosen)) for row in rows]
    kept = tuple((row, own) for row, own in cells if any(own) or not backward)
    return Panel(title, tuple(stages[number] for number in chosen), kept,
                 not backward and any(row.stageless for row, _ in kept))
