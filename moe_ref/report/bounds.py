"""What changed in tolerances.yaml between two runs, which of it is looser, and what it did to ratios."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from moe_ref.contract.vocabulary import Verdict
from moe_ref.records.schema import CaseLine, Number, from_number
from moe_ref.report.baseline import BaselineCase, round_ratio
from moe_ref.report.words import one_line, plural
from moe_ref.tolerances.numbers import loosens

_SHOWN = 3


@dataclass(frozen=True)
class BoundChange:
    """A number of tolerances.yaml by its path; None where it is not there. looser: None where nobody can say."""

    path: str
    before: Number | None
    now: Number | None
    looser: bool | None

    @property
    def words(self) -> str:
        """As "checks.stage.sigmas_factor 3 -> 6"."""
        return f"{one_line(self.path, 120)} {shown(self.before)} -> {shown(self.now)}"


@dataclass(frozen=True)
class Effect:
    """Ratios of stages of cases that pass in both runs: how many there are, fell and rose, and now / before of those
    that fell in the median, 1 where none did.
    """

    compared: int
    fell: int
    rose: int
    median: float

    @property
    def words(self) -> str:
        """As "402 of 5012 ratios fell, to 0.5 of what they were in the median"."""
        if not self.fell:
            return f"none of {plural(self.compared, 'ratio')} fell"
        return (f"{self.fell} of {plural(self.compared, 'ratio')} fell, to {self.median:.2g} of what they were in the "
                "median")


def bound_changes(before: Mapping[str, Number], now: Mapping[str, Number]) -> tuple[BoundChange, ...]:
    """Every number that differs, what is looser first; none where either run does not say what it was judged with."""
    if not before or not now:
        return ()
    changes = [BoundChange(path, before.get(path), now.get(path),
                           loosens(path, _value(before.get(path)), _value(now.get(path))))
               for path in sorted(before.keys() | now.keys()) if before.get(path) != now.get(path)]
    return tuple(sorted(changes, key=lambda change: (True, False, None).index(change.looser)))


def effect(before: Mapping[str, BaselineCase], lines: Mapping[str, CaseLine]) -> Effect:
    """What happened to ratios that are above 0 in both, which are rounded alike: rounding alone is no change."""
    factors = []
    for case, line in lines.items():
        entry = before.get(case)
        if entry is None or (entry.verdict, line.verdict) != (Verdict.PASS, Verdict.PASS):
            continue
        for stage in line.stages:
            was, is_now = from_number(entry.stages.get(stage.stage, 0.0)), from_number(round_ratio(stage.ratio))
            if 0 < was < math.inf and 0 < is_now < math.inf:
                factors.append(is_now / was)
    fell = [factor for factor in factors if factor < 1]
    return Effect(len(factors), len(fell), sum(factor > 1 for factor in factors), median(fell) if fell else 1.0)


def looser_words(changes: Sequence[BoundChange]) -> str:
    """'checks.stage.sigmas_factor 3 -> 6 and 2 more', of those that are looser; '' where none is."""
    looser = [change.words for change in changes if change.looser]
    more = f" and {len(looser) - _SHOWN} more" if len(looser) > _SHOWN else ""
    return ", ".join(looser[:_SHOWN]) + more


def _value(number: Number | None) -> float | None:
    """NaN for a word that a record has no business with: then nobody can say."""
    try:
        return None if number is None else from_number(number)
    except ValueError:
        return math.nan


def shown(number: Number | None) -> str:
    """A number of tolerances.yaml in words."""
    return "absent" if number is None else one_line(number, 40) if isinstance(number, str) else f"{number:.9g}"
