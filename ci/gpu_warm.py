"""Kernels of later steps of the GPU lane compiled side by side, into Triton's cache: a step alone waits for each.

usage: python -m ci.gpu_warm [--processes N]
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence

import click
import torch

from ci.gpu_steps import BENCH_TOKENS, LAYERS
from ci.graphs import CASES
from ci.large_layers import SHAPES
from moe_fast.architecture import architecture
from moe_fast.compile.recorder import Launch, record
from moe_ref.bench.presets import PRESETS
from moe_ref.contract.case_id import parse_case


def case_ids() -> list[str]:
    """Layers of the benchmark, published ones, those of CUDA graphs, and large ones."""
    large = [shape.sizes(2**31, False) for shape in SHAPES.values()]
    timed = [f"{model}.T{tokens}" for model in PRESETS["default"].models for tokens in BENCH_TOKENS]
    published = [*timed, *LAYERS]
    found = [*(f"v1-{name}-bf16{tp}" for name in published for tp in ("", "-tp8")), *(f"{name}-bwd" for name in CASES),
             *(f"v1-T{one.tokens}.H{one.hidden}.I{one.intermediate}.E{one.experts}.K{one.top_k}-bf16-norm-relu-bwd"
               for one in large)]
    return list(dict.fromkeys(found))


def launches(names: Iterable[str], name: str) -> list[Launch]:
    """Those that the compiler tells apart, on that architecture, in an order that every process finds."""
    found: dict[tuple, Launch] = {}
    for case_id in names:
        for launch in record(parse_case(case_id), name):
            found.setdefault(_key(launch), launch)
    return list(found.values())


def _key(launch: Launch) -> tuple:
    constants = {one.name for one in launch.kernel.params if one.is_constexpr} | {"num_warps", "num_stages"}
    return launch.kernel.fn.__name__, *((name, _specialised(value, name in constants))
                                        for name, value in sorted(launch.arguments.items()))


def _specialised(value: object, is_constant: bool) -> object:
    """What Triton compiles for: of numbers whether they are 1 or multiples of 16, of tensors the dtype."""
    if is_constant:
        return repr(value)
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, int):
        return value == 1, value % 16 == 0, value >= 2**31
    return repr(getattr(value, "block_shape", value))


def compile_all(some: Sequence[Launch]) -> list[str]:
    """Compile each as its start would; why some were not, in words."""
    failed = []
    for launch in some:
        try:
            launch.kernel.warmup(grid=(1,), **launch.arguments)
        except Exception as error:
            failed.append(f"{launch.kernel.fn.__name__}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    return failed


@click.command()
@click.option("--processes", type=click.IntRange(1), default=max(1, (os.cpu_count() or 1) - 1), show_default=True)
@click.option("--part", type=click.IntRange(0), help="Of the processes this one alone; what they start.")
def main(processes: int, part: int | None) -> None:
    """Exit code 1 where a kernel does not compile."""
    if part is not None:
        mine = launches(case_ids(), architecture(torch.device("cuda", 0)))[part::processes]
        failed = compile_all(mine)
        click.echo("\n".join([*failed, f"{len(mine) - len(failed)} of {len(mine)} kernels compiled"]))
        sys.exit(1 if failed else 0)
    began = time.monotonic()
    command = [sys.executable, "-m", "ci.gpu_warm", "--processes", str(processes)]
    started = [subprocess.Popen([*command, "--part", str(number)]) for number in range(processes)]
    codes = [process.wait() for process in started]
    click.echo(f"{'FAIL' if any(codes) else 'PASS'}  {processes} processes in {time.monotonic() - began:.0f} s")
    sys.exit(max(codes, default=0) and 1)


if __name__ == "__main__":
    main()
