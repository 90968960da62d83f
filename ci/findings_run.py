"""Run the scripts of docs/findings and compare what each sees with the verdict of its page.

A script ends with exit code 0 and a line "SEEN", 1 and "NOT SEEN", or 2 and "CANNOT RUN: reason". Anything else, such
as a traceback, which Python ends with 1 too, is BROKEN.
"""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "findings"
WORDS = {0: "SEEN", 1: "NOT SEEN", 2: "CANNOT RUN"}
EXPECTED = {"confirmed": "SEEN", "changed": "SEEN", "refuted": "NOT SEEN"}
"""What the script of a page with this verdict prints; "changed": the page claims less or other than was first said."""

_HEAD = re.compile(r"^\| (\S+) \| (\S+) \| (confirmed|refuted|changed) \| (\d{4}-\d{2}-\d{2}) \|$", re.MULTILINE)
STYLES = {"SEEN": "green", "NOT SEEN": "yellow", "CANNOT RUN": "dim"}


@dataclass(frozen=True)
class Page:
    """What the head of a page says: the package with the version that was tested, the verdict and its day."""

    name: str
    package: str
    tested: str
    verdict: str
    day: str

    @property
    def script(self) -> Path:
        """The script beside the page."""
        return FOLDER / f"{self.name}.py"


@dataclass(frozen=True)
class Outcome:
    """What a script did: a word of WORDS, BROKEN or TIMED OUT, the reason, what it printed, its seconds."""

    word: str
    reason: str
    output: str
    seconds: float


def read_page(path: Path) -> Page:
    """The head of a page; raises ValueError unless it has exactly one."""
    heads = _HEAD.findall(path.read_text())
    if len(heads) != 1:
        raise ValueError(f"{path.name}: {len(heads)} heads, but should be 1: "
                         "| package | version | confirmed, refuted or changed | YYYY-MM-DD |")
    return Page(path.stem, *heads[0])


def pages() -> list[Page]:
    """Every page, by name."""
    return [read_page(path) for path in sorted(FOLDER.glob("*.md")) if path.name != "README.md"]


def run_script(script: Path, limit: float) -> Outcome:
    """Run a script on its own, with all that it starts, for at most `limit` seconds."""
    started = time.monotonic()
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=os.environ | threads, start_new_session=True) as process:
        try:
            output, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # a session of its own: ranks that it started end with it
            output, _ = process.communicate()
            return Outcome("TIMED OUT", f"after {limit:.0f} s", output, time.monotonic() - started)
    seconds = time.monotonic() - started
    said = output.strip().rpartition("\n")[2]
    word, _, reason = said.partition(":")
    if word != WORDS.get(process.returncode):
        last = errors.strip().rpartition("\n")[2] or said
        return Outcome("BROKEN", f"exit code {process.returncode}, last line {last!r}", output + errors, seconds)
    return Outcome(word, reason.strip(), output, seconds)


def disagrees(page: Page, outcome: Outcome) -> bool:
    """Whether the page is out of date, or its script; a package that is not here says nothing."""
    return outcome.word not in ("CANNOT RUN", EXPECTED[page.verdict])


def installed(package: str) -> str:
    """The version in this environment, or a dash."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


@click.command()
@click.argument("names", nargs=-1)
@click.option("--seconds", default=60.0, show_default=True, help="Time limit of a script.")
def main(names: tuple[str, ...], seconds: float) -> None:
    """Run the scripts NAMES, or all."""
    known = pages()
    if unknown := set(names) - {page.name for page in known}:
        raise click.UsageError(f"no finding {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in known)}")
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table(Column("finding", no_wrap=True), "package", "tested", "here", "page", "outcome", "reason", "seconds")
    failed = []
    counts: dict[str, int] = {}
    for page in known:
        if names and page.name not in names:
            continue
        outcome = run_script(page.script, seconds)
        counts[outcome.word] = counts.get(outcome.word, 0) + 1
        if disagrees(page, outcome):
            failed.append((page, outcome))
        style = "red" if disagrees(page, outcome) else STYLES[outcome.word]
        table.add_row(page.name, page.package, page.tested, installed(page.package), page.verdict,
                      f"[{style}]{outcome.word}[/]", escape(outcome.reason), f"{outcome.seconds:.1f}")
    console.print(table)
    console.print(", ".join(f"{number} {word}" for word, number in sorted(counts.items())))
    for page, outcome in failed:
        console.print(f"{page.name}: the page says {page.verdict}, the script {outcome.word}. It printed:", style="red")
        console.print(outcome.output, markup=False, highlight=False)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
