"""What a launch and a program cost in the interpreter: this package's, and with --upstream Triton's own.

Median CPU milliseconds of an empty launch and of one fp32 program with a 16 x 64 tile and two products of
K = 64. Triton decides at import whether it interprets, so each run of the script measures one of the two.
"""

import os
import statistics
import time
from collections.abc import Callable

import click

LAUNCHES, PROGRAMS = 30, 16


def milliseconds(call: Callable[[], object]) -> float:
    """Median CPU time of one call, after a first one that compiles nothing but fills caches."""
    call()
    times = []
    for _ in range(LAUNCHES):
        started = time.process_time()
        call()
        times.append(1000 * (time.process_time() - started))
    return statistics.median(times)


@click.command()
@click.option("--upstream", is_flag=True, help="Measure Triton's own interpreter.")
def main(upstream: bool) -> None:
    """Print both figures."""
    if upstream:
        os.environ["TRITON_INTERPRET"] = "1"
    import ci_kernels
    import torch
    import triton

    from moe_fast.interpreter import interpret

    torch.set_num_threads(1)
    x, w, y = torch.randn(16 * PROGRAMS, 128), torch.randn(128, 64), torch.zeros(16 * PROGRAMS, 64)
    tensors = {"x": x, "w": w, "y": y}

    def run(kernel: object, grid: tuple[int, ...]) -> None:
        if upstream:
            kernel[grid](**tensors)  # type: ignore[index]
        else:
            interpret(kernel, grid, tensors)  # type: ignore[arg-type]

    empty = milliseconds(lambda: run(ci_kernels.empty_kernel, (1,)))
    full = milliseconds(lambda: run(ci_kernels.tile_kernel, (PROGRAMS,)))
    name = f"Triton {triton.__version__}" if upstream else "moe_fast.interpreter"
    click.echo(f"{name}: empty launch {empty:.3f} ms, one program {(full - empty) / PROGRAMS:.2f} ms")


if __name__ == "__main__":
    main()
