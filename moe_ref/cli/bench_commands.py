"""`bench`: how long layers and their kernels take, beside torch and peers in one run, and how near limits they come."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console

from moe_ref.bench.presets import PRESETS
from moe_ref.cli.collected import Collected
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Dtype
from moe_ref.records.bench import BenchRun, add_line, read_bench
from moe_ref.report.bench import (
    NO_EVIDENCE,
    bench_document,
    bench_words,
    kernel_tables,
    limit_table,
    part_tables,
    timing_tables,
)
from moe_ref.report.bench_plot import plot_bench

_LEAST_WIDTH = 170
_TELL_EVERY_SECONDS = 15.0


@click.command("bench")
@click.argument("subjects", metavar="[IMPL]...", nargs=-1)
@click.option("--preset", type=click.Choice(list(PRESETS)),
              help="Models, degrees, numbers of tokens and operations; options below replace parts of it. If none is "
                   "named: default on CUDA, cpu-quick on a CPU.")
@click.option("--model", "models", multiple=True, help="A registered model; mixtral.8x7b.E2 has two of its experts.")
@click.option("--tp", "degrees", help="Degrees of tensor parallelism, as 1,8: one rank's shapes, nothing sent.")
@click.option("--tokens", help="Numbers of tokens: 1:16384 doubles, 1,8,32 names them.")
@click.option("--operations", help="Of layer, experts (routing given), backward (of experts), with commas.")
@click.option("--against", default="torch:loop,torch:grouped", show_default=True,
              help="Whom to compare with; also vllm, triton_kernels, or peers, which is both. Empty: nobody.")
@click.option("--dtype", default="bf16", show_default=True, type=click.Choice([str(one) for one in Dtype]))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--seconds", default=0.3, show_default=True, type=click.FloatRange(0),
              help="Time for one subject on one shape, five repetitions at least; a CPU gets two.")
@click.option("--deadline", default=math.inf, help="Seconds after which no further shape is started.")
@click.option("--kernels/--no-kernels", default=True, show_default=True, help="Profile every kernel of a call too.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--record", type=click.Path(path_type=Path, file_okay=False), help="Folder for records.jsonl.")
@click.option("--read", "read_from", type=click.Path(path_type=Path), help="Show a record; runs nothing.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw times into a .svg or .png file.")
@click.option("--roofline", metavar="DEVICE", help="Predict times on a device, as H100, instead: nothing is run, and a "
                                                   "machine without a GPU will do. Default preset: mixtral-founding.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def bench_command(subjects: tuple[str, ...], preset: str | None, models: tuple[str, ...], degrees: str | None,
                  tokens: str | None, operations: str | None, against: str, dtype: str, seed: int, seconds: float,
                  deadline: float, kernels: bool, device: str, record: Path | None, read_from: Path | None,
                  plot: Path | None, roofline: str | None, as_json: bool) -> int:
    """Time each IMPL (a name, module or module:attr, as of `verify`) against torch and peers, on one device.

    Each is compared with the truth on the very shape first: what is wrong is not timed. Times of a CPU are no evidence.

    Exit codes: 0 all right; 1 somebody is wrong or crashed; 2 wrong use; 4 nothing could be timed.
    """
    if read_from:
        return _show(read_bench(read_from), plot, as_json)
    if not subjects:
        raise UsageValueError("no implementation; name some, as in `moe-ref bench moe_fast`")
    if roofline:
        return _predict(subjects, roofline, preset, models, degrees, tokens, dtype, kernels, as_json)
    # Imported here, so that a record can be shown without torch.
    from moe_ref.bench.peers import PEERS
    from moe_ref.bench.problem import Operation
    from moe_ref.bench.run import BenchPlan, run_bench
    from moe_ref.diverge.problem import ladder
    from moe_ref.verify.run.environment import default_device, environment

    device = default_device() if device == "auto" else device
    preset = preset or ("default" if device == "cuda" else "cpu-quick")
    chosen = PRESETS[preset]
    wanted = operations.split(",") if operations else chosen.operations
    if unknown := [one for one in wanted if one not in list(Operation)]:
        raise UsageValueError(f"--operations: {', '.join(unknown)}, but should be of {', '.join(Operation)}")
    others = [name for word in against.split(",") if word for name in (PEERS if word == "peers" else [word])]
    plan = BenchPlan(
        subjects=tuple(dict.fromkeys([*subjects, *others])), models=models or chosen.models,
        tp=_numbers("--tp", degrees) if degrees else chosen.tp, tokens=ladder(tokens) if tokens else chosen.tokens,
        operations=tuple(map(Operation, wanted)), dtype=Dtype(dtype), seed=seed, budget=seconds, deadline=deadline,
        kernels=kernels, device=device, preset=preset, labels=chosen.labels)
    if device == "cpu":
        click.echo(f"{NO_EVIDENCE}; kernels run in an interpreter, if at all", err=True)
    with Collected(record, BenchRun, add_line) as collected:
        run_bench(plan, environment(device), collected.keep, _teller(plan.num_shapes))
    return _show(collected.run, plot, as_json)


def _predict(subjects: tuple[str, ...], device: str, preset: str | None, models: tuple[str, ...],
             degrees: str | None, tokens: str | None, dtype: str, kernels: bool, as_json: bool) -> int:
    """--roofline: the shapes of a preset for one implementation."""
    from moe_ref.cli.roofline import show_roofline
    from moe_ref.diverge.problem import ladder

    if len(subjects) != 1:
        raise UsageValueError(f"--roofline with {len(subjects)} implementations, but should be with one")
    chosen = PRESETS[preset or "mixtral-founding"]
    return show_roofline(subjects[0], device, models or chosen.models,
                         _numbers("--tp", degrees) if degrees else chosen.tp,
                         ladder(tokens) if tokens else chosen.tokens, dtype, kernels, as_json)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(one) for one in text.split(","))
    except ValueError as error:
        raise UsageValueError(f"{option} {text!r}, but should be integers with commas, as 1,8") from error


def _teller(total: int) -> Callable[[str], None]:
    """A line every fifteen seconds at most."""
    told, done = time.monotonic(), -1

    def tell(doing: str) -> None:
        nonlocal told, done
        done += 1
        if time.monotonic() - told > _TELL_EVERY_SECONDS:
            told = time.monotonic()
            click.echo(f"[{done}/{total}] {doing}", err=True)
    return tell


def _show(run: BenchRun, plot: Path | None, as_json: bool) -> int:
    """Tables and words, or the document; the run's own exit code, or 4 where it was cut short."""
    if plot:
        plot_bench(run, plot)
        click.echo(f"wrote {plot}", err=True)
    if as_json:
        click.echo(json.dumps(bench_document(run), indent=1))
    else:
        console = Console(width=max(_LEAST_WIDTH, Console().width), emoji=False)
        for table in (limit_table(run), *timing_tables(run), *part_tables(run), *kernel_tables(run)):
            console.print(table.on_screen())
        for words in bench_words(run):
            console.print(words, highlight=False, markup=False)
    return run.end.exit_code if run.end else 4
