"""The TP ladder: does the error of a tensor-parallel layer stay what rounding predicts as ranks are added?

    python ci/ladder.py [--case ID] [--tp 1,2,4]

For every schedule and degree the layer runs on virtual ranks, and its output is compared with the unsharded fp64
oracle. Prediction: each store of a value v to a format with unit in the last place ulp(v) adds an independent error of
variance ulp(v)^2 / 12 (uniform within half an ulp); stores are those that the implementation declares: activation,
down rows and partial sums of every rank, and every addition between ranks, in rank order. The table has the
measured root mean square over the predicted one, the worst error in predicted sigmas of its element, and in bounds.
"""

from dataclasses import dataclass, replace

import click
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import moe_fast
import moe_ref
from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.case import Case
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.comm import grid_groups
from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.local_comm import LocalComm, run_virtual_ranks
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.shares import rank_shares
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Format, Schedule, Stage
from moe_ref.inputs.build import Inputs, build_inputs, cut_tokens
from moe_ref.inputs.shards import build_shards
from moe_ref.oracle import expert as formula
from moe_ref.oracle.router import route
from moe_ref.records.schema import from_number
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.measure.stages import measure

CASE = "v1-T48.H256.I2048.E8.K2-bf16-norm"
DEGREES = "1,2,3,4,8,16,32,64"


@dataclass(frozen=True)
class Rung:
    """One degree under one schedule: rms error over prediction, worst error in sigmas and in bounds."""

    rms: float
    sigmas: float
    bounds: float


def ulp(value: torch.Tensor, stored: Format | None) -> torch.Tensor:
    """Unit in the last place of a stored value; zero where nothing is rounded."""
    if stored in (None, Format.FP64):
        return torch.zeros_like(value)
    info = torch.finfo(TORCH_DTYPES[stored])
    return torch.exp2(torch.floor(torch.log2(value.abs().clamp(min=info.tiny)))) * info.eps


def variance(value: torch.Tensor, stored: Format | None) -> torch.Tensor:
    """Of the rounding of one store."""
    return ulp(value, stored)**2 / 12


class Prediction:
    """Exact rows of every rank, and the variance that their stores give to the output."""

    def __init__(self, inputs: Inputs, capabilities: Capabilities) -> None:
        self.inputs, self.numerics = inputs, capabilities.numerics[inputs.problem.dtype]
        self.routing = route(inputs.x_TH, inputs.weights, inputs.problem.spec, logits_TE=inputs.logits_TE)
        self.stored = self.numerics.storage.get

    def of(self, case: Case) -> torch.Tensor:
        """(T, H)."""
        spec, parallel = case.problem.spec, case.parallel
        shape = (parallel.tp, case.problem.num_tokens, spec.top_k, spec.hidden_size)
        rows, total = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[1], shape[3], dtype=torch.float64)
        x_TH, weights_TK = self.inputs.x_TH.double(), self.routing.weights_TK
        for e in range(spec.num_experts):
            token_R, slot_R = (self.routing.ids_TK == e).nonzero(as_tuple=True)
            expert, w_R1 = self.inputs.weights.expert(e), weights_TK[token_R, slot_R, None]
            act_RI = formula.activate(formula.gate_up(x_TH[token_R], expert.w13_GIH), spec.experts)
            w2_HI = expert.w2_HI.double()
            total.index_add_(0, token_R, w_R1**2 * (variance(act_RI, self.stored(Stage.ACT)) @ (w2_HI**2).T))
            for share in rank_shares(case):
                by_output, outputs = parallel.schedule is Schedule.GATHER, slice(*share.outputs)
                inner = slice(0, spec.intermediate_size) if by_output else slice(*share.columns)
                rows[share.rank, token_R, slot_R, outputs] = w_R1 * (act_RI[:, inner] @ w2_HI[outputs, inner].T)
        return total + self._stores(rows, parallel.schedule)

    def _stores(self, rows: torch.Tensor, schedule: Schedule) -> torch.Tensor:
        """Of down rows, partial sums and additions between ranks, given the rows (ranks, T, K, H)."""
        found = variance(rows, self.stored(Stage.DOWN)).sum((0, 2))
        if schedule is Schedule.ALL_REDUCE_ROWS:
            return found + self._additions(rows).sum(1) + variance(rows.sum((0, 2)), self.stored(Stage.MERGED))
        merged = rows.sum(2)
        found += variance(merged, self.stored(Stage.MERGED)).sum(0)
        return found if schedule is Schedule.GATHER else found + self._additions(merged)

    def _additions(self, parts: torch.Tensor) -> torch.Tensor:
        """Running sums over ranks, each rounded."""
        return variance(parts.cumsum(0)[1:], self.numerics.reduce).sum(0)


