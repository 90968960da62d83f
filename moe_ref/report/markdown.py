"""Small pieces of Markdown that hold foreign text safely, and tables that fit a budget."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from moe_ref.report.words import one_line

CELL_LIMIT = 300
"""Characters of foreign text in one cell; the whole text is in index.html and report.json."""


def cell(text: str, limit: int = CELL_LIMIT) -> str:
    """Foreign text as plain words in a table cell: no HTML, no Markdown, no column break, no mention."""
    safe = html.escape(one_line(text, limit), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#!|~])", r"\\\1", safe).replace("@", "&#64;")


def code(text: str) -> str:
    """Foreign text as a code span in a table cell; its fence is longer than any run of backticks inside."""
    text = one_line(text, CELL_LIMIT).replace("|", "\\|")
    if not text:
        return ""
    fence = "`" * (1 + max(map(len, re.findall(r"`+", text)), default=0))
    padding = " " if text[0] == "`" or text[-1] == "`" else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def block(text: str) -> str:
    """Foreign text of several lines as a fenced block that it cannot close."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


@dataclass(frozen=True)
class Section:
    """A titled table (columns given) or list of blocks; at most max_rows rows are wanted."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    max_rows: int
    text: str = ""

    def head(self) -> str:
        table = f"| {' | '.join(self.columns)} |\n|{' --- |' * len(self.columns)}\n"
        text = f"{self.text}\n\n" if self.text else ""
        return f"## {self.title}\n\n{text}{table if self.columns and self.rows else ''}"

    def row(self, number: int) -> str:
        cells = self.rows[number]
        return f"| {' | '.join(cells)} |\n" if self.columns else "\n".join(cells) + "\n"

    def cut(self, shown: int) -> str:
        left = len(self.rows) - shown
        told = f"\n{left} more of {len(self.rows)} not shown here; all are in index.html and report.json.\n"
        return told if left > 0 else ""


def fit(top: str, sections: Sequence[Section], budget: int) -> str:
    """Top and sections in at most `budget` characters: titles stay, rows are cut and the cut is stated."""
    frames = [len(section.head()) + len(section.cut(0)) + 2 for section in sections]
    left = budget - len(top) - sum(frames)
    parts = [top]
    for section in sections:
        rows: list[str] = []
        for number in range(min(section.max_rows, len(section.rows))):
            row = section.row(number)
            if len(row) > left:
                break
            rows.append(row)
            left -= len(row)
        parts.append(section.head() + "".join(rows) + section.cut(len(rows)) + "\n")
    return "".join(parts)
