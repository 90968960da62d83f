"""Progress of a run on standard error: a bar on a terminal, sparse lines in a log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moe_ref.contract.vocabulary import RED_VERDICTS
from moe_ref.records.schema import CaseLine
from moe_ref.verify.run.run import Observer

_LINE_EVERY_CASES = 25
_TELL_EVERY_SECONDS = 15.0


@contextmanager
def watch(title: str, total: int) -> Iterator[Observer]:
    """An observer of a run of `total` cases."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _log_observer(total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("[dim]{task.fields[doing]}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total, doing="")
        yield Observer(lambda line: progress.update(task, advance=1, doing=""),
                       lambda case_id, text: progress.update(task, doing=f"{case_id}: {text}"))


def _log_observer(total: int) -> Observer:
    """Lines for cases that do not pass, for every 25th that does, and for a long case every fifteen seconds."""
    count, told = 0, time.monotonic()

    def line(done: CaseLine) -> None:
        nonlocal count, told
        count += 1
        if done.verdict in RED_VERDICTS or count % _LINE_EVERY_CASES == 0 or count == total:
            told = time.monotonic()
            click.echo(f"[{count}/{total}] {done.verdict} {done.case}", err=True)

    def tell(case_id: str, text: str) -> None:
        nonlocal told
        if time.monotonic() - told > _TELL_EVERY_SECONDS:
            told = time.monotonic()
            click.echo(f"[{count}/{total}] {case_id}: {text}", err=True)
    return Observer(line, tell)