def climb(case: Case, inputs: Inputs, truth_TH: torch.Tensor, predicted: Prediction) -> Rung:
    """Run one rung and compare."""
    shards, shares, parallel = build_shards(case.problem, case.parallel), rank_shares(case), case.parallel

    def body(world: LocalComm) -> dict[Stage, torch.Tensor]:
        groups, trace = grid_groups(world, parallel.tp, parallel.ep), Trace()
        handed = cut_tokens(inputs, shares[groups.rank].tokens)
        output = moe_fast.moe(handed.pop("x_TH"), shards[groups.rank], case.problem.spec, parallel, groups, trace=trace,
                              **handed)  # pyrefly: ignore
        return {**trace.tensors, Stage.REDUCED: output}

    with torch.no_grad():
        ranks = run_virtual_ranks(parallel.size, body)
    capabilities = moe_fast.CAPABILITIES
    model = RoundingModel(load_tolerances(), "cpu", capabilities.contract(case.problem).accumulate)
    stages = {stage.stage: stage for stage in measure(case, inputs, ranks, capabilities, model).stages}
    error, sigma = ranks[0][Stage.REDUCED].double() - truth_TH, predicted.of(case).sqrt()
    return Rung(float(error.square().mean().sqrt() / sigma.square().mean().sqrt()), float((error.abs() / sigma).max()),
                from_number(stages[Stage.OUTPUT].ratio))


@click.command()
@click.option("--case", "case_id", default=CASE, show_default=True, help="The problem; its degrees are replaced.")
@click.option("--tp", "degrees", default=DEGREES, show_default=True)
def main(case_id: str, degrees: str) -> None:
    """Print the ladder of every schedule."""
    torch.set_num_threads(1)
    case, sizes = parse_case(case_id), [int(text) for text in degrees.split(",")]
    spec = case.problem.spec
    if spec.shared or case.problem.residual or spec.num_choices != spec.num_experts:
        raise UsageValueError(f"{case_id}: the prediction is for routed experts alone")
    inputs = build_inputs(case.problem)
    predicted = Prediction(inputs, moe_fast.CAPABILITIES)
    truth_TH = moe_ref.moe(inputs.x_TH, inputs.weights, case.problem.spec, logits_TE=inputs.logits_TE)
    console, table = Console(width=160), Table("schedule", "measure", *(f"tp {tp}" for tp in sizes))
    for schedule in Schedule:
        rungs = [climb(replace(case, parallel=Parallel(tp=tp, schedule=schedule)), inputs, truth_TH, predicted)
                 for tp in track(sizes, schedule.value, console=Console(stderr=True), transient=True)]
        for words, values in (("rms / predicted", [rung.rms for rung in rungs]),
                              ("worst in sigmas", [rung.sigmas for rung in rungs]),
                              ("worst in bounds", [rung.bounds for rung in rungs])):
            table.add_row(schedule.value, words, *(f"{value:.3f}" for value in values))
        table.add_section()
    console.print(table)


if __name__ == "__main__":
    main()
