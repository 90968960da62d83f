"""Which planted faults are caught, by which check, at which length of sums; and who refuses right layers.

    python ci/power.py [--lengths 64,256,1024,4096,16384] [--seeds 5] [--write docs/studies.md]

Every fault of moe_ref/simulated/faults.py is planted in a layer of 8 tokens on four ranks and judged with all stages
shown, by its output alone, on exact data, and by the criteria of other projects beside a loop of torch operators in the
dtype of the inputs. What the model expects of a fault comes from a layer with exact sums. Exit 1 if a fault that is
expected beyond a threshold is not caught with all stages shown, or a right layer or a benign fault is accused.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moe_ref.contract.vocabulary import Dtype
from moe_ref.report.tables import NamedTable, write_between
from moe_ref.simulated.faults import FAULTS
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.study.data import StudyData
from moe_ref.verify.study.power import OWN_CHECKS, SHOWN, Cell, power_cells, right_cells

LENGTHS = "64,256,1024,4096,16384"
DTYPES = (Dtype.BF16, Dtype.FP32)
LONG, LONG_SEEDS, FEW_SEEDS = 16384, 2, 2
"""Sums from which on there are fewer seeds, and the seeds of right layers and of faults in small data."""
BENIGN = FAULTS[0].name


def run(lengths: list[int], seeds: int) -> tuple[list[Cell], list[Cell]]:
    """Cells of faults, and of right layers on one rank and on four; small data are such as others test with."""
    def some(terms: int, most: int) -> range:
        return range(min(most, LONG_SEEDS) if terms >= LONG else most)

    def right(dtype: Dtype, terms: int, tp: int, data: StudyData, seed: int) -> Callable[[], Iterable[Cell]]:
        return lambda: right_cells(dtype, terms, tp, seed, data)

    def faulty(dtype: Dtype, terms: int, data: StudyData, seed: int) -> Callable[[], Iterable[Cell]]:
        return lambda: power_cells(dtype, terms, seed, data)

    few = min(seeds, FEW_SEEDS)
    jobs_of_faults = [faulty(dtype, terms, StudyData.UNIT, seed) for dtype in DTYPES for terms in lengths
                      for seed in some(terms, seeds)]
    jobs_of_faults += [faulty(Dtype.BF16, terms, StudyData.SMALL, seed) for terms in lengths if terms < LONG
                       for seed in range(few)]
    jobs_of_right = [right(dtype, terms, tp, data, seed) for dtype in DTYPES for terms in lengths for tp in (1, 4)
                     for data in (StudyData.UNIT, StudyData.SMALL) for seed in some(terms, few)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    found: list[list[Cell]] = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for title, jobs in (("faults", jobs_of_faults), ("right layers", jobs_of_right)):
            cells: list[Cell] = []
            for job in progress.track(jobs, description=title):
                cells.extend(job())
            found.append(cells)
    return found[0], found[1]


def fractions(cells: list[Cell], lengths: list[int], check: str) -> str:
    """Share of runs that a check refuses per length, one number where all are equal; "-" without a criterion."""
    shares = []
    for terms in lengths:
        of_length = [cell.caught[check] for cell in cells if cell.terms == terms and check in cell.caught]
        shares.append(f"{sum(of_length) / len(of_length):.2g}".replace("0.", ".") if of_length else "-")
    return shares[0] if len(set(shares)) == 1 else "/".join(shares)


def compared(title: str, groups: dict[str, list[Cell]], lengths: list[int], own: tuple[str, ...]) -> NamedTable:
    """Every check beside every project's criterion."""
    checks = [*own, *load_tolerances().file.published]
    return NamedTable(title, ["", *checks], [
        [name, *(fractions(cells, lengths, check) for check in checks)] for name, cells in groups.items()])


def predicted(title: str, groups: dict[str, list[Cell]], lengths: list[int]) -> NamedTable:
    """The least expected value over threshold per length, and of the runs expected beyond it how many are caught."""
    rows = []
    for name, cells in groups.items():
        row = [name]
        for terms in lengths:
            of_length = [cell for cell in cells if cell.terms == terms]
            visible = [cell for cell in of_length if cell.expected > 1]
            least = min(cell.expected for cell in of_length)
            caught = f", {sum(cell.caught[SHOWN] for cell in visible)} of {len(visible)}" if visible else ""
            row.append(f"{of_length[0].stage} {least:.2g}{caught}" if visible else f"not expected, {least:.2g}")
        rows.append(row)
    return NamedTable(title, ["", *(f"K = {terms}" for terms in lengths)], rows)


