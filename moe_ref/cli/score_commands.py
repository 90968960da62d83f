"""`score`: the defect catalogue against the suite."""

import json
import math
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moe_ref.contract.errors import UsageValueError
from moe_ref.records.score import SCORE_FILE, MutantOutcome, Outcome, RightOutcome, ScoreLine, ScoreRun, read_score
from moe_ref.records.store import RecordWriter
from moe_ref.report.score import complaints, score_document, summary, tables
from moe_ref.report.tables import write_between

_CATALOGUE = Path("tests/catalogue")
_WIDTH = 160


@click.command("score")
@click.option("--catalogue", "folder", type=click.Path(path_type=Path, file_okay=False), default=_CATALOGUE,
              show_default=True, help="Folder of the defect catalogue.")
@click.option("--only", multiple=True, help="Pattern of ids, as A01.*, B*, right.*; may be given several times.")
@click.option("--gpu-only", is_flag=True, help="Of the mutants those that no CPU can run.")
@click.option("--full", is_flag=True, help="Every mutant meets every case of the tiers, not only its carriers.")
@click.option("--record", type=click.Path(path_type=Path, file_okay=False), default=None,
              help="Folder of score.jsonl; a run that is started again goes on from it.")
@click.option("--seed", "folder_of_copy", type=click.Path(path_type=Path, file_okay=False), default=None,
              help="Write the one mutant that --only names into this folder, to be verified from there; run nothing.")
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
@click.option("--lanes", type=click.IntRange(1), default=min(8, os.cpu_count() or 1), show_default=True)
@click.option("--seconds", type=click.FloatRange(1), default=120.0, show_default=True, help="Limit of one case.")
@click.option("--deadline", default=math.inf, help="Seconds after which no further subject is begun.")
@click.option("--verbose", is_flag=True, help="What was said of every mutant, in full.")
@click.option("--write", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Document whose tables between the marks `score` are replaced.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def score_command(folder: Path, only: tuple[str, ...], gpu_only: bool, full: bool, record: Path | None,
                  folder_of_copy: Path | None, device: str, lanes: int, seconds: float, deadline: float, verbose: bool,
                  write: Path | None, as_json: bool) -> int:
    """Seed every defect of the catalogue and count who is caught, missed, and wrongly accused.

    Exit codes: 0 all mutants caught by their check, silent off their trigger, no right variant accused; 1 otherwise; 2
    wrong use; 3 a mutant could not be judged; 4 cut short by the deadline.
    """
    from moe_ref.score.load import load_catalogue
    from moe_ref.score.run import ScorePlan, checked, new_score_header, run_score
    from moe_ref.score.seed import seed

    plan = checked(ScorePlan(catalogue=load_catalogue(folder), only=only, gpu_only=gpu_only, full=full, lanes=lanes,
                             seconds=seconds, deadline=deadline, device=device))
    if folder_of_copy is not None:
        chosen = [one for one in (*plan.catalogue.mutants, *plan.catalogue.right) if plan.chosen(one)]
        if len(chosen) != 1:
            raise UsageValueError(f"--seed wants one subject, but --only names {len(chosen)}")
        seed(chosen[0].patches, folder_of_copy)
        click.echo(f"cd {shlex.quote(str(folder_of_copy))} && moe-ref verify {chosen[0].subject} "
                   f"--case {plan.first_carrier(chosen[0])}")
        return 0
    with _recorded(record, new_score_header(plan)) as (run, append), _watched(plan.size, verbose) as tell:
        def keep(outcome: Outcome) -> None:
            run.add(outcome)
            append(outcome)
            tell(outcome)

        num_left = run_score(plan, run, keep)
    chosen = " ".join([*["--gpu-only"] * gpu_only, *(f"--only '{one}'" for one in only)])
    code = _told(run, write, as_json, chosen)
    if num_left:
        click.echo(f"CUT SHORT: {num_left} subjects not begun within {deadline:g} s; the same --record goes on")
    return code or (4 if num_left else 0)


@contextmanager
def _recorded(record: Path | None, header: ScoreLine) -> Iterator[tuple[ScoreRun, Callable[[Outcome], None]]]:
    """The run so far and where its lines go."""
    if record is None:
        yield ScoreRun(header), lambda line: None
        return
    found = read_score(record / SCORE_FILE)
    if found and found.header.digest != header.digest:
        raise UsageValueError(f"{record / SCORE_FILE}: made with sources {found.header.digest}, but these are "
                              f"{header.digest}: begin another folder")
    with RecordWriter(record, SCORE_FILE) as writer:
        if found is None:
            writer.append(header)
        yield found or ScoreRun(header), writer.append


@contextmanager
def _watched(total: int, verbose: bool) -> Iterator[Callable[[Outcome], None]]:
    """A bar on a terminal; a line for each outcome on standard error."""
    console = Console(stderr=True, width=_WIDTH)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task, count = progress.add_task("score", total=total), 0

        def tell(outcome: Outcome) -> None:
            nonlocal count
            count += 1
            progress.advance(task)
            click.echo(f"[{count}/{total}] {_words(outcome)}", err=True)
            if verbose and isinstance(outcome, MutantOutcome) and outcome.message:
                click.echo(outcome.message, err=True)
        yield tell


def _words(outcome: Outcome) -> str:
    if isinstance(outcome, RightOutcome):
        word = "ACCUSED" if outcome.red or outcome.reason else "right"
        return (f"{word} {outcome.id}: {outcome.passed} of {outcome.executed} pass, {outcome.not_run} not run, "
                f"{outcome.unsupported} unsupported, {outcome.seconds:.0f} s {outcome.reason}"
                + "".join(f"\n    {text}" for text in outcome.red))
    own = " (not by its owner)" * (outcome.outcome == "caught" and not outcome.owned)
    loud = " (NOT SILENT off its trigger)" * (outcome.silent is False)
    return (f"{outcome.outcome} {outcome.id}: {outcome.said}{own}{loud} {outcome.case}, {outcome.tried} tried, "
            f"{outcome.seconds:.0f} s {outcome.reason}")


def _told(run: ScoreRun, write: Path | None, as_json: bool, chosen: str) -> int:
    """Tables, what is wrong, and the exit code."""
    wrong = complaints(run)
    if as_json:
        click.echo(json.dumps(score_document(run), indent=1))
    else:
        console = Console(width=_WIDTH)
        for table in tables(run):
            console.print(table.on_screen())
        for text in wrong:
            click.echo(text)
        click.echo(summary(run))
    if write is not None:
        command = f"`moe-ref score{' ' * bool(chosen)}{chosen}`: {summary(run)}."
        write_between(write, "score", "\n".join([command, "", *(one.in_document() for one in tables(run)), *wrong]))
    if any(one.outcome == "broken" for one in run.mutants.values()):
        return 3
    return 1 if wrong else 0
