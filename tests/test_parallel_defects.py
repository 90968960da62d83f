"""Mistakes in how a layer is spread must be caught where they are, on the smallest grid on which they exist.

Each entry says which case shows a mistake, the first failing stage with the experts and ranks at fault, and words that
the message must hold, or would if the case were too large for a diagnosis (test_diagnosis.py has those). Numbers that
the contract leaves alone are right in every one of them.
"""

from dataclasses import dataclass
from functools import cache

import pytest
import torch

from moe_ref.contract.case_id import parse_case
from moe_ref.contract.comm import grid_groups
from moe_ref.contract.local_comm import LocalComm, run_virtual_ranks
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.vocabulary import Stage, Verdict
from moe_ref.inputs.build import build_inputs
from moe_ref.inputs.shards import build_shards
from moe_ref.records.schema import CaseLine
from moe_ref.verify.likely import likely
from tests.in_process import judged
from tests.subjects.mistaken_parallel import WRONG, naively_cut
from tests.subjects.parallel import ParallelMoE

PLAIN = "v1-T33.H32.I24.E8.K2-bf16-norm"
EVEN = "v1-T32.H32.I24.E8.K2-bf16-norm"
ALL = tuple(range(8))


@dataclass(frozen=True)
class Caught:
    """How a mistake must be reported; experts and ranks as the first failing stage lists them."""

    name: str
    case: str
    stage: Stage | None
    words: str
    experts: tuple[int, ...] = ()
    ranks: tuple[int, ...] = (0, 1)
    verdict: Verdict = Verdict.MISMATCH


DEFECTS = (
    # Weights of the wrong part, and what counts once.
    Caught("GateOfOneRankUpOfAnother", PLAIN + "-tp2", Stage.ACT, "gate and up rows that do not belong together", ALL),
    Caught("MergedAxisCutNaively", PLAIN + "-tp2", Stage.ACT, "gate and up rows that do not belong together", ALL),
    Caught("EvenSplitAssumed", PLAIN + "-tp2-split60.40", Stage.DOWN, "12 columns assumed on every rank", ALL, (0,)),
    Caught("BiasOnEveryRank", PLAIN + "-mlpbias-tp2", Stage.DOWN, "bias of w2", ALL, (1,)),
    Caught("ResidualPerRank", PLAIN + "-res-tp2", Stage.REDUCED, "a residual that more than one rank adds"),
    Caught("SharedReducedTwice", PLAIN + "-sh20-tp2", Stage.MERGED,
           "beside 1 as they should be, tp.all_reduce of 1056 elements too many"),
    Caught("WholeSharedInEverySum", PLAIN + "-sh20-tp2-wholeshared", Stage.MERGED, "33 of 33 tokens"),
    # Reductions.
    Caught("NoReduction", PLAIN + "-tp2", Stage.REDUCED, "tp.all_reduce of 1056 elements missing"),
    Caught("PartialSumReturned", PLAIN + "-tp2", Stage.REDUCED, "1/2 of the sum: not reduced, or a mean"),
    Caught("MeanForSum", PLAIN + "-tp2", Stage.REDUCED, "1/2 of the sum: not reduced, or a mean"),
    Caught("ReducedTwice", PLAIN + "-tp2", Stage.REDUCED, "2 times the sum: reduced twice"),
    Caught("ReducedTwice", PLAIN + "-tp2-ep2", Stage.REDUCED, "4 times the sum: reduced twice", ranks=(0, 1, 2, 3)),
    Caught("OverTheOtherGroup", EVEN + "-tp2-ep2-tokensep", Stage.REDUCED,
           "ep.all_reduce of 512 elements, but should be tp.all_reduce", ranks=(0, 1, 2, 3)),
    Caught("OverTheWorld", EVEN + "-tp2-ep2-tokensep", Stage.REDUCED,
           "ep.all_reduce of 512 elements too many", ranks=(0, 1, 2, 3)),
    Caught("BF16Between", "v1-T33.H32.I24.E8.K2-fp32-norm-tp2", Stage.REDUCED, "best-fit scale 0.9999"),
    Caught("RowsMergedFirst", "v1-T33.H32.I24.E8.K2-fp32-norm-tp2-allreducerows", Stage.REDUCED,
           "tp.all_reduce of 1056 elements, but should be tp.all_reduce of 2112", ranks=(), verdict=Verdict.STRUCT),
    Caught("Barrier", PLAIN + "-tp2", Stage.REDUCED, "tp.all_reduce of 1 elements too many", ranks=(),
           verdict=Verdict.STRUCT),
    Caught("NeighboursSlice", EVEN + "-tp2-reducescatter-tokenstp", Stage.REDUCED, "parts of the ranks in another"),
    Caught("GatheredInReverse", EVEN + "-tp2-reducescatter", Stage.REDUCED, "parts of the ranks in another"),
    Caught("GatheredInReverse", PLAIN + "-tp2-gather", Stage.REDUCED, "parts of the ranks in another"),
    Caught("OwnTokensUnderGather", PLAIN + "-tp2-gather", Stage.LOGITS, "ranks 1 of 2", ranks=(1,)),
    Caught("ColumnsInterleaved", PLAIN + "-tp2-gather", Stage.DOWN, "columns of the gathered activation", ALL),
    # Tokens and rows on their way. 33 tokens in shares of 3, 0 and 1 are 25, none and 8.
    Caught("EmptyRankPadded", PLAIN + "-tp3-reducescatter-tokenstp-share3.0.1", Stage.ACT,
           "the tokens of rank 2 alone, which follow those of rank 1, who has none", ALL, (0, 1, 2)),
    Caught("WeightsInReverse", EVEN + "-tp2-reducescatter-tokenstp", Stage.DOWN, "32 of 32 tokens", ALL),
    Caught("RowsBackReversed", PLAIN + "-ep2-tokensep", Stage.MERGED, "rows that came back in another order"),
    Caught("WeightTwice", PLAIN + "-ep2-tokensep", Stage.MERGED, "33 of 33 tokens"),
    Caught("RoundRobinReadAsContiguous", PLAIN + "-ep2-roundrobin", None, "hosting read as contiguous",
           verdict=Verdict.STRUCT),
    # Every token takes every expert: the number of rows is right.
    Caught("RoundRobinReadAsContiguous", "v1-T33.H32.I24.E4.K4-bf16-norm-ep2-roundrobin", Stage.ACT, "ranks 0, 1 of 2",
           ALL[:4]),
    Caught("EveryCopyServes", PLAIN + "-ep2-copy0", None, "every copy of a redundant expert", verdict=Verdict.STRUCT),
    Caught("HiddenEveryCopyServes", PLAIN + "-ep2-copy0", Stage.REDUCED, "9 of 33 tokens"),
    Caught("NoCopyServes", PLAIN + "-ep2-copy0", None, "no copy of a redundant expert", verdict=Verdict.STRUCT),
    Caught("DroppedBeyondTheMean", PLAIN + "-zipf-ep2-tokensep", None, "rows beyond 33 on a rank dropped",
           verdict=Verdict.STRUCT),
    Caught("HiddenDroppedBeyondTheMean", PLAIN + "-zipf-ep2-tokensep", Stage.REDUCED, "16 of 33 tokens"),
)


