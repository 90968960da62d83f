"""Is a right layer ever accused? Ten right layers of every draw, judged as any subject is.

    python ci/alarms.py [--draws 2000] [--lanes 2] [--record FILE] [--plot FILE]
    python ci/alarms.py --only DRAW

A draw is a layer, its inputs and its rounding contract, chosen by its number alone; its ten layers differ in order of
summation, reduction, hardware class and in what they show: moe_ref/verify/study. Every draw is a line of FILE at
once, so that a rerun goes on where the last one ended. Printed per check: how near it came to its threshold. Exit 1 on
any accusation: that is a defect of the model, and `--only` repeats it.
"""

from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import moe_ref
from moe_ref.contract.errors import UsageValueError
from moe_ref.report.tables import NamedTable, write_between
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.run.subjects import source_digest
from moe_ref.verify.study.alarms import LEVELS, Spread, accusations, judged_draw, spreads
from moe_ref.verify.study.journal import DrawLine, Header, appending, read_journal
from moe_ref.verify.study.plot import plot_spreads

DRAWN = ("sigmas", "rms", "sign", "slots", "ranks")
"""Checks in the figure, besides the bound of the output; the rest is in the table."""
FILL_LANES = 4
"""Draws handed to a lane ahead of time."""


def run_draws(numbers: list[int], lanes: int, record: Path, header: Header, done: dict[int, DrawLine]) -> None:
    """Judge the draws that are not done and append them, whatever the order in which they end."""
    left = [number for number in numbers if number not in done]
    columns = (TextColumn("draws"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[red]} accused"))
    with (appending(record, header) as journal, Progress(*columns, console=Console(stderr=True)) as progress,
          ProcessPoolExecutor(lanes, get_context("spawn")) as pool):
        task = progress.add_task("", total=len(numbers), completed=len(numbers) - len(left), red=0)
        for start in range(0, len(left), FILL_LANES * lanes):
            for future in as_completed([pool.submit(judged_draw, number)
                                        for number in left[start:start + FILL_LANES * lanes]]):
                line = future.result()
                journal.append(line)
                done[line.draw] = line
                progress.update(task, advance=1, red=len(accusations(done.values())))


def spread_table(found: list[Spread]) -> NamedTable:
    """How near each check came to its threshold."""
    columns = ("check", "runs", *(f"{100 * level:g} %" for level in LEVELS), "largest", "draw", "variant")
    return NamedTable("Largest value of a run over its threshold", columns, [
        (one.check, str(len(one.values)), *(f"{value:.3f}" for value in one.quantiles), f"{one.largest:.3f}",
         str(one.draw), one.variant) for one in found])


def axes_of(lines: list[DrawLine]) -> list[str]:
    """What was drawn and what the verdicts were, in numbers of runs; not_run is a layer too wide for its contract."""
    axes: dict[str, Counter[str]] = {axis: Counter() for axis in ("verdict", "data", "contract", "dtype", "hardware")}
    for line in lines:
        for run in line.runs:
            words = {"verdict": run.verdict, "data": line.data, "contract": line.contract, "hardware": run.hardware,
                     "dtype": next(word for word in line.case.split("-") if word in ("fp32", "fp16", "bf16"))}
            for axis, word in words.items():
                axes[axis][word] += 1
    return [f"{axis}: " + ", ".join(f"{word} {count}" for word, count in counts.most_common())
            for axis, counts in axes.items()]


@click.command()
@click.option("--draws", default=2000, show_default=True)
@click.option("--first", default=0, show_default=True, help="The first draw.")
@click.option("--lanes", default=2, show_default=True, help="Processes.")
@click.option("--record", type=click.Path(dir_okay=False, path_type=Path), default=Path("runs/alarms.jsonl"),
              show_default=True)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Histograms, .svg or .png.")
@click.option("--write", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Document whose table between the marks `alarms` is replaced.")
@click.option("--only", type=int, help="Judge this draw alone, and write nothing.")
def main(draws: int, first: int, lanes: int, record: Path, plot: Path | None, write: Path | None,
         only: int | None) -> None:
    """Judge right layers; exit 1 if one is accused."""
    if plot is not None and plot.suffix not in (".svg", ".png"):
        raise click.UsageError(f"plot {plot}: should end in .svg or .png")
    console, numbers = Console(width=150), list(range(first, first + draws))
    if only is not None:
        lines = [judged_draw(only)]
        console.print(f"draw {only}: {lines[0].case}, data {lines[0].data}, contract {lines[0].contract}")
    else:
        record.parent.mkdir(parents=True, exist_ok=True)
        header = Header(sources=source_digest(moe_ref), tolerances=load_tolerances().digest)
        try:
            done = read_journal(record, header)
        except UsageValueError as error:
            raise click.UsageError(str(error)) from error
        run_draws(numbers, lanes, record, header, done)
        lines = [done[number] for number in numbers]
    found, accused = spreads(lines), accusations(lines)
    table, axes = spread_table(found), axes_of(lines)
    summary = f"{sum(len(line.runs) for line in lines)} right layers of {len(lines)} draws, {len(accused)} accused"
    console.print(table.on_screen(), *axes, sep="\n")
    for line, run in accused:
        console.print(f"ACCUSED draw {line.draw}, {run.variant} ({run.hardware}), {line.case}, data {line.data}, "
                      f"contract {line.contract}: {run.reason}", markup=False)
    console.print(summary)
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        plot_spreads([one for one in found if one.check.endswith(DRAWN) or one.check == "output"], plot)
    if write is not None and only is None:
        command = f"Printed by `python ci/alarms.py --draws {draws}`:"
        write_between(write, "alarms", "\n".join([command, "", table.in_document(), "; ".join(axes) + ".", "",
                                                  f"{summary}.", ""]))
    raise SystemExit(1 if accused else 0)


if __name__ == "__main__":
    main()
