"""`score`: the defect catalogue against the suite."""

import os
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moe_ref.contract.errors import UsageValueError

_CATALOGUE, _RECORD = Path("tests/catalogue"), Path("runs/score")


@click.command("score")
@click.option("--catalogue", "folder", type=click.Path(path_type=Path, file_okay=False), default=_CATALOGUE,
              show_default=True, help="Folder of the defect catalogue.")
@click.option("--only", multiple=True, help="Pattern of ids, as A01.*, B*, right.*; may be given several times.")
@click.option("--full", is_flag=True, help="Every mutant meets every case of the tiers, not only its carriers.")
@click.option("--record", type=click.Path(path_type=Path, file_okay=False), default=None,
              help="Folder of score.jsonl; a run that is started again goes on from it.")
@click.option("--lanes", type=click.IntRange(1), default=min(8, os.cpu_count() or 1), show_default=True)
@click.option("--seconds", type=click.FloatRange(1), default=120.0, show_default=True, help="Limit of one case.")
@click.option("--verbose", is_flag=True, help="What was said of every mutant, in full.")
def score_command(folder: Path, only: tuple[str, ...], full: bool, record: Path | None, lanes: int, seconds: float,
                  verbose: bool) -> int:
    """Seed every defect of the catalogue and count who is caught, missed, and wrongly accused.

    Exit codes: 0 all mutants caught by their check, no right variant accused; 1 otherwise; 2 wrong use; 3 a mutant could
    not be judged.
    """
    from moe_ref.records.score import SCORE_FILE, MutantOutcome, ScoreRun, read_score
    from moe_ref.records.store import RecordWriter
    from moe_ref.score.load import load_catalogue
    from moe_ref.score.run import new_plan, new_score_header, run_score

    plan = new_plan(load_catalogue(folder), only=only, full=full, lanes=lanes, seconds=seconds)
    run = ScoreRun(new_score_header(plan))
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())

    def keep(outcome: object) -> None:
        run.add(outcome)
        progress.advance(task)
        if isinstance(outcome, MutantOutcome):
            own = "" if outcome.owned or outcome.outcome != "caught" else " (not by its owner)"
            silent = {True: "", False: " NOT SILENT off its trigger", None: ""}[outcome.silent]
            click.echo(f"{outcome.outcome:9s} {outcome.id} {outcome.said}{own}{silent} {outcome.case} "
                       f"[{outcome.tried} tried, {outcome.seconds:.0f} s] {outcome.reason}")
            if verbose and outcome.message:
                click.echo(outcome.message)
        else:
            click.echo(f"{'ACCUSED' if outcome.red or outcome.reason else 'right':9s} {outcome.id} "
                       f"{outcome.passed} of {outcome.executed} pass, {outcome.not_run} not run, "
                       f"{outcome.unsupported} unsupported [{outcome.seconds:.0f} s] {outcome.reason}")
            for text in outcome.red:
                click.echo(f"    {text}")

    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("score", total=len([one for one in (*plan.catalogue.mutants, *plan.catalogue.right)
                                                     if plan.chosen(one.id)]))
        run_score(plan, run, keep)
    return 0
