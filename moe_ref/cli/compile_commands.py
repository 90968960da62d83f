"""`compile`: every kernel of an implementation compiled for GPUs that need not be there."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from moe_ref.cli.parts import part_of
from moe_ref.contract.case import Case
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.models.registry import models
from moe_ref.verify.run.subjects import load_subject

_MODEL_SIZES = ("T1-bf16", "T64-bf16", "T4096-bf16", "T64-fp16", "T64-fp32")
_TOLD_EVERY = 50


def _names(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(value.split(",")) if value else ()


@click.command("compile")
@click.argument("implementation", default="moe_fast")
@click.option("--arch", "architectures", callback=_names,
              help="Only these, as sm_80,sm_90,sm_100,gfx942; default: all of them.")
@click.option("--case", "case_ids", multiple=True, help="A case id; may be given several times; default: the gate's.")
@click.option("--models", "all_models", is_flag=True,
              help="Instead every named model that the implementation computes, on 8 ranks, in sizes and dtypes.")
@click.option("--tiles", "all_tiles", is_flag=True,
              help="Instead every tile of the tables: each width of the heuristic's, and every tuned one.")
@click.option("--baseline", type=click.Path(path_type=Path, dir_okay=False), default=None,
              help="Table to compare with; default: ci/baselines/compile-triton-<version>.json.")
@click.option("--accept", is_flag=True, help="Write the table of the gate's own cases on all architectures.")
@click.option("--lanes", type=click.IntRange(1), default=min(2, os.cpu_count() or 1), show_default=True,
              help="Compilers side by side.")
@click.option("--each", is_flag=True, help="One line per combination, not only per kernel.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def compile_command(implementation: str, architectures: tuple[str, ...], case_ids: tuple[str, ...], all_models: bool,
                    all_tiles: bool, baseline: Path | None, accept: bool, lanes: int, each: bool, as_json: bool) -> int:
    """Cross-compile every kernel that IMPLEMENTATION launches; nothing is run and no GPU is needed.

    Printed: registers, spilled bytes, shared memory, matrix instructions. Exit code 1: a kernel that does not compile,
    takes more shared memory than a block may have, spills in a product or makes none of its 16-bit products on matrix
    units; or one that is worse than the accepted table of this Triton version, or gone from it.
    """
    gate = part_of(implementation, "compile", "its kernels cannot be cross-compiled")
    if bool(case_ids) + all_models + all_tiles > 1:
        raise UsageValueError("--case, --models and --tiles exclude each other; give one")
    own = not case_ids and not all_models and not all_tiles
    if accept and (not own or architectures):
        raise UsageValueError("--accept with --case, --models, --tiles or --arch, but the table is of the gate's "
                              "own cases on all architectures")
    chosen = _known(architectures, tuple(gate.ARCHITECTURES))
    cases = _model_cases(implementation) if all_models else [parse_case(text) for text in case_ids or gate.CASES]
    combinations = gate.tile_combinations(chosen) if all_tiles else gate.combinations_of(cases, chosen)
    if own:
        combinations = list({one.key: one for one in combinations + gate.tuned_combinations(chosen)}.values())
    with _progress(len(combinations)) as observe:
        found = gate.compile_all(combinations, lanes, observe)
    path = baseline or gate.BASELINES / f"compile-triton-{gate.triton_series()}.json"
    report = _Report(gate, combinations, found, path, chosen if own else ())
    if accept:
        gate.write_table(report.path, {one.key: what for one, what in zip(combinations, found, strict=True)
                                       if not what.error})
        report = _Report(gate, combinations, found, report.path, chosen)
    click.echo(json.dumps(report.document, indent=1) if as_json else report.text(each))
    return 1 if report.failures else 0


def _known(architectures: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    if unknown := [name for name in architectures if name not in known]:
        raise UsageValueError(f"--arch {', '.join(unknown)}, but should be of {', '.join(known)}")
    return architectures or known


def _model_cases(implementation: str) -> list[Case]:
    """Of every named model whose mathematics the implementation declares."""
    capabilities = load_subject(implementation).CAPABILITIES
    return [parse_case(f"v1-{name}.{size}-tp8-bwd") for name, model in models().items()
            if not capabilities.refused_mathematics(model.spec) for size in _MODEL_SIZES]


class _Report:
    """What a run found: failures, a comparison with the accepted table, and both in words."""

    def __init__(self, gate: Any, combinations: list[Any], found: list[Any], path: Path,
                 whole: tuple[str, ...]) -> None:
        """whole: the architectures whose rows of the table should all be there."""
        self.gate, self.path = gate, path
        self.rows = list(zip(combinations, found, strict=True))
        self.faults = [f"{one.key}: {reason}" for one, what in self.rows for reason in gate.faults(one, what)]
        accepted = gate.read_table(path)
        self.comparison = None if accepted is None else gate.compare(
            accepted, {one.key: what for one, what in self.rows})
        self.missing = [key for key in self.comparison.missing if key.split()[0] in whole] if self.comparison else []

    @property
    def failures(self) -> list[str]:
        """A sentence each."""
        worse = self.comparison.worse if self.comparison else []
        return self.faults + worse + [f"{key}: accepted, but no longer launched" for key in self.missing]

    @property
    def document(self) -> dict[str, object]:
        return {"triton": self.gate.triton_series(), "failures": self.failures,
                "compared": self.comparison.num_compared if self.comparison else 0,
                "new": self.comparison.new if self.comparison else [],
                "combinations": [{"key": one.key, **asdict(what)} for one, what in self.rows]}

    def text(self, each: bool) -> str:
        """The table, failures, and what was compared with what."""
        written = StringIO()
        Console(width=300, file=written).print(self._each() if each else self._by_kernel())
        lines = [*(line.rstrip() for line in written.getvalue().splitlines()), *self.failures, self._compared()]
        seconds = sum(what.seconds for _, what in self.rows)
        return "\n".join([*lines, f"{'FAIL' if self.failures else 'PASS'}  {len(self.rows)} combinations, "
                                  f"{len(self.failures)} failures, {seconds:.0f} s of compiling"])

    def _compared(self) -> str:
        if self.comparison is None:
            return f"no accepted table for Triton {self.gate.triton_series()} ({self.path}): printed, not compared"
        return (f"compared with {self.path}: {self.comparison.num_compared} combinations, {len(self.comparison.new)} "
                "not in it" + " (--accept takes them in)" * bool(self.comparison.new))

    def _each(self) -> Table:
        table = Table("combination", "registers", "spilled", "shared", "matrix", box=None, pad_edge=False)
        for one, what in self.rows:
            table.add_row(one.key, str(what.registers), str(what.spill_bytes), str(what.shared_bytes),
                          ", ".join(what.matrix) or "-")
        return table

    def _by_kernel(self) -> Table:
        table = Table("architecture", "kernel", "combinations", "registers", "spilled", "shared KiB", "matrix",
                      box=None, pad_edge=False)
        groups: dict[tuple[str, str], list[Any]] = {}
        for one, what in self.rows:
            groups.setdefault((one.architecture, one.name), []).append(what)
        for (architecture, kernel), several in sorted(groups.items()):
            matrix = sorted({name for what in several for name in what.matrix})
            table.add_row(architecture, kernel, str(len(several)), str(max(what.registers for what in several)),
                          str(max(what.spill_bytes for what in several)),
                          f"{max(what.shared_bytes for what in several) / 1024:.1f}", ", ".join(matrix) or "-")
        return table


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Any, Any], None]]:
    """Called with each result: a bar on a terminal, a line for every fiftieth in a log."""
    console, count = Console(stderr=True), 0
    columns = (TextColumn("compile"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)

        def observe(combination: Any, resources: Any) -> None:
            nonlocal count
            count += 1
            progress.update(task, advance=1)
            if not console.is_terminal and (count % _TOLD_EVERY == 0 or count == total):
                click.echo(f"[{count}/{total}] {combination.architecture} {combination.name}", err=True)
        yield observe
