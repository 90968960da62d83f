"""The error map of a failing stage, with its legend."""

from typing import TYPE_CHECKING

from moe_ref.records.schema import StageResult
from moe_ref.report.error_map import draw_map, legend
from moe_ref.report.sections.view import drawing, fill

if TYPE_CHECKING:
    from markupsafe import Markup


def error_map(stage: StageResult) -> "Markup":
    """Drawing, words and legend; a sentence where the map cannot be drawn, nothing where none was recorded."""
    if stage.error_map is None:
        return drawing("")
    try:
        drawn = draw_map(stage)
    except ValueError as error:
        return fill("sections/error_map.html.j2", drawn=None, reason=str(error), stage=stage)
    return fill("sections/error_map.html.j2", drawn=drawn, drawing=drawing(drawn.drawing),
                profile=drawing(drawn.profile), legend=legend(), stage=stage)
