"""The matrix of the page: classes of cases (dtype, tp, pattern) against stages, the worst ratio in each."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from moe_ref.records.schema import CaseLine, Number, StageResult
from moe_ref.report.axes import axis_sort_key, case_axes
from moe_ref.report.facts import is_executed, is_red, ratio_of, stage_number
from moe_ref.report.words import stage_ratio

LEVELS = 8
"""Colour steps below 1.0, four to a decade: from 0.01 of the bound (and less) to the bound."""

_CLASS_AXES = ("dtype", "tp", "pattern")


@dataclass(frozen=True)
class Cell:
    """The worst ratio of one stage in one class: its text, colour class and the case that holds it."""

    text: str
    colour: str
    case: str


@dataclass(frozen=True)
class MatrixRow:
    """One class: a cell (or None: not compared) per stage; red cases without a stage above its bound."""

    label: tuple[str, ...]
    executed: int
    failed: int
    cells: tuple[Cell | None, ...]
    stageless: tuple[str, ...]


def colour_of(ratio: Number) -> str:
    """'bad' above 1.0, else 'level0' .. 'level7' on a log scale."""
    number = ratio_of(ratio)
    if number > 1:
        return "bad"
    level = LEVELS + math.ceil(4 * math.log10(number)) - 1 if number > 0 else 0
    return f"level{min(max(level, 0), LEVELS - 1)}"


def matrix(lines: Iterable[CaseLine]) -> tuple[list[str], list[MatrixRow]]:
    """(stages in data order, rows in the order of their classes), of the cases that ran."""
    classes: dict[tuple[str, ...], list[CaseLine]] = {}
    for line in lines:
        if is_executed(line):
            axes = case_axes(line.case)
            label = tuple(axes.get(axis, "?") for axis in _CLASS_AXES)
            classes.setdefault(label, []).append(line)
    members = [line for found in classes.values() for line in found]
    stages = sorted({stage.stage for line in members for stage in line.stages},
                    key=lambda stage: (stage_number(stage), stage))
    labels = sorted(classes, key=lambda label: tuple(map(axis_sort_key, label)))
    return stages, [_row(label, classes[label], stages) for label in labels]


def _row(label: tuple[str, ...], members: list[CaseLine], stages: list[str]) -> MatrixRow:
    stageless = tuple(line.case for line in members
                      if is_red(line) and not any(ratio_of(stage.ratio) > 1 for stage in line.stages))
    worst: dict[str, tuple[float, StageResult, str]] = {}
    for line in members:
        for stage in line.stages:
            ratio, known = ratio_of(stage.ratio), worst.get(stage.stage)
            if known is None or ratio > known[0]:
                worst[stage.stage] = ratio, stage, line.case
    cells = tuple(_cell(*worst[stage][1:]) if stage in worst else None for stage in stages)
    return MatrixRow(label, len(members), sum(map(is_red, members)), cells, stageless)


def _cell(stage: StageResult, case: str) -> Cell:
    return Cell(stage_ratio(stage), colour_of(stage.ratio), case)
