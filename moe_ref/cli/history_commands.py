"""`history`: results of runs over time in a database."""

import json
from pathlib import Path

import click
from rich.console import Console

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Stage

_WIDTH = 160
_DATABASE = Path("history.db")
_DATABASE_OPTION = click.option("--database", type=click.Path(path_type=Path, dir_okay=False), default=_DATABASE,
                                show_default=True, help="SQLite file of `history add`.")


@click.group("history")
def history_command() -> None:
    """Keep results of runs, and see where classes of cases went worse and what had changed."""


@history_command.command("add")
@click.argument("paths", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@_DATABASE_OPTION
@click.option("--shards", is_flag=True, help="All RUNs are shards of one run.")
def add_command(paths: tuple[Path, ...], database: Path, shards: bool) -> None:
    """Store RUNs, folders or files of records of `verify`, all or none; again is no harm: a run is known by its id."""
    from moe_ref.records.store import read_run
    from moe_ref.report.history import add_runs
    from moe_ref.report.shards import merge_runs

    runs = [read_run(path) for path in paths]
    runs = [merge_runs(runs)] if shards else runs
    if cut := next((run.header.run for run in runs if run.end is None), None):
        raise UsageValueError(f"run {cut} was cut short; finish it with --resume, then add it")
    for run, word in zip(runs, add_runs(database, runs), strict=True):
        click.echo(f"{word}: run {run.header.run} of {run.header.implementation.name}, {len(run.cases)} cases")


@history_command.command("show")
@_DATABASE_OPTION
@click.option("--class", "words", default="", help='Words that a class has, as "bf16 tp4"; default: every class.')
@click.option("--stage", "stages", multiple=True, default=(Stage.OUTPUT.value,), show_default=True,
              help="May be given several times; all: every stage.")
@click.option("--impl", "implementation", default="", help="Default: that of the newest run.")
@click.option("--tier", default="", help="Default: that of the newest run.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def show_command(database: Path, words: str, stages: tuple[str, ...], implementation: str, tier: str,
                 as_json: bool) -> None:
    """Worst error / allowed per class of cases (dtype, tp, ep, pattern) over runs, and what changed between them."""
    from moe_ref.report.history import read_past
    from moe_ref.report.trends import change_lines, newest_run, trend_document, trend_table, trends_of

    past = read_past(database)
    found = trends_of(past, newest_run(past, implementation, tier), words, stages)
    if as_json:
        click.echo(json.dumps(trend_document(found, past), indent=1))
        return
    Console(width=_WIDTH, markup=False, highlight=False).print(trend_table(found).on_screen())
    click.echo("\n".join(change_lines(found)) or "driver, torch, Triton, CUDA, device and tolerances stayed the same")
