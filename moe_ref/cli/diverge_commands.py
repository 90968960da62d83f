"""`diverge`: how subjects drift from the truth as sums grow, and why two of them differ."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from moe_ref.cli.collected import Collected
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Format
from moe_ref.records.growth import GrowthRun, add_line, read_growth
from moe_ref.report.growth import error_table, growth_document, growth_words, law_table
from moe_ref.report.growth_plot import plot_growth

_DTYPES = ("auto", "fp32", "fp16", "bf16", "e4m3")
_LEAST_WIDTH = 180
_TELL_EVERY_SECONDS = 15.0
_OF_OPERANDS = {"bf16": "bf16", "fp16": "fp16", "fp8": "e4m3"}


@click.command("diverge")
@click.argument("subjects", nargs=-1)
@click.option("--k", "lengths", default="64:16384", show_default=True,
              help="Lengths of sums: 64:16384 doubles, 256,2048,14336 names them.")
@click.option("--m", "rows", default=64, show_default=True, type=click.IntRange(1), help="Rows, over all experts.")
@click.option("--n", "columns", default=64, show_default=True, type=click.IntRange(1), help="Columns of an expert.")
@click.option("--experts", default=4, show_default=True, type=click.IntRange(1))
@click.option("--skew", default=1.0, show_default=True, help="Loads of experts fall as 1 / (e + 1)^skew.")
@click.option("--tp", default=1, show_default=True, type=click.IntRange(1), help="Ranks that sums are split over.")
@click.option("--dtype", default="auto", show_default=True, type=click.Choice(_DTYPES),
              help="Format that operands are drawn in; auto: the one that all subjects name, or fp32.")
@click.option("--data", default="unit,positive", show_default=True, help="Of unit, positive, outlier, with commas.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(1), help="Draws that are measured as one.")
@click.option("--hardware", default="sm90", show_default=True,
              help="Class whose accumulators stand for a GPU's on a CPU.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--ask", type=click.Choice(["tf32", "low-precision", "bug"]),
              help="Answer one question on the first subject, in words, and nothing else.")
@click.option("--record", type=click.Path(path_type=Path, file_okay=False), help="Folder for records.jsonl.")
@click.option("--read", "read_from", type=click.Path(path_type=Path), help="Show a record; runs nothing.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False),
              help="Draw the curves into a .svg or .png file.")
@click.option("--baseline", type=click.Path(path_type=Path, dir_okay=False),
              help="Accepted curves; default: ci/baselines/growth.json where it exists.")
@click.option("--accept", is_flag=True, help="Make these curves the baseline; review the file's diff and commit it.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def diverge_command(subjects: tuple[str, ...], lengths: str, rows: int, columns: int, experts: int, skew: float,
                    tp: int, dtype: str, data: str, seed: int, seeds: int, hardware: str, device: str, ask: str | None,
                    record: Path | None, read_from: Path | None, plot: Path | None, baseline: Path | None,
                    accept: bool, as_json: bool) -> int:
    """Error against the truth of every SUBJECT as K grows; classes of growth; why others differ from the first.

    SUBJECT: moe_fast:{ieee,tf32,tf32x3,fp16,bf16,fp8}, torch:loop[:DTYPE], torch:grouped[:DTYPE],
    model:ACCUMULATOR:OPERANDS (as model:sm90:bf16 or model:pairwise-fp16:bf16), or module:attr, a callable
    (x_RK, w_ENK, ends_E) -> y_RN.

    Exit codes: 0 all within their bands; 1 a subject leaves its band or bound, drifts from the baseline or computes
    something else; 2 wrong use; 4 nothing could run.
    """
    if read_from:
        return _show(read_growth(read_from), plot, as_json)
    if not subjects:
        raise UsageValueError("no subject; name some, as in `moe-ref diverge moe_fast:tf32 torch:loop`")
    # Imported here, so that a record can be shown without torch.
    from moe_ref.diverge.bands import BASELINE, accept_curves, read_growth_baseline
    from moe_ref.diverge.problem import GroupedProblem, ladder
    from moe_ref.diverge.study import GrowthPlan, run_growth
    from moe_ref.diverge.subjects import Place
    from moe_ref.diverge.words import Question, answer
    from moe_ref.verify.run.environment import default_device, environment

    path = baseline or BASELINE
    if baseline and not baseline.exists() and not accept:
        raise UsageValueError(f"--baseline {baseline}: no such file; --accept writes it")
    problem = GroupedProblem(terms=ladder(lengths)[0], rows=rows, columns=columns, experts=experts, skew=skew, tp=tp,
                             dtype=_dtype(dtype, subjects), seed=seed)
    plan = GrowthPlan(subjects=tuple(dict.fromkeys(subjects)), lengths=ladder(lengths), problem=problem,
                      data=tuple(data.split(",")), seeds=seeds,
                      place=Place(default_device() if device == "auto" else device, hardware),
                      accepted={} if accept else read_growth_baseline(path).curves)
    collected = Collected(record, GrowthRun, add_line)
    with _progress(len(plan.subjects) * (len(plan.data) * len(plan.lengths) + 1)) as tell, collected:
        curves = run_growth(plan, environment(plan.place.device), collected.keep, tell)
    if ask:
        first = curves[0]
        if first.finding is None or first.law is None:
            raise UsageValueError(f"--ask: {first.subject.name}: {first.failed or 'needs unit data'}")
        click.echo(answer(Question(ask), first.subject.name, first.finding, first.law, plan.lengths[-1]))
        return 0
    if accept:
        changed = accept_curves(path, collected.run)
        click.echo(f"{path}: {changed} curves changed; review the diff and commit it", err=True)
    return _show(collected.run, plot, as_json)


def _dtype(name: str, subjects: tuple[str, ...]) -> Format:
    """The format named, or the one that all subjects multiply; fp32 where they differ or do not say."""
    if name != "auto":
        return Format(name)
    said = {_OF_OPERANDS.get(subject.rpartition(":")[2], "fp32") for subject in subjects}
    return Format(said.pop()) if len(said) == 1 else Format.FP32


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, a line every fifteen seconds in a log."""
    console, told, done = Console(stderr=True), time.monotonic(), 0
    if console.is_terminal:
        with Progress(TextColumn("diverge"), BarColumn(), TimeElapsedColumn(), TextColumn("[dim]{task.description}"),
                      console=console, transient=True) as progress:
            task = progress.add_task("", total=total)
            yield lambda doing: progress.update(task, advance=1, description=doing)
        return

    def tell(doing: str) -> None:
        nonlocal told, done
        done += 1
        if time.monotonic() - told > _TELL_EVERY_SECONDS:
            told = time.monotonic()
            click.echo(f"[{done}/{total}] {doing}", err=True)
    yield tell


def _show(run: GrowthRun, plot: Path | None, as_json: bool) -> int:
    """Tables and words, or the document; the run's own exit code, or 4 where it was cut short."""
    if plot:
        plot_growth(run, plot)
        click.echo(f"wrote {plot}", err=True)
    if as_json:
        click.echo(json.dumps(growth_document(run), indent=1))
    else:
        console = Console(width=max(_LEAST_WIDTH, Console().width), emoji=False)
        for data in run.header.data:
            console.print(error_table(run, data).on_screen())
        console.print(law_table(run).on_screen())
        for words in growth_words(run):
            console.print(words, highlight=False, markup=False)
    return run.end.exit_code if run.end else 4
