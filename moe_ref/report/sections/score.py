"""Who is caught and who is wrongly accused: a run of `moe-ref score`."""

from typing import TYPE_CHECKING

from moe_ref.report.score import complaints, summary, tables, unjudged, wrong
from moe_ref.report.sections.view import View, fill

if TYPE_CHECKING:
    from markupsafe import Markup


def score_section(view: View) -> "Markup | str":
    """The score, first who was missed or accused; "" without such a run."""
    run = view.evidence.score
    if run is None:
        return ""
    worst = wrong(run)
    others = [words for words in complaints(run) if words not in set(worst)]
    by_gpu = {one.id: one.reason for one in run.mutants.values() if one.outcome == "not_runnable"}
    return fill("sections/score.html.j2", run=run, summary=summary(run), wrong=worst, others=others,
                tables=tables(run), by_gpu=by_gpu, unjudged=unjudged(run))
