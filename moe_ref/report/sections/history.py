"""How classes of cases went over earlier runs, and where driver, versions, GPU or tolerances changed."""

from typing import TYPE_CHECKING

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Stage
from moe_ref.report.history import past_run, up_to
from moe_ref.report.sections.view import View, drawing, fill
from moe_ref.report.trend_chart import trend_chart
from moe_ref.report.trends import EVERY_STAGE, Trend, run_label, trends_of, words_of

if TYPE_CHECKING:
    from markupsafe import Markup

_SHOWN = 60


def history_section(view: View) -> "Markup":
    """A row per class of this run: output, and stages above their bound; empty without a history."""
    past, run = view.evidence.history, view.evidence.run
    if past is None:
        return drawing("")
    try:
        found = trends_of(up_to(past, run), past_run(run), stages=(EVERY_STAGE,))
    except UsageValueError as error:
        return fill("sections/history.html.j2", found=None, reason=str(error))
    trends = [trend for trend in found.trends if trend.stage == Stage.OUTPUT or _is_above(trend)]
    trends.sort(key=lambda trend: -_growth(trend))
    return fill("sections/history.html.j2", found=found, trends=trends[:_SHOWN], left=len(trends[_SHOWN:]),
                chart=lambda trend: drawing(trend_chart(trend, found)), words_of=words_of, run_label=run_label)


def _is_above(trend: Trend) -> bool:
    now = trend.points[-1]
    return now is not None and (now.worst is None or now.worst > 1)


def _growth(trend: Trend) -> float:
    """How much larger the last ratio is than the least before it; a failure is larger than any."""
    *earlier, now = trend.points
    worst = [point.worst for point in earlier if point is not None and point.worst is not None]
    if now is None:
        return 0.0
    if now.worst is None:
        return float("inf")
    return now.worst / max(min(worst, default=now.worst), 1e-3)
