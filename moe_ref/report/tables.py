"""Tables that are printed, stand on the page, and stand between two marks of a document, word for word."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from moe_ref.contract.errors import UsageValueError


@dataclass(frozen=True)
class NamedTable:
    """A title, the names of the columns, rows of words; right: columns of numbers, which are aligned on the right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Collection[str] = ()

    def on_screen(self) -> Table:
        """As it is printed."""
        table = Table(title=self.title, title_justify="left")
        for name in self.columns:
            is_number = name in self.right
            # Names without spaces are broken where they do not fit: half a name is none.
            table.add_column(name, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def in_document(self) -> str:
        """As Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return f"{self.title}:\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def write_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- end of NAME -->`; UsageValueError where they are not."""
    content = path.read_text()
    first, last = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if content.count(first) != 1 or content.count(last) != 1 or content.index(first) > content.index(last):
        raise UsageValueError(f"{path}: should hold {first.strip()} and then {last}, once each")
    head, _, rest = content.partition(first)
    path.write_text(f"{head}{first}\n{text}\n{last}{rest.partition(last)[2]}")
