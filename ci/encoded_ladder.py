"""The ladder of encoded experts: does their error stay what codes and rounding predict as ranks are added?

    python ci/encoded_ladder.py [--scheme fp8block] [--tp 1,2,4] [--sizes T48.H512.I1024.E8.K2]

moe_fast runs every scheme at every degree on virtual ranks; its output is compared with the unsharded fp64 oracle of
the decoded weights, which rounds nothing. A cell has the measured error, a root mean square relative to the output, and
in brackets that over the predicted one: codes of the activation, whose effect is computed, and predicted variances of
borders, stores, sums and additions between ranks (moe_ref/verify/budget.py; `moe-ref show CASE` prints the parts). What
two right layers may differ by at borders is part of the prediction, so a little less than 1 is usual.
"""

import click
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import moe_fast
import moe_ref
from moe_ref.contract.case import Case
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.comm import grid_groups
from moe_ref.contract.local_comm import LocalComm, run_virtual_ranks
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.routing import Routing
from moe_ref.contract.vocabulary import Scheme
from moe_ref.inputs.build import build_inputs
from moe_ref.inputs.shards import build_encoded_shards
from moe_ref.oracle.router import route
from moe_ref.verify.budget import error_budget

SIZES = "T48.H512.I1024.E8.K2"
DEGREES = "1,2,3,4,8"


def measured(case: Case) -> float:
    """Root mean square of the output's error over that of the output."""
    problem, inputs = case.problem, build_inputs(case.problem)
    whole, = build_encoded_shards(problem, Parallel())
    chosen = route(inputs.x_TH, whole, problem.spec, logits_TE=inputs.logits_TE)
    routing = Routing(chosen.ids_TK.int(), chosen.weights_TK.float())
    truth_TH = moe_ref.moe(inputs.x_TH, whole, problem.spec, routing=routing)
    shards = build_encoded_shards(problem, case.parallel)

    def one(comm: LocalComm) -> torch.Tensor:
        return moe_fast.moe(inputs.x_TH, shards[comm.rank], problem.spec, case.parallel,
                            grid_groups(comm, tp=case.parallel.tp, ep=1), routing=routing)

    output_TH = run_virtual_ranks(case.parallel.size, one)[0].double()
    return float((output_TH - truth_TH).square().mean().sqrt() / truth_TH.square().mean().sqrt())


@click.command()
@click.option("--scheme", "schemes", multiple=True, help="Of these alone.",
              type=click.Choice([one.value for one in moe_fast.CAPABILITIES.schemes]))
@click.option("--tp", "degrees", default=DEGREES, show_default=True, help="Tensor-parallel degrees, comma-separated.")
@click.option("--sizes", default=SIZES, show_default=True, help="Sizes, as a case id has them.")
@click.option("--dtype", default="bf16", show_default=True, help="Of tokens and rows.")
def main(schemes: tuple[str, ...], degrees: str, sizes: str, dtype: str) -> None:
    """Measured and predicted errors of encoded experts by scheme and degree."""
    wanted = [Scheme(name) for name in schemes] or list(moe_fast.CAPABILITIES.schemes)
    ranks = [int(degree) for degree in degrees.split(",")]
    table = Table(title=f"moe_fast, {sizes}, {dtype}: error relative to the output (over the predicted one)")
    for heading in ("scheme", *(f"tp {degree}" for degree in ranks)):
        table.add_column(heading)
    console = Console()
    for scheme in track(wanted, "schemes", console=Console(stderr=True)):
        cells = []
        for degree in ranks:
            case = parse_case(f"v1-{sizes}-{dtype}-{scheme}-norm" + f"-tp{degree}" * (degree > 1))
            budget = error_budget(case, moe_fast.CAPABILITIES.contract(case.problem))
            found = measured(case)
            cells.append(f"{found:.2e} ({found / budget.total:.2f})")
        table.add_row(scheme, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
