"""What judging a layer costs: truth, gauges, stage checks and statistics of the output, against the oracle's forward.

Both take the same weights from memory, one thread, processor time; ratios are within one run. The limit that is missed
makes the exit code 1. Run it on an idle machine.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace

import click
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import moe_ref
from moe_ref import MoEWeights
from moe_ref.contract.case import Case, Problem
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.vocabulary import Dtype, Stage
from moe_ref.contract.weights import parameter_shapes
from moe_ref.inputs.build import Inputs, build_inputs
from moe_ref.models.registry import find_model
from moe_ref.simulated.layer import SimulatedLayer, capabilities
from moe_ref.tolerances.contracts import contract
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.measure.placing import RankTensors
from moe_ref.verify.measure.stages import measure

MODEL, LIMIT, REPETITIONS = "mixtral.8x7b", 4.0, 2


def seconds(call: Callable[[], object]) -> float:
    """Processor seconds of the fastest of the repetitions."""
    taken = []
    for _ in range(REPETITIONS):
        began = time.process_time()
        call()
        taken.append(time.process_time() - began)
    return min(taken)


def held_inputs(case: Case) -> Inputs:
    """Drawn tokens; one expert's numbers behind all of them, larger than any cache, so that reading costs the same."""
    spec, generator = case.problem.spec, torch.Generator().manual_seed(0)
    shapes = parameter_shapes(spec)
    one = {name: torch.randn(shapes[name][1:], generator=generator).mul_(0.02).bfloat16()
           for name in ("w13_EGIH", "w2_EHI")}
    router = torch.randn(shapes["router_EH"], generator=generator).mul_(0.02).bfloat16()
    weights = MoEWeights(**{name: tensor.expand(spec.num_experts, *tensor.shape) for name, tensor in one.items()},
                         router_EH=router)
    return replace(build_inputs(case.problem), weights=weights)  # pyrefly: ignore


def subject(case: Case, inputs: Inputs) -> list[RankTensors]:
    """A right layer with fp32 sums, all stages shown but gate_up, which most kernels keep in registers."""
    layer = SimulatedLayer(contract("stored_rows", case.problem.dtype), lambda a, b: (a.float() @ b.float()).double())
    return [{stage: one for stage, one in tensors.items() if stage is not Stage.GATE_UP}
            for tensors in layer.run(case, inputs)]


def both_seconds(tokens: int, tp: int) -> tuple[float, float]:
    """Of the oracle's forward, and of everything that judging a right layer takes."""
    problem = Problem(spec=find_model(MODEL).spec, num_tokens=tokens, dtype=Dtype.BF16)
    case = Case(problem=problem, parallel=Parallel(tp=tp))
    inputs = held_inputs(case)
    ranks, numerics = subject(case, inputs), contract("stored_rows", Dtype.BF16)
    declared = replace(capabilities("checked", {Dtype.BF16: numerics}),
                       stages=tuple(stage for stage in ranks[0] if stage is not Stage.REDUCED))
    model = RoundingModel.of(load_tolerances(), "cpu", numerics, Dtype.BF16)
    return (seconds(lambda: moe_ref.moe(inputs.x_TH, inputs.weights, problem.spec)),
            seconds(lambda: measure(case, inputs, ranks, declared, model)))


@click.command()
@click.option("--tokens", default="32,256", help="Numbers of tokens, comma-separated.")
@click.option("--tp", default="1,4", help="Degrees of tensor parallelism, comma-separated.")
def main(tokens: str, tp: str) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    table = Table(title=f"{MODEL}, bf16, processor seconds per layer")
    for column in ("tokens", "tp", "oracle forward", "checks", "ratio", "limit"):
        table.add_column(column, justify="right")
    worst, plan = 0.0, [(int(count), int(degree)) for count in tokens.split(",") for degree in tp.split(",")]
    for count, degree in track(plan, console=Console(stderr=True)):
        oracle, checks = both_seconds(count, degree)
        worst = max(worst, checks / oracle)
        table.add_row(str(count), str(degree), f"{oracle:.1f}", f"{checks:.1f}", f"{checks / oracle:.2f}", f"{LIMIT:g}")
    Console().print(table)
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
