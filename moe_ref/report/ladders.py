"""tp ladders: one problem at growing tp, where the ratio must not climb."""

from collections.abc import Iterable
from dataclasses import dataclass

from moe_ref.records.schema import CaseLine
from moe_ref.report.axes import ladder_step
from moe_ref.report.facts import margin_ratio


@dataclass(frozen=True)
class Ladder:
    """tp -> case line of one problem, smallest tp first; climb: largest later ratio / the first ratio."""

    problem: str
    steps: dict[int, CaseLine]
    climb: float


def ladders(lines: Iterable[CaseLine]) -> list[Ladder]:
    """Problems that were measured at two or more tp sizes with even splits, steepest first."""
    steps: dict[str, dict[int, CaseLine]] = {}
    for line in lines:
        if (step := ladder_step(line.case)) and line.stages:
            steps.setdefault(step[0], {})[step[1]] = line
    found = [Ladder(problem, dict(sorted(measured.items())), _climb(measured))
             for problem, measured in steps.items() if len(measured) > 1]
    return sorted(found, key=lambda ladder: (-ladder.climb, ladder.problem))


def _climb(steps: dict[int, CaseLine]) -> float:
    first, *others = (margin_ratio(line) for _, line in sorted(steps.items()))
    if first == float("inf"):
        return 1.0
    return max(others) / first if first > 0 else (float("inf") if max(others) > 0 else 1.0)