def by_name(cells: list[Cell], dtype: Dtype, data: StudyData) -> dict[str, list[Cell]]:
    """The cells of one dtype and kind of data by fault."""
    chosen = [cell for cell in cells if (cell.dtype, cell.data) == (dtype, data)]
    names = dict.fromkeys(cell.fault for cell in chosen)
    return {name: [cell for cell in chosen if cell.fault == name] for name in names}


def tables_of(faulty: list[Cell], right: list[Cell], lengths: list[int]) -> list[NamedTable]:
    """All tables, in the order of the document."""
    scale = "/".join(map(str, lengths))
    tables = []
    for dtype in DTYPES:
        groups = by_name(faulty, dtype, StudyData.UNIT)
        tables.append(compared(f"Refused share of faulty {dtype} layers at K = {scale}", groups, lengths, OWN_CHECKS))
        tables.append(predicted(f"{dtype}: first failing stage, least expected value / threshold, caught of those "
                                "expected beyond it", groups, lengths))
    if short := [terms for terms in lengths if terms < LONG]:
        tables.append(compared(f"Refused share of faulty bf16 layers at K = {'/'.join(map(str, short))}, small data",
                               by_name(faulty, Dtype.BF16, StudyData.SMALL), short, OWN_CHECKS))
    groups = {f"{dtype}, {data} data, tp {tp}": [cell for cell in right
                                                 if (cell.dtype, cell.data, cell.tp) == (dtype, data, tp)]
              for dtype in DTYPES for data in (StudyData.UNIT, StudyData.SMALL) for tp in (1, 4)}
    tables.append(compared(f"Refused share of right layers at K = {scale}", groups, lengths, OWN_CHECKS[:2]))
    return tables


def wrong(faulty: list[Cell], right: list[Cell]) -> list[str]:
    """Cells that contradict the model, in words."""
    def words(cell: Cell) -> str:
        return f"{cell.fault}, {cell.dtype}, K = {cell.terms}, tp {cell.tp}, {cell.data} data, seed {cell.seed}"

    missed = [f"{words(cell)}: expected {cell.expected:.3g}, but not caught"
              for cell in faulty if cell.expected > 1 and not cell.caught[SHOWN]]
    return missed + [f"{words(cell)}: right, but accused by {check}"
                     for cell in [*right, *(cell for cell in faulty if cell.fault == BENIGN)]
                     for check in OWN_CHECKS if cell.caught.get(check)]


@click.command()
@click.option("--lengths", "lengths_text", default=LENGTHS, show_default=True, help="K, the hidden size.")
@click.option("--seeds", default=5, show_default=True, help=f"Layers per length; {LONG_SEEDS} from {LONG} on.")
@click.option("--write", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Document whose tables between the marks `power` are replaced.")
def main(lengths_text: str, seeds: int, write: Path | None) -> None:
    """Print who catches what."""
    torch.set_num_threads(1)
    lengths, began = [int(text) for text in lengths_text.split(",")], time.monotonic()
    faulty, right = run(lengths, seeds)
    tables, console = tables_of(faulty, right, lengths), Console(width=180)
    for table in tables:
        console.print(table.on_screen())
    visible = [cell.caught[SHOWN] for cell in faulty if cell.expected > 1]
    summary = (f"{sum(visible)} of {len(visible)} faulty layers that are expected beyond a threshold are caught with "
               f"all stages shown; {len(faulty)} faulty and {len(right)} right layers in all.")
    console.print(f"{summary} {time.monotonic() - began:.0f} s")
    contradictions = wrong(faulty, right)
    for text in contradictions:
        console.print(f"CONTRADICTION {text}", markup=False)
    if write is not None:
        command = f"Printed by `python ci/power.py --lengths {lengths_text} --seeds {seeds}`:"
        write_between(write, "power", "\n".join([command, "", *(table.in_document() for table in tables), summary, ""]))
    raise SystemExit(1 if contradictions else 0)


if __name__ == "__main__":
    main()
