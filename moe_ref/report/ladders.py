"""Ladders: one case at growing tp, or at growing ep, where the ratio must not climb."""

from collections.abc import Iterable
from dataclasses import dataclass

from moe_ref.records.schema import CaseLine
from moe_ref.report.axes import ladder_step
from moe_ref.report.facts import margin_ratio


@dataclass(frozen=True)
class Ladder:
    """Degree -> case line, the smallest degree first; climb: largest later ratio / the first ratio.

    axis: tp or ep. problem: the case id without that degree.
    """

    axis: str
    problem: str
    steps: dict[int, CaseLine]
    climb: float


AXES = ("tp", "ep")


def ladders(lines: Iterable[CaseLine], axis: str) -> list[Ladder]:
    """Cases that were measured at two or more degrees of an axis with even shares, steepest first.

    What is right to the bit at every degree has no ratio that could climb, and is left out.
    """
    steps: dict[str, dict[int, CaseLine]] = {}
    for line in lines:
        if (step := ladder_step(line.case, axis)) and line.stages:
            steps.setdefault(step[0], {})[step[1]] = line
    found = [Ladder(axis, problem, dict(sorted(measured.items())), _climb(measured))
             for problem, measured in steps.items() if len(measured) > 1 and any(map(margin_ratio, measured.values()))]
    return sorted(found, key=lambda ladder: (-ladder.climb, ladder.problem))


def _climb(steps: dict[int, CaseLine]) -> float:
    first, *others = (margin_ratio(line) for _, line in sorted(steps.items()))
    if first == float("inf"):
        return 1.0
    return max(others) / first if first > 0 else (float("inf") if max(others) > 0 else 1.0)
