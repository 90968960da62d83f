"""False alarms: right layers judged, draw by draw, and how near each check came to its threshold."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from moe_ref.contract.case_id import format_case
from moe_ref.contract.vocabulary import RED_VERDICTS
from moe_ref.records.schema import from_number, to_number
from moe_ref.verify.study.draws import draw
from moe_ref.verify.study.journal import DrawLine, RunOfVariant
from moe_ref.verify.study.variants import variants

LEVELS = (0.5, 0.9, 0.99, 0.999)


@dataclass(frozen=True)
class Spread:
    """Values over the threshold of one check in all runs that have it: how many, quantiles at LEVELS, the largest, and
    the run that has it.
    """

    check: str
    values: list[float]
    quantiles: tuple[float, ...]
    largest: float
    draw: int
    variant: str


def judged_draw(number: int) -> DrawLine:
    """All variants of one draw; a pure function of its number and of the sources."""
    torch.set_num_threads(1)  # torch adds up in another order with more
    one = draw(number)
    runs = []
    for variant in variants(one):
        found = variant.run(one)
        judgement = found.judgement
        shares = {name: to_number(float(f"{value:.4g}")) for name, value in found.shares.items()}
        runs.append(RunOfVariant(variant=variant.name, hardware=variant.hardware, verdict=judgement.verdict,
                                 reason=judgement.reason, first_stage=judgement.first_stage,
                                 power=to_number(found.power), shares=shares))
    return DrawLine(draw=number, case=format_case(one.case), data=one.data, contract=one.contract, runs=runs)


def accusations(lines: Iterable[DrawLine]) -> list[tuple[DrawLine, RunOfVariant]]:
    """Runs with a verdict that accuses; all of them are right."""
    return [(line, run) for line in lines for run in line.runs if run.verdict in RED_VERDICTS]


def spreads(lines: Iterable[DrawLine]) -> list[Spread]:
    """Of every check, in the order in which they first appear."""
    found: dict[str, list[tuple[float, int, str]]] = {}
    for line in lines:
        for run in line.runs:
            for check, value in run.shares.items():
                found.setdefault(check, []).append((from_number(value), line.draw, run.variant))
    return [_spread(check, values) for check, values in found.items()]


def _spread(check: str, found: list[tuple[float, int, str]]) -> Spread:
    found = sorted(found)
    values = [value for value, _, _ in found]
    quantiles = tuple(values[min(len(values) - 1, int(level * len(values)))] for level in LEVELS)
    return Spread(check, values, quantiles, *found[-1])