@cache
def line_of(caught: Caught) -> CaseLine:
    return judged(WRONG[caught.name](), caught.case)


def _name(caught: Caught) -> str:
    return f"{caught.name}-{caught.case}"


@pytest.mark.parametrize("caught", DEFECTS, ids=_name)
def test_a_mistake_is_caught_where_it_is(caught: Caught) -> None:
    line = line_of(caught)
    assert (line.verdict, line.first_stage) == (caught.verdict, caught.stage), line.message
    guess = ""
    if caught.stage is not None:
        stage, output = (next(one for one in line.stages if one.stage == name)
                         for name in (caught.stage, Stage.OUTPUT))
        guess = likely(stage, parse_case(caught.case), output)
        assert (tuple(stage.bad_experts), tuple(stage.bad_ranks)) == (caught.experts, caught.ranks), line.message
    assert caught.words in line.message + guess, line.message


@pytest.mark.parametrize("caught", DEFECTS, ids=_name)
def test_the_message_stays_short(caught: Caught) -> None:
    message = line_of(caught).message.splitlines()
    assert len(message) <= 10
    assert max(map(len, message)) <= 200


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("caught", DEFECTS, ids=_name)
def test_the_right_layer_passes_the_same_case(caught: Caught) -> None:
    """So that it is the mistake that was caught, not the case."""
    line = judged(ParallelMoE(), caught.case)
    assert line.verdict == Verdict.PASS, line.message


def test_every_mistake_is_tried() -> None:
    assert {caught.name for caught in DEFECTS} == set(WRONG)


def test_a_sharded_reference_would_be_fooled_and_the_unsharded_one_is_not() -> None:
    """A merged 2I axis cut naively by the loader: a reference that reads the same shards agrees to the last bit."""
    case = parse_case("v1-T33.H32.I24.E8.K2-fp32-norm-tp2")
    problem, parallel, inputs = case.problem, case.parallel, build_inputs(case.problem)
    whole = build_shards(problem, Parallel())[0]
    right = build_shards(problem, parallel)
    shards = [naively_cut(shard, whole.w13_EGIH, rank) for rank, shard in enumerate(right)]

    def rank_output(comm: LocalComm) -> torch.Tensor:
        groups = grid_groups(comm, tp=2, ep=1)
        return WRONG["MergedAxisCutNaively"]().moe(inputs.x_TH, right[comm.rank], problem.spec, parallel, groups)

    outputs = run_virtual_ranks(2, rank_output)
    first_TH, second_TH = (ParallelMoE().moe(inputs.x_TH, shard, problem.spec) for shard in shards)
    assert all(torch.equal(output, first_TH + second_TH) for output in outputs)
    assert judged(WRONG["MergedAxisCutNaively"](), "v1-T33.H32.I24.E8.K2-fp32-norm-tp2").verdict == Verdict.MISMATCH
