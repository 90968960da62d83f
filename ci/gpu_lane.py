"""The steps of the GPU lane with their shares of nine minutes; each leaves its output even when a later one is cut."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click

TOTAL_SECONDS = 530.0
NUMERICS_SECONDS, MATRIX_SECONDS, LAYERS_SECONDS, GRAPHS_SECONDS, BENCH_SECONDS = 50.0, 190.0, 100.0, 50.0, 80.0
SANITIZER_SECONDS = 40.0
"""What must be left at the end for it to start."""
GROWTH = ("moe_fast:ieee", "moe_fast:bf16", "moe_fast:fp16", "torch:loop:bf16", "model:sm90:bf16")
"""Measured curves of the kernels and of torch beside the one that was predicted before a device was seen."""
BENCH = ("-m", "moe_ref", "bench", "moe_fast", "--device", "cuda", "--tp", "8,1", "--tokens", "1,16,256,4096",
         "--operations", "experts")
LAYERS = ("mixtral.8x7b.T32", "mixtral.8x7b.T4096.E2", "qwen3.30b.a3b.T256", "deepseek.v3.T64.E16", "olmoe.1b.7b.T1")
"""Published widths: a whole Mixtral layer, a prefill, many experts, DeepSeek-V3's widths, a decode step."""


def step(title: str, arguments: list[str], seconds: float, under: Sequence[str] = (), **environment: str) -> int:
    """Run a python module or script, `under` a tool, killed at its limit; the exit code, or 124."""
    click.echo(f"== {title}, at most {seconds:.0f} s")
    started = time.monotonic()
    try:
        code = subprocess.run([*under, sys.executable, *arguments], timeout=max(1.0, seconds), check=False,
                              env=os.environ | environment).returncode
    except subprocess.TimeoutExpired:
        code = 124
    click.echo(f"== {title}: exit {code} after {time.monotonic() - started:.0f} s")
    return code


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def main(folder: Path) -> None:
    """Fill FOLDER with growth/, matrix/, layers/ and bench/ (records and pages); exits with the worst code."""
    import torch
    if not torch.cuda.is_available():
        raise click.ClickException("no CUDA device here; on a CPU run ci/verify")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    folder.mkdir(parents=True, exist_ok=True)
    started, lanes = time.monotonic(), str(min(8, os.cpu_count() or 1))
    verify = ["-m", "moe_ref", "verify", "moe_fast", "--device", "cuda", "--lanes", lanes]
    matrix, layers = folder / "matrix", folder / "layers"
    codes = [step("fingerprint", ["-m", "moe_ref", "fingerprint", "--device", "cuda"], NUMERICS_SECONDS),
             step("growth", ["-m", "moe_ref", "diverge", *GROWTH, "--device", "cuda", "--record",
                             str(folder / "growth"), "--plot", str(folder / "growth.svg")], NUMERICS_SECONDS),
             step("matrix", [*verify, "--tier", "quick", "--deadline", str(MATRIX_SECONDS - 30), "--record",
                             str(matrix)], MATRIX_SECONDS)]
    named = [option for name in LAYERS for option in ("--case", f"v1-{name}-bf16")]
    codes.append(step("model layers", [*verify, *named, "--tp", "1,8", "--deadline", str(LAYERS_SECONDS - 60),
                                       "--record", str(layers)], LAYERS_SECONDS))
    codes.append(step("graphs", ["ci/graphs.py", "--deadline", str(GRAPHS_SECONDS - 35)], GRAPHS_SECONDS))
    codes.append(step("benchmark", [*BENCH, "--deadline", str(BENCH_SECONDS - 30), "--record", str(folder / "bench")],
                      BENCH_SECONDS))
    left = TOTAL_SECONDS - (time.monotonic() - started)
    for run in (matrix, layers):
        codes.append(step(f"report of {run.name}", ["-m", "moe_ref", "report", str(run), "--out", str(run)], left / 2))
    codes.append(sanitizer(TOTAL_SECONDS - (time.monotonic() - started)))
    sys.exit(max(codes))


def sanitizer(left: float) -> int:
    """Every access of small layers, forward and backward, checked on the device; where tool and time are there."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or left < SANITIZER_SECONDS:
        click.echo("== sanitizer: NOT RUN, " + ("no compute-sanitizer here" if tool is None else f"{left:.0f} s left"))
        return 0
    # A tensor in an allocation of its own has borders that the tool knows.
    return step("sanitizer", ["ci/graphs.py", "--eager", "--deadline", str(left / 3)], left,
                under=(tool, "--tool", "memcheck", "--error-exitcode", "1", "--target-processes", "application-only"),
                PYTORCH_NO_CUDA_MEMORY_CACHING="1")


if __name__ == "__main__":
    main()
