"""Cases of a baseline that did not run, gathered by what they have in common and nothing that ran has."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from moe_ref.report.axes import case_axes
from moe_ref.report.baseline import Baseline, BaselineCase
from moe_ref.report.words import one_line, plural

LANES_BETWEEN = "+"
"""Between the lanes of a run that was merged from several."""

EVERYTHING = "the baseline"
_GROUPS = 4


@dataclass(frozen=True)
class Loss:
    """what: "lane gpu1", "tp 8", "ranks gloo", EVERYTHING, or "" for what nothing explains. reason: why, of most of
    the cases; case: one of them, the first by name.
    """

    what: str
    number: int
    reason: str
    case: str

    @property
    def is_lane(self) -> bool:
        """Whether a whole lane is gone."""
        return self.what.startswith("lane ")

    @property
    def name(self) -> str:
        """As "all 120 with tp 8", "lane gpu1 lost"; '' for what nothing explains."""
        if self.is_lane:
            return f"{one_line(self.what, 80)} lost"
        if self.what == EVERYTHING:
            return f"all {self.number}"
        return f"all {self.number} with {one_line(self.what, 80)}" if self.what else ""

    @property
    def example(self) -> str:
        """As "such as CASE (unsupported: not declared: tp 3)"."""
        return f"such as {one_line(self.case)} ({one_line(self.reason, 120)})"

    @property
    def words(self) -> str:
        """As "all 120 with tp 8 (gone: not among the chosen cases)"."""
        if not self.what:
            return f"{plural(self.number, 'case')}, {self.example}"
        reason = f" ({one_line(self.reason, 120)})"
        did_not = f": {plural(self.number, 'case')} of the baseline did not run" * self.is_lane
        return self.name + did_not + reason


def losses(baseline: Baseline, lane: str, lost: Mapping[str, str]) -> tuple[Loss, ...]:
    """Groups of the lost cases (case -> reason), the largest first.

    lane: of the run, "" where it was not started by a lane. A lane that is gone explains all of them; else whatever is
    lost entirely, one value of an axis after the other, while it explains two cases or more that none before it does,
    and two values together for what is left.
    """
    if not lost:
        return ()
    lanes = [name for name in _lanes(baseline.accepted.get("lane", "")) if name not in _lanes(lane)]
    if lane and lanes:
        return (_loss(f"lane {', '.join(lanes)}", list(lost), lost),)
    ran = {case: entry for case, entry in baseline.cases.items() if entry.executed}
    if len(lost) == len(ran):
        return (_loss(EVERYTHING, list(lost), lost),)
    before, gone = _count(ran), _count({case: ran[case] for case in lost})
    whole = {trait: None for trait, number in gone.items() if number == before[trait]}
    left = {case: [trait for trait in _traits(case, ran[case]) if trait in whole] for case in lost}
    groups: list[Loss] = []
    while left and len(groups) < _GROUPS:
        members = Counter(trait for traits in left.values() for trait in traits)
        best = max(whole, key=lambda trait: members[trait], default=None)
        if best is None or members[best] < 2:
            break
        chosen = [case for case, traits in left.items() if best in traits]
        groups.append(_loss(" ".join(best), chosen, lost))
        for case in chosen:
            del left[case]
    if left:
        groups.append(_loss(_both(list(left), ran), list(left), lost))
    return tuple(sorted(groups, key=lambda group: -group.number))


def _lanes(text: str) -> list[str]:
    return list(dict.fromkeys(filter(None, text.split(LANES_BETWEEN))))


def _both(cases: list[str], ran: Mapping[str, BaselineCase]) -> str:
    """'dtype fp32 and tp 8' where these are all that had both, else ''."""
    shared = [trait for trait, number in _count({case: ran[case] for case in cases}).items() if number == len(cases)]
    frequency = _count(ran)
    rarest = sorted(shared, key=lambda trait: frequency[trait])[:2]
    such = sum(all(trait in _traits(case, entry) for trait in rarest) for case, entry in ran.items())
    return " and ".join(map(" ".join, rarest)) if len(cases) == such > 1 and len(rarest) == 2 else ""


def _count(cases: Mapping[str, BaselineCase]) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for case, entry in cases.items():
        found.update(_traits(case, entry))
    return found


def _traits(case: str, entry: BaselineCase) -> list[tuple[str, str]]:
    """(axis, value) pairs, the ranks first: they are no axis of the case."""
    return [("ranks", entry.ranks), *case_axes(case).items()]


def _loss(what: str, cases: list[str], lost: Mapping[str, str]) -> Loss:
    [(reason, _)] = Counter(lost[case] for case in cases).most_common(1)
    return Loss(what, len(cases), reason, min(cases))
