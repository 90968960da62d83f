"""Which cases the page shows, and under which id: a page of 100,000 cases must still open at once."""

from collections.abc import Sequence

from moe_ref.contract.vocabulary import Verdict
from moe_ref.records.schema import CaseLine
from moe_ref.report.facts import culprit, is_red, margin_ratio, ratio_of
from moe_ref.report.failure_groups import FailureGroup

CARDS_SHOWN = 40
"""Failures with a card of their own; each group has at least one, as far as they go."""

ROWS_SHOWN = 2000
"""Rows of the table of cases."""

VERDICT_ORDER = (Verdict.MISMATCH, Verdict.STRUCT, Verdict.CRASH, Verdict.HANG, Verdict.NONDETERMINISTIC,
                 Verdict.UNEXPECTED_PASS, Verdict.HARNESS_ERROR, Verdict.KNOWN_FAILURE, Verdict.PASS,
                 Verdict.UNSUPPORTED, Verdict.NOT_RUN)


class Anchors(dict[str, str]):
    """case -> the id of its card or row; a case without either leads to the heading of the table."""

    def __missing__(self, case: str) -> str:
        return "cases"


def num_cards(groups: Sequence[FailureGroup]) -> int:
    """How many cases of each group have a card, the first ones; groups after CARDS_SHOWN have none."""
    return max(1, CARDS_SHOWN // max(1, len(groups)))


def anchors(lines: Sequence[CaseLine], groups: Sequence[FailureGroup]) -> Anchors:
    """Of all cases that the page shows: the card, or else the row."""
    cards = [line.case for group in groups[:CARDS_SHOWN] for line in group.lines[:num_cards(groups)]]
    places = Anchors((case, f"failure-{number}") for number, case in enumerate(cards, 1))
    for number, line in enumerate(line for found in shown_rows(lines).values() for line in found):
        places.setdefault(line.case, f"case-{number}")
    return places


def shown_rows(lines: Sequence[CaseLine]) -> dict[Verdict, list[CaseLine]]:
    """Rows of the table by verdict, the least room first; verdicts share ROWS_SHOWN, the rare ones are whole."""
    by_verdict: dict[Verdict, list[CaseLine]] = {}
    for line in lines:
        by_verdict.setdefault(Verdict(line.verdict), []).append(line)
    left = ROWS_SHOWN
    for number, (verdict, members) in enumerate(sorted(by_verdict.items(), key=lambda item: len(item[1]))):
        share = min(len(members), left // (len(by_verdict) - number))
        by_verdict[verdict] = sorted(members, key=lambda line: (-_ratio(line), line.case))[:share]
        left -= share
    return {verdict: by_verdict[verdict] for verdict in VERDICT_ORDER if verdict in by_verdict}


def _ratio(line: CaseLine) -> float:
    """Of the stage that the row names: where a failure starts, else the least room."""
    stage = culprit(line) if is_red(line) else None
    return ratio_of(stage.ratio) if stage else margin_ratio(line)
