"""Power: planted faults judged with all stages shown, by the output alone, on exact data, and by others' criteria."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from moe_ref.contract.case import Case
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.comm import grid_groups
from moe_ref.contract.local_comm import LocalComm, run_virtual_ranks
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import RED_VERDICTS, Data, Dtype, Stage
from moe_ref.contract.weights import MoEWeights
from moe_ref.inputs.build import Inputs
from moe_ref.inputs.shards import build_shards
from moe_ref.numerics.summation import Order, matmul
from moe_ref.simulated.fault import Fault
from moe_ref.simulated.faults import FAULTS
from moe_ref.simulated.layer import RIGHT, SimulatedLayer
from moe_ref.simulated.subjects import usual_numerics
from moe_ref.tolerances.load import load_tolerances
from moe_ref.tolerances.published import published
from moe_ref.verify.measure.placing import RankTensors
from moe_ref.verify.published import accepts
from moe_ref.verify.study.data import StudyData, study_inputs
from moe_ref.verify.study.expected import expected
from moe_ref.verify.study.judging import Judged, judged
from moe_ref.verify.study.variants import REDUCTIONS

SHOWN, OUTPUT_ALONE, EXACT = "all stages", "output alone", "exact data"
OWN_CHECKS = (SHOWN, OUTPUT_ALONE, EXACT)
RIGHT_ORDERS: tuple[Order, ...] = ("sequential", "pairwise", "split_k")


@dataclass(frozen=True)
class Cell:
    """One fault in one layer, or a right layer: which checks refuse it.

    expected: largest value over threshold with all stages shown, of a layer with exact sums and the expected fault.
    caught: by check or project; a project that publishes nothing for the dtype is missing. stage: the first one that
    fails, or the verdict.
    """

    fault: str
    dtype: Dtype
    terms: int
    tp: int
    data: StudyData
    seed: int
    expected: float
    caught: dict[str, bool]
    stage: str


@dataclass(frozen=True)
class Exact:
    """The same layer with exact data, whose routing is handed to every rank."""

    case: Case
    inputs: Inputs
    shards: list[MoEWeights]

    @classmethod
    def of(cls, case: Case) -> "Exact":
        """Exact data in place of a case's own."""
        problem = replace(case.problem, data=Data.EXACT)
        return cls(replace(case, problem=problem), study_inputs(problem, StudyData.UNIT),
                   build_shards(problem, case.parallel))

    def run(self, layer: SimulatedLayer) -> list[RankTensors]:
        """What every rank shows."""
        def rank(comm: LocalComm) -> RankTensors:
            trace, groups = Trace(), grid_groups(comm, self.case.parallel.tp, self.case.parallel.ep)
            layer.moe(self.inputs.x_TH, self.shards[groups.rank], self.case.problem.spec, self.case.parallel, groups,
                      routing=self.inputs.routing, trace=trace)
            return trace.tensors

        return run_virtual_ranks(self.case.parallel.tp, rank)


def case_of(dtype: Dtype, terms: int, tp: int, seed: int) -> Case:
    """8 tokens, 4 experts, two of them per token; gate and up are sums of `terms`, down of 64 over all ranks."""
    seeded = f"-s{seed}" * (seed > 0)
    return parse_case(f"v1-T8.H{terms}.I64.E4.K2-{dtype}-norm{seeded}" + f"-tp{tp}" * (tp > 1))


def power_cells(dtype: Dtype, terms: int, seed: int, data: StudyData = StudyData.UNIT,
                faults: tuple[Fault, ...] = FAULTS) -> Iterator[Cell]:
    """Every fault that acts in one layer on four ranks; the first of FAULTS is benign."""
    case, numerics = case_of(dtype, terms, 4, seed), usual_numerics(dtype)
    inputs = study_inputs(case.problem, data)
    exact = Exact.of(case)
    want_TH = None
    for fault in faults:
        if not fault.acts_on(case, numerics):
            continue
        layer = SimulatedLayer(numerics, partial(matmul, order="blocked"), fault=fault)
        ranks = layer.run(case, inputs)
        if want_TH is None:  # ids and weights are shown as they should be
            want_TH = torch_loop(inputs, ranks[0])
        shown = judged(case, inputs, ranks, numerics)
        caught = {SHOWN: accused(shown), OUTPUT_ALONE: accused(judged(case, inputs, ranks, numerics, shown=())),
                  EXACT: accused(judged(exact.case, exact.inputs, exact.run(layer), numerics)),
                  **refused(dtype, ranks[0][Stage.REDUCED], want_TH)}
        yield Cell(fault.name, dtype, terms, 4, data, seed, expected_share(case, inputs, fault), caught,
                   str(shown.judgement.first_stage or shown.judgement.verdict))


def right_cells(dtype: Dtype, terms: int, tp: int, seed: int, data: StudyData) -> Iterator[Cell]:
    """Right layers in three orders of summation."""
    case, numerics = case_of(dtype, terms, tp, seed), usual_numerics(dtype)
    inputs, want_TH = study_inputs(case.problem, data), None
    for place, order in enumerate(RIGHT_ORDERS):
        reduction = REDUCTIONS[(place + seed) % len(REDUCTIONS)]
        ranks = SimulatedLayer(numerics, partial(matmul, order=order, seed=seed), reduction).run(case, inputs)
        want_TH = torch_loop(inputs, ranks[0]) if want_TH is None else want_TH
        shown = judged(case, inputs, ranks, numerics)
        caught = {SHOWN: accused(shown), OUTPUT_ALONE: accused(judged(case, inputs, ranks, numerics, shown=())),
                  **refused(dtype, ranks[0][Stage.REDUCED], want_TH)}
        yield Cell(RIGHT.name, dtype, terms, tp, data, seed, max(shown.shares.values()), caught,
                   str(shown.judgement.first_stage or shown.judgement.verdict))


def accused(found: Judged) -> bool:
    """Whether the verdict is red."""
    return found.judgement.verdict in RED_VERDICTS


def expected_share(case: Case, inputs: Inputs, fault: Fault) -> float:
    """The largest value over its threshold of a layer with exact sums and the expected fault, all stages shown."""
    numerics = usual_numerics(case.problem.dtype)
    ranks = SimulatedLayer(numerics, torch.matmul, fault=expected(fault)).run(case, inputs)
    return max(judged(case, inputs, ranks, numerics).shares.values())


def refused(dtype: Dtype, got_TH: torch.Tensor, want_TH: torch.Tensor) -> dict[str, bool]:
    """By which projects a result would be refused, of those that publish a criterion for the dtype."""
    return {one.project: not accepts(one.criterion, got_TH, want_TH)
            for one in published(load_tolerances().file.published, dtype)}


def torch_loop(inputs: Inputs, routed: RankTensors) -> torch.Tensor:
    """The usual reference, (T, H): unsharded, expert by expert, every torch operation in the dtype of the inputs."""
    x_TH, spec = inputs.x_TH, inputs.problem.spec
    y_TH = torch.zeros_like(x_TH)
    for e in range(spec.num_experts):
        token_R, slot_R = (routed[Stage.IDS] == e).nonzero(as_tuple=True)
        expert = inputs.weights.expert(e)
        gate_RI, up_RI = (x_TH[token_R] @ w_IH.T for w_IH in expert.w13_GIH)
        row_RH = (torch.nn.functional.silu(gate_RI) * up_RI) @ expert.w2_HI.T
        weight_R1 = routed[Stage.WEIGHTS][token_R, slot_R, None].to(x_TH.dtype)
        y_TH.index_add_(0, token_R, row_RH * weight_R1)
    return y_TH
