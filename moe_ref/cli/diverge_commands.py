"""`diverge`: how subjects drift from the truth as sums grow, and why two of them differ."""

import json
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

import click
import msgspec
from rich.console import Console

from moe_ref.cli.progress import steps
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Format
from moe_ref.records.growth import DivergeLine, GrowthRecordLine, GrowthRun, add_line, read_growth
from moe_ref.records.store import RecordWriter
from moe_ref.report.growth import growth_document, growth_lines, growth_tables

_DTYPES = ("auto", "fp32", "fp16", "bf16", "e4m3")
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
@click.option("--hardware", default="sm90", show_default=True, help="Class whose accumulators stand for a GPU's on a CPU.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--ask", type=click.Choice(["tf32", "low-precision", "bug"]),
              help="Answer one question on the first subject, in words, and nothing else.")
@click.option("--record", type=click.Path(path_type=Path, file_okay=False), help="Folder for records.jsonl.")
@click.option("--read", "read_from", type=click.Path(path_type=Path), help="Show a record; runs nothing.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw the curves into a .svg or .png file.")
@click.option("--baseline", type=click.Path(path_type=Path, dir_okay=False),
              help="Accepted curves; default: ci/baselines/growth.json where it exists.")
@click.option("--accept", is_flag=True, help="Make these curves the baseline; review the file's diff and commit it.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def diverge_command(subjects: tuple[str, ...], lengths: str, rows: int, columns: int, experts: int, skew: float, tp: int,
                    dtype: str, data: str, seed: int, seeds: int, hardware: str, device: str, ask: str | None,
                    record: Path | None, read_from: Path | None, plot: Path | None, baseline: Path | None, accept: bool,
                    as_json: bool) -> int:
    """Error against the truth of every SUBJECT as K grows; classes of growth; why two subjects differ.

    SUBJECT: moe_fast:{ieee,tf32,tf32x3,fp16,bf16,fp8}, torch:loop[:DTYPE], torch:grouped[:DTYPE], model:ACCUMULATOR:OPERANDS
    (as model:sm90:bf16 or model:pairwise-fp16:bf16), or module:attr, a callable (x_RK, w_ENK, ends_E) -> y_RN.

    Exit codes: 0 all within their bands; 1 a subject leaves its band or bound, drifts from the baseline or computes
    something else; 2 wrong use; 4 nothing could run.
    """
    if read_from:
        run = read_growth(read_from)
        return _show(run, plot, as_json)
    if not subjects:
        raise UsageValueError("no subject; name some, as in `moe-ref diverge moe_fast:tf32 torch:loop`")
    # Imported here, so that a record can be shown without torch.
    from moe_ref.diverge.bands import BASELINE, accepted_curve, curve_key, read_growth_baseline, write_growth_baseline
    from moe_ref.diverge.problem import GroupedProblem, ladder
    from moe_ref.diverge.study import GrowthPlan, run_growth
    from moe_ref.diverge.subjects import Place, check_hardware
    from moe_ref.diverge.words import Question, answer
    from moe_ref.verify.run.environment import default_device, environment

    device = default_device() if device == "auto" else device
    check_hardware(hardware)
    problem = GroupedProblem(terms=ladder(lengths)[0], rows=rows, columns=columns, experts=experts, skew=skew, tp=tp,
                             dtype=_dtype(dtype, subjects), seed=seed)
    path = baseline or BASELINE
    if baseline and not baseline.exists() and not accept:
        raise UsageValueError(f"--baseline {baseline}: no such file; --accept writes it")
    plan = GrowthPlan(subjects=tuple(dict.fromkeys(subjects)), lengths=ladder(lengths), problem=problem,
                      data=_data(data), seeds=seeds, place=Place(device, hardware),
                      accepted={} if accept else read_growth_baseline(path).curves)
    run, total = None, len(plan.subjects) * (len(plan.data) * len(plan.lengths) + 1)
    with ExitStack() as stack:
        writer = stack.enter_context(RecordWriter(record)) if record else None
        tell = stack.enter_context(steps("diverge", total))

        def keep(line: GrowthRecordLine) -> None:
            nonlocal run
            if writer:
                writer.append(line)
            if isinstance(line, DivergeLine):
                run = GrowthRun(line)
            else:
                assert run is not None
                add_line(run, line)
        curves = run_growth(plan, environment(device), keep, tell)
    assert run is not None
    first = curves[0]
    if ask:
        if first.finding is None or first.law is None:
            raise UsageValueError(f"--ask: {first.subject.name} {first.failed or 'needs unit data'}")
        click.echo(answer(Question(ask), first.subject.name, first.finding, first.law, plan.lengths[-1]))
        return 0
    if accept:
        changed = write_growth_baseline(path, {
            curve_key(curve.subject.name, problem.dtype, run.subjects[curve.subject.name].hardware):
            accepted_curve(curve.law, list(plan.lengths)) for curve in curves if curve.law})
        click.echo(f"{path}: {len(changed)} curves changed; review the diff and commit it", err=True)
    return _show(run, plot, as_json)
