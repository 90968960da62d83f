"""Scales and codes of rows that a product takes: judged from the rows, and then taken as they are."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from moe_ref.contract.shares import RankShare
from moe_ref.contract.vocabulary import Stage
from moe_ref.verify.bounds.operands import code_rows, over_columns, scale_rows
from moe_ref.verify.bounds.rows import Rows, exact
from moe_ref.verify.bounds.steps import Steps

if TYPE_CHECKING:
    from moe_ref.verify.measure.stages import Chosen

STAGES = {Stage.PERMUTE: (Stage.PERMUTE_SCALES, Stage.PERMUTE_CODES), Stage.ACT: (Stage.ACT_SCALES, Stage.ACT_CODES)}
"""The rows that are rounded -> where a subject shows what they become."""

JudgeRows = Callable[[Stage, RankShare, "Chosen", Rows, int], Rows]


class OperandStages:
    """Judges what of these stages a subject shows; each from what it showed before.

    A last bit of a scale, or of the row before it, moves codes that lie next to a rounding border. So codes are
    judged from the subject's own scales, and the product that follows from its own codes and scales.
    """

    def __init__(self, steps: Steps, shows: Callable[[Stage], bool], judge_rows: JudgeRows) -> None:
        self._steps, self._shows, self._judge_rows = steps, shows, judge_rows

    def fed(self, rows_of: Stage, share: RankShare, chosen: "Chosen", rows: Rows, start: int) -> Rows | None:
        """The rows as the subject multiplies them; None where it does not show them, or they are not rounded.

        rows_of: PERMUTE or ACT. start: the column of the whole matrix at which these rows begin.
        """
        rule = self._steps.rule(chosen.expert, rows_of is Stage.PERMUTE, start)
        scales_stage, codes_stage = STAGES[rows_of]
        if rule is None or not (self._shows(scales_stage) and self._shows(codes_stage)) or not rows.value.shape[1]:
            return None
        scales = self._judge_rows(scales_stage, share, chosen, scale_rows(rows, rule), 0)
        scale_RK = over_columns(scales.value, rows.value.shape[1], rule)
        codes = self._judge_rows(codes_stage, share, chosen, code_rows(rows, scale_RK, rule), start)
        return exact(codes.value * scale_RK)
