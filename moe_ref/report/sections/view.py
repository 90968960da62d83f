"""What a section is made from, and how its template is filled; jinja2 is imported late."""

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from moe_ref.records.schema import CaseLine
from moe_ref.report.compare import Comparison
from moe_ref.report.evidence import Evidence
from moe_ref.report.facts import culprit, margin_stage, worst_stage
from moe_ref.report.failure_groups import FailureGroup
from moe_ref.report.matrix import LEVELS, colour_of
from moe_ref.report.words import excess, first_line, format_ratio, printable, replay, stage_ratio, where, worst_element

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_COORDINATES = re.compile(r' (?:d|x|y|points|transform)="[^"<>]*"')
_FRACTION = re.compile(r"(\.\d\d)\d+")
_IDLE = re.compile(r"""\n +(?=<)|(?<=<g) id="[^"]*"| transform="rotate\(-0 [^"]*"|"""
                   r"""(?<=font-family: )'[^"<>]*, (?=sans-serif)""")
"""Of an <svg>: what neither places nor colours anything on this page; half of the text."""

_WORDS: dict[str, Any] = {
    "culprit": culprit, "worst_stage": worst_stage, "margin_stage": margin_stage, "excess": excess, "where": where,
    "worst_element": worst_element, "replay": replay, "first_line": first_line, "format_ratio": format_ratio,
    "colour_of": colour_of, "levels": range(LEVELS), "stage_ratio": stage_ratio, "printable": printable,
    "tags": {"PREDICTED": "unsure", "NOT RUN": "unsure", "NOT INSTALLED": "unsure", "WRONG": "wrong",
             "CRASHED": "wrong", "YES": "wrong"}}
"""Functions that every template may call; tags: cells of tables that stand out, and how."""


@dataclass(frozen=True)
class View:
    """lines: of all cases, as `case_lines` orders them. anchors: case -> the id of its card or row, "cases" where
    the page shows neither. groups: of failures.
    """

    evidence: Evidence
    lines: tuple[CaseLine, ...]
    anchors: dict[str, str]
    comparison: Comparison | None = None
    groups: tuple[FailureGroup, ...] = ()


@cache
def _environment() -> "Environment":
    """Autoescape is on, an unknown name is an error, templates come from this package alone."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                              loader=FunctionLoader(_source))
    environment.globals.update(_WORDS)
    return environment


def _source(name: str) -> str:
    return files("moe_ref.report").joinpath("templates", name).read_text(encoding="utf-8")


def fill(template: str, **words: object) -> "Markup":
    """A template of moe_ref/report/templates, filled; everything from records is escaped."""
    from markupsafe import Markup

    return Markup(_environment().get_template(template).render(**words))


def script(name: str) -> "Markup":
    """A script of moe_ref/report/templates, as it is."""
    from markupsafe import Markup

    return Markup(_source(name))


def drawing(svg: str) -> "Markup":
    """An <svg> of moe_ref.report, its coordinates to a hundredth: what stands in it was escaped by whoever drew it.

    It scrolls where a screen is too narrow to read it. "" stays "".
    """
    from markupsafe import Markup

    lean = _COORDINATES.sub(lambda found: _FRACTION.sub(r"\1", found[0]), _IDLE.sub("", svg))
    return Markup(f'<div class="plot">{lean}</div>' if lean else "")
