"""`tune`: the best tiles of an implementation's products on the GPU at hand, offline, into its tables."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moe_ref.cli.parts import part_of
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Dtype
from moe_ref.records.store import drop_torn_line

NO_EVIDENCE = "NO EVIDENCE: no GPU, so a few tiles of a tiny layer run in the interpreter; no table is written"
_DRY_TILES, _DRY_ARCHITECTURE = 3, "sm_90"
_TOLD_EVERY = 50


@click.command("tune")
@click.argument("implementation", default="moe_fast")
@click.option("--model", "names", multiple=True, default=("mixtral.8x7b",), show_default=True,
              help="A registered model; may be given several times.")
@click.option("--tp", "degrees", default="8", show_default=True, help="Degrees of tensor parallelism, as 4,8.")
@click.option("--tokens", default="1:4096", show_default=True, help="1:4096 doubles, 1,8,32 names them.")
@click.option("--dtype", default="bf16", show_default=True, type=click.Choice([str(one) for one in Dtype]))
@click.option("--record", type=click.Path(path_type=Path, dir_okay=False), default=Path("runs/tune.jsonl"),
              show_default=True, help="Every trial is appended at once; a run that is started again goes on from it.")
@click.option("--table", type=click.Path(path_type=Path, dir_okay=False), default=None,
              help="Table to write into; default: the implementation's own of this architecture.")
@click.option("--seconds", default=0.05, show_default=True, type=click.FloatRange(0), help="Of timing for one tile.")
@click.option("--lanes", type=click.IntRange(1), default=min(8, os.cpu_count() or 1), show_default=True,
              help="Compilers side by side.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
def tune_command(implementation: str, names: tuple[str, ...], degrees: str, tokens: str, dtype: str, record: Path,
                 table: Path | None, seconds: float, lanes: int, device: str) -> int:
    """Try tiles for the products of IMPLEMENTATION's layers and write the best into its table.

    Each tile is compiled first (no spills, shared memory within the limit), compared with torch on data whose sums are
    exact, then timed with a cold cache. On a CPU a tiny search shows that all is in place and writes no table.

    Exit codes: 0 all right; 1 a tile computed something else than torch, or crashed; 2 wrong use.
    """
    from moe_ref.verify.run.environment import default_device

    tune = part_of(implementation, "tune", "its tiles cannot be tuned")
    device = default_device() if device == "auto" else device
    if device == "cpu":
        click.echo(NO_EVIDENCE, err=True)
        shapes = [tune.Shape(hidden=64, intermediate=48, experts=3, top_k=2, tokens=8, dtype=dtype)]
    else:
        shapes = list(_shapes(tune, names, degrees, tokens, Dtype(dtype)))
    known = [one for one in tune.read_trials(record) if one.evidence == (device != "cpu")]
    with _clock(device, seconds) as clock, _Watch(record) as watch:
        if device == "cpu":
            how = tune.Search(_DRY_ARCHITECTURE, device, clock, lanes, most=_DRY_TILES)
        else:
            how = tune.Search(tune.gpu_architecture(), device, clock, lanes)
        trials = tune.search(shapes, how, known, watch)
    entries = tune.best_entries(shapes, trials)
    if entries:
        path = table or tune.table_path(how.architecture)
        tune.write_entries(path, entries)
        click.echo(f"wrote {len(entries)} entries into {path}")
    return _told(trials, device)


def _shapes(tune: Any, names: tuple[str, ...], degrees: str, tokens: str, dtype: Dtype) -> Iterator[Any]:
    """The routed experts of every model, degree and number of tokens."""
    from moe_ref.bench.problem import rank_layer
    from moe_ref.diverge.problem import ladder

    for name in names:
        for tp in degrees.split(","):
            if not tp.isdecimal():
                raise UsageValueError(f"--tp {degrees!r}, but should be integers with commas, as 1,8")
            spec = rank_layer(name, int(tp), dtype).spec
            for count in ladder(tokens):
                yield tune.Shape(hidden=spec.hidden_size, intermediate=spec.intermediate_size,
                                 experts=spec.num_experts, top_k=spec.top_k, tokens=count,
                                 parts=spec.experts.num_projections, dtype=str(dtype))


@contextmanager
def _clock(device: str, seconds: float) -> Iterator[Callable[[Mapping[Any, Callable[[], object]]], dict[Any, float]]]:
    """Median microseconds by the clocks of `moe-ref bench`: graphs between events, an emptied cache, calls in turns."""
    from moe_ref.bench.timing import clock_of, interleaved

    clock = clock_of(device)

    def medians(calls: Mapping[Any, Callable[[], object]]) -> dict[Any, float]:
        named = {str(place): clock.prepare(call).call for place, call in enumerate(calls.values())}
        spreads = interleaved(named, clock, seconds * len(calls))
        return {tile: 1e6 * spreads[str(place)].median for place, tile in enumerate(calls)}
    with clock.running():
        yield medians


class _Watch:
    """A bar on a terminal, lines in a log; trials go into the record at once."""

    def __init__(self, record: Path) -> None:
        self._console, self._path, self._count = Console(stderr=True), record, 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("tune")

    def __enter__(self) -> "_Watch":
        drop_torn_line(self._path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a")
        self._bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__(None, None, None)
        self._file.close()

    def doing(self, words: str, total: int) -> None:
        """A product begins."""
        self._bar.reset(self._task, total=total, description=words)
        if not self._console.is_terminal:
            click.echo(f"{words}: {total} tiles", err=True)

    def done(self, trial: Any) -> None:
        """Keep a trial."""
        self._file.write(trial.line + "\n")
        self._file.flush()
        self._count += 1
        self._bar.advance(self._task)
        if not self._console.is_terminal and self._count % _TOLD_EVERY == 0:
            click.echo(f"[{self._count}] {trial.status} {trial.tile}", err=True)


def _told(trials: list[Any], device: str) -> int:
    """The best of each product, and what went wrong."""
    wrong = [one for one in trials if one.status in ("WRONG", "CRASHED")]
    for one in wrong:
        click.echo(f"{one.status} {one.product} at {one.rows} rows, {one.tile}: {one.reason}")
    finals = [one for one in trials if one.status == "BEST"]
    for key in dict.fromkeys((one.product, one.rows) for one in finals):
        best = min((one for one in finals if (one.product, one.rows) == key), key=lambda one: one.microseconds)
        own = next((f", the heuristic's {one.microseconds:.1f}" for one in finals
                    if (one.product, one.rows) == key and one.heuristic), "")
        click.echo(f"{best.product.kernel} {best.product.out_features} x {best.product.in_features}, {best.rows} rows: "
                   f"{best.microseconds:.1f} us{own}: {best.tile}")
    counts = Counter(one.status for one in trials)
    click.echo(", ".join(f"{count} {status}" for status, count in counts.items()) + f" on {device}"
               + f"; {NO_EVIDENCE}" * (device == "cpu"))
    return 1 if wrong else 0
