"""`compile`: every kernel of an implementation compiled for GPUs that need not be there."""

import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moe_ref.cli.collected import Collected
from moe_ref.cli.parts import part_of
from moe_ref.contract.case import Case
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.models.registry import models
from moe_ref.records.compiled import CombinationLine, CompiledRun, CompileLine, add_line
from moe_ref.records.schema import EndLine
from moe_ref.report.compiled import (
    combination_table,
    compile_document,
    compile_failures,
    compile_words,
    kernel_table,
)
from moe_ref.verify.run.environment import environment
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
@click.option("--record", type=click.Path(path_type=Path, file_okay=False), help="Folder for records.jsonl.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def compile_command(implementation: str, architectures: tuple[str, ...], case_ids: tuple[str, ...], all_models: bool,
                    all_tiles: bool, baseline: Path | None, accept: bool, lanes: int, each: bool, record: Path | None,
                    as_json: bool) -> int:
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
    if own:
        combinations = gate.own_combinations(chosen)
    elif all_tiles:
        combinations = gate.tile_combinations(chosen)
    else:
        cases = _model_cases(implementation) if all_models else [parse_case(text) for text in case_ids]
        combinations = gate.combinations_of(cases, chosen)
    path = baseline or gate.BASELINES / f"compile-triton-{gate.triton_series()}.json"
    accepted = None if accept else gate.read_table(path)
    keys = {one.key for one in combinations}
    header = CompileLine(
        run=uuid.uuid4().hex[:12], started=_now(), implementation=implementation, architectures=list(chosen),
        scope="models" if all_models else "tiles" if all_tiles else "cases" if case_ids else "gate",
        cases=list(case_ids), num_combinations=len(combinations), triton=gate.triton_series(),
        table="" if accepted is None else str(path), environment=environment("cpu") | {"kernels": "compiled, not run"},
        missing=[key for key in sorted((accepted or {}).keys() - keys) if own and key.split()[0] in chosen])
    with Collected(record, CompiledRun, add_line) as collected, _progress(len(combinations)) as tell:
        collected.keep(header)
        began = time.monotonic()

        def observe(combination: Any, resources: Any) -> None:
            collected.keep(_line(gate, header.run, combination, resources, accepted or {}))
            tell(combination)

        found = gate.compile_all(combinations, lanes, observe)
        run, failures = collected.run, compile_failures(collected.run)
        outcomes = Counter("failed" if line.error else "compiled" for line in run.combinations.values())
        collected.keep(EndLine(run=header.run, finished=_now(), seconds=round(time.monotonic() - began, 3),
                               verdicts=dict(outcomes), executed=outcomes["compiled"], exit_code=int(bool(failures))))
    if accept:
        gate.write_table(path, {one.key: what for one, what in zip(combinations, found, strict=True) if not what.error})
        click.echo(f"{path}: written; review the diff and commit it", err=True)
    click.echo(json.dumps(compile_document(run), indent=1) if as_json else _text(run, each))
    return int(bool(failures))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _line(gate: Any, run: str, combination: Any, resources: Any, accepted: dict[str, Any]) -> CombinationLine:
    """What was found of a combination, held against its own row of the accepted table."""
    key = combination.key
    rows = {key: accepted[key]} if key in accepted else {}
    worse = [words.removeprefix(f"{key}: ") for words in gate.compare(rows, {key: resources}).worse]
    return CombinationLine(run=run, key=key, architecture=combination.architecture, kernel=combination.name,
                           faults=gate.faults(combination, resources), worse=worse, is_accepted=bool(rows),
                           **asdict(resources))


def _text(run: CompiledRun, each: bool) -> str:
    """The table, failures, and what was compared with what."""
    table, written = combination_table(run) if each else kernel_table(run), StringIO()
    plain = table.on_screen()
    plain.box, plain.title, plain.pad_edge = None, None, False
    Console(width=300, file=written).print(plain)
    return "\n".join([*(line.rstrip() for line in written.getvalue().splitlines()), *compile_failures(run),
                      *compile_words(run)])


def _known(architectures: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    if unknown := [name for name in architectures if name not in known]:
        raise UsageValueError(f"--arch {', '.join(unknown)}, but should be of {', '.join(known)}")
    return architectures or known


def _model_cases(implementation: str) -> list[Case]:
    """Of every named model whose mathematics the implementation declares."""
    capabilities = load_subject(implementation).CAPABILITIES
    return [parse_case(f"v1-{name}.{size}-tp8-bwd") for name, model in models().items()
            if not capabilities.refused_mathematics(model.spec) for size in _MODEL_SIZES]


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Any], None]]:
    """Called with each combination: a bar on a terminal, a line for every fiftieth in a log."""
    console, count = Console(stderr=True), 0
    columns = (TextColumn("compile"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)

        def tell(combination: Any) -> None:
            nonlocal count
            count += 1
            progress.update(task, advance=1)
            if not console.is_terminal and (count % _TOLD_EVERY == 0 or count == total):
                click.echo(f"[{count}/{total}] {combination.architecture} {combination.name}", err=True)
        yield tell
