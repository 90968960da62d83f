"""Protects the words that name a fault: planted defects are named rightly or not at all, and noise never is.

A fault is named when the numbers of a layer that has it explain more than 0.9 of the error and those of every layer
with another fault less than half. Silence is right where the fault is not in the list, or where two look alike in the
case at hand; None says so here, with the reason beside it where it is not plain.
"""

import time
from functools import cache
from typing import Any

import pytest
import torch

from moe_ref.contract.case_id import parse_case
from moe_ref.contract.vocabulary import Stage, Verdict
from moe_ref.records.schema import CaseLine, DiagnosisLine
from moe_ref.verify.diagnosis.diagnose import LEAST_SHARE, MOST_OF_NEXT, diagnosable
from moe_ref.verify.explain import explained
from moe_ref.verify.run import case_runner
from tests.in_process import judged
from tests.subjects import mistaken_experts, mistaken_parallel, mistaken_routers, wrong
from tests.subjects.base import Call, TorchMoE
from tests.subjects.whole import WholeSpec
from tests.test_defects import DEFECTS
from tests.test_families import EXPERT_MISTAKES, ROUTER_MISTAKES, SMALL
from tests.test_parallel_defects import DEFECTS as PARALLEL_DEFECTS

NAMED: dict[type, str | None] = {
    # Whole layers, tests/subjects/wrong.py.
    wrong.LastBlockOfKDropped: "last 32 columns of K left out of gate and up, in expert 3",
    wrong.GateUpSwapped: "D01 gate and up exchanged",
    wrong.SiluForGelu: "D08 silu for the activation that was asked for",
    wrong.WeightTwice: "routing weight applied twice",
    wrong.NotRenormalised: "B16 weights not renormalised",
    wrong.ScalingDropped: "B20 scaling factor left out",
    wrong.BiasInWeights: "B13 selection bias in the weights",
    wrong.GroupLimitIgnored: "limit to the best groups ignored",
    wrong.TiesToHigherId: "B07 ties given to the higher expert id",
    wrong.AllReduceLeftOut: "sums of the ranks not added up",
    wrong.AllReduceTwice: "F09 sum of the ranks added up again, 2 times the result",
    wrong.ResidualPerRank: "F02 residual added 4 times",
    wrong.SharedPerRank: "F03 shared expert reduced twice",
    wrong.NeighbourExpert: "K03 rows computed with a neighbouring expert, in 1 of 66 rows",
    wrong.ColumnsSwapped: None,
    wrong.StrideWraps: None,
    wrong.BF16Accumulation: None,
    wrong.TruncatingStore: None,
    wrong.EvenSplitAssumed: "F13 I / tp columns assumed on every rank",
    wrong.UninitialisedTail: None,
    wrong.SecondRunOnly: None,
    # Routers.
    mistaken_routers.SelectionBiasDropped: "bias left out of the selection",
    mistaken_routers.SelectionBiasInWeights: "B13 selection bias in the weights",
    mistaken_routers.SelectionBiasOnLogits: "selection bias added to the logit",
    mistaken_routers.SelectionBiasOnScores: "selection bias added to the score",
    mistaken_routers.GroupFillZero: "B11 experts outside the best groups filled with zero",
    mistaken_routers.GroupFillMinusInfinity: "B11 experts outside the best groups filled with minus_inf",
    mistaken_routers.GroupByMax: "B12 groups ranked by max",
    mistaken_routers.NotRenormalised: "B16 weights not renormalised",
    mistaken_routers.EpsilonAdded: "another epsilon in the renormalisation",
    mistaken_routers.SharedNotInSum: "scores of shared experts left out of the renormalisation",
    mistaken_routers.ScalesDropped: "learned scale left out",
    mistaken_routers.LearnedScaleOfSlot: None,  # leaving it out explains more than half
    mistaken_routers.LogitBiasDropped: "bias of the router left out",
    mistaken_routers.LogitsNotCapped: "logits neither scaled nor capped",
    mistaken_routers.SoftplusWithoutRoot: "softplus without its root",
    mistaken_routers.DroppedTokensKept: "limit of tokens per expert ignored",
    mistaken_routers.FirstTokensFirst: "full experts keep their tokens by token",
    mistaken_routers.OneLimitForAllSequences: ("limit of tokens per expert ignored or limit of a sequence applied to "
                                               "the whole batch"),  # no expert of the case reaches the larger limit
    # Experts, shared expert, merge.
    mistaken_experts.NoClamp: "D09 limit of gate and up left out",
    mistaken_experts.GateClampedFromBelow: None,
    mistaken_experts.ClampAfter: "limit after the activation",
    mistaken_experts.ClampBefore: "limit before the activation",
    mistaken_experts.SharedClampedAsRouted: None,  # so little is left behind the limits that zeros explain it, too
    mistaken_experts.SigmoidScaleOne: "D09 scale inside the sigmoid left out",
    mistaken_experts.NoUpOffset: "D09 offset of up left out",
    mistaken_experts.NoSoftcap: "soft caps of gate and up left out",
    mistaken_experts.SigmoidSoftcapped: None,
    mistaken_experts.GeluErf: "K05 gelu for the other form of gelu",
    mistaken_experts.ReluNotSquared: None,  # the squares of outliers are so large that zeros explain it, too
    mistaken_experts.GateUpSwapped: "D01 gate and up exchanged",
    mistaken_experts.UpBiasDropped: "bias of gate and up left out",
    mistaken_experts.DownBiasDropped: "bias of w2 left out",
    mistaken_experts.DownBiasPerRank: "F01 bias of w2 added by every tp rank",
    mistaken_experts.OutputBiasPerRank: "F01 bias of the output added by every rank",
    mistaken_experts.WeightOnOutput: "E02 routing weight on the expert's output or E03 routing weight not applied",
    mistaken_experts.IdentityPerRank: "identity experts added by every tp rank",
    mistaken_experts.IdentityUnweighted: "identity experts that return the token unweighted",
    mistaken_experts.MeanAsSum: "routed and shared rows added, not averaged",
    mistaken_experts.ScaleOnShared: "B21 shared expert times 2.5 by the scaling factor",
    mistaken_experts.SharedGatesSwapped: "weights of shared experts in reverse order",
    mistaken_experts.SharedColumnsOfRankZero: None,
    mistaken_experts.NaNSpreads: None,
    mistaken_experts.NaNBecomesZero: None,
    mistaken_experts.NaNTokensVanish: None,
    mistaken_experts.NaNEndsInStore: None,
    # Ranks.
    mistaken_parallel.GateOfOneRankUpOfAnother: "K09 gate rows of a rank beside up rows of another",
    mistaken_parallel.MergedAxisCutNaively: "D04 merged gate and up rows cut as one axis",
    mistaken_parallel.EvenSplitAssumed: "F13 I / tp columns assumed on every rank",
    mistaken_parallel.BiasOnEveryRank: "F01 bias of w2 added by every tp rank",
    mistaken_parallel.ResidualPerRank: "F02 residual added 2 times",
    mistaken_parallel.SharedReducedTwice: "F03 shared expert reduced twice",
    mistaken_parallel.WholeSharedInEverySum: "F06 whole shared expert in the sum of every rank",
    mistaken_parallel.NoReduction: "sums of the ranks not added up",
    mistaken_parallel.PartialSumReturned: "sums of the ranks not added up",
    mistaken_parallel.MeanForSum: "mean of the ranks' sums for their sum",
    mistaken_parallel.ReducedTwice: "F09 sum of the ranks added up again, 2 times the result",
    mistaken_parallel.OverTheOtherGroup: "F07 reduced over the ep ranks alone",
    mistaken_parallel.OverTheWorld: "F07 reduced over ranks that have other tokens",
    mistaken_parallel.BF16Between: None,
    mistaken_parallel.NeighboursSlice: "K08 parts of the ranks in another order",
    mistaken_parallel.GatheredInReverse: "K08 parts of the ranks in another order",
    mistaken_parallel.OwnTokensUnderGather: None,
    mistaken_parallel.ColumnsInterleaved: "K08 gathered columns of the activation in another order of ranks",
    mistaken_parallel.EmptyRankPadded: None,
    mistaken_parallel.WeightsInReverse: "K08 routing weights of the ranks gathered in reverse order",
    mistaken_parallel.RowsBackReversed: "K08 rows that come back from another rank in reverse order",
    mistaken_parallel.WeightTwice: "routing weight applied twice",
    mistaken_parallel.RoundRobinReadAsContiguous: "right rows in another order",
    mistaken_parallel.HiddenEveryCopyServes: "rows added by every copy of an expert",
    mistaken_parallel.HiddenDroppedBeyondTheMean: None,
}

BY_OUTPUT = {
    wrong.LastBlockOfKDropped: "last 32 columns of K left out of gate and up, in expert 3",
    wrong.GateUpSwapped: "D01 gate and up exchanged",
    wrong.BiasInWeights: "B13 selection bias in the weights",
    wrong.ResidualPerRank: "F02 residual added 4 times",
    wrong.AllReduceLeftOut: "sums of the ranks not added up",
    wrong.WeightTwice: None,  # small weights squared are nearly zeros
    mistaken_experts.DownBiasPerRank: "F01 bias of w2 added by every tp rank",
    mistaken_parallel.MergedAxisCutNaively: "D04 merged gate and up rows cut as one axis",
    mistaken_parallel.WholeSharedInEverySum: ("F03 shared expert reduced twice or F06 whole shared expert in the sum "
                                              "of every rank"),
    mistaken_parallel.OverTheOtherGroup: "F07 reduced over the ep ranks alone",
}
"""The same of layers that show nothing but their output."""


@cache
def cases() -> dict[type, tuple[Any, str]]:
    """The subject of every mistake and the case that shows it, those of the tests of verdicts."""
    found = {type(subject): (subject, caught.case) for name, caught in DEFECTS.items()
             if caught.verdict == Verdict.MISMATCH for subject in [getattr(wrong, name)]}
    for caught in reversed(PARALLEL_DEFECTS):
        if caught.verdict == Verdict.MISMATCH:
            found[mistaken_parallel.WRONG[caught.name]] = mistaken_parallel.WRONG[caught.name](), caught.case
    for mistake, (words, _) in (ROUTER_MISTAKES | EXPERT_MISTAKES).items():
        subject = WholeSpec(mistake()) if mistake in ROUTER_MISTAKES else mistake()
        found[mistake] = subject, words if words.startswith("v1") else f"{SMALL}.{words}"
    return found


def fault_of(line: CaseLine) -> str | None:
    """What is named, after it was compared with what must hold of every name."""
    assert line.verdict == Verdict.MISMATCH, line.message
    if line.diagnosis is None:
        assert "% of the error" not in line.message
        return None
    assert float(line.diagnosis.share) > LEAST_SHARE
    assert float(line.diagnosis.next_share) < MOST_OF_NEXT
    assert f"  likely  {explained(line.diagnosis)}" in line.message.splitlines()
    return line.diagnosis.fault


def test_every_planted_defect_is_here() -> None:
    assert set(NAMED) == set(cases())


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("mistake", NAMED, ids=lambda mistake: f"{mistake.__module__[15:]}.{mistake.__name__}")
def test_a_fault_has_its_right_name_or_none(mistake: type) -> None:
    subject, case_id = cases()[mistake]
    line = judged(subject, case_id, runs=2 if mistake is wrong.SecondRunOnly else 1)
    assert fault_of(line) == NAMED[mistake], line.message


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("mistake", BY_OUTPUT, ids=lambda mistake: mistake.__name__)
def test_the_output_alone_tells_less_and_nothing_wrong(mistake: Any) -> None:
    hidden = type(mistake.__name__, (mistake,), {"shows": ()})
    line = judged(hidden(), cases()[mistake][1], runs=1)
    assert line.first_stage in (Stage.REDUCED, Stage.OUTPUT)
    assert fault_of(line) == BY_OUTPUT[mistake], line.message


class Spoilt(TorchMoE):
    """A right layer whose rows are changed before they are stored; kind: how."""

    kind, rows = "", slice(None)

    def down(self, call: Call, act_RI: torch.Tensor, w2_HI: torch.Tensor, expert: int) -> torch.Tensor:
        rows = super().down(call, act_RI, w2_HI, expert)
        generator = torch.Generator().manual_seed(expert)
        noise = {"small noise": 0.05, "noise": 1.0, "large noise": 100.0}.get(self.kind)
        if noise is not None:
            size = noise * rows.square().mean().sqrt()
            rows[self.rows] += size * torch.randn(rows.shape, generator=generator)[self.rows]
        if self.kind == "truncated":
            rows = (rows.contiguous().view(torch.int32) & -65536).view(torch.float32)
        if self.kind == "another layer":
            rows = torch.randn(rows.shape, generator=generator)
        if self.kind == "nan":
            rows[self.rows] = torch.nan
        return 1.07 * rows if self.kind == "another scale" else rows


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("shows", [TorchMoE.shows, ()], ids=["stages", "output"])
@pytest.mark.parametrize(("kind", "rows"), [
    ("small noise", slice(None)), ("noise", slice(None)), ("large noise", slice(None)), ("noise", slice(1, 2)),
    ("large noise", slice(0, 1)), ("truncated", slice(None)), ("another layer", slice(None)), ("nan", slice(None)),
    ("nan", slice(2, 3)), ("another scale", slice(None))], ids=str)
def test_what_no_fault_explains_is_not_named(kind: str, rows: slice, shows: tuple[Stage, ...]) -> None:
    """Noise in all rows or one, what another layer would return, a store that cuts off, numbers that are none."""
    subject = type("Spoilt", (Spoilt,), {"kind": kind, "rows": rows, "shows": shows})()
    narrow, wide = "v1-T33.H96.I160.E8.K2-bf16-norm-scale2.5-res-tp2", "v1-T9.H40.I24.E5.K3-fp32-sigmoid-sh16-tp3"
    for case_id in (wide,) if kind == "truncated" else (narrow, wide):  # bf16 rows are cut off in their store already
        assert fault_of(judged(subject, case_id, runs=1)) is None


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("case_id", ["v1-T33.H96.I160.E8.K2-bf16-norm-tp3", "v1-T16.H64.I64.E32.K4-fp32-norm-tp2",
                                     "v1-T128.H128.I128.E8.K2-bf16-norm-tp2"])
def test_it_takes_about_a_second(case_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the process's own time, where nothing but the output is shown, so that every fault is computed."""
    took, diagnose = [], case_runner.diagnose

    def timed(*arguments: Any) -> Any:
        started = time.process_time()
        found = diagnose(*arguments)
        took.append(time.process_time() - started)
        return found

    monkeypatch.setattr(case_runner, "diagnose", timed)
    hidden = type("Hidden", (wrong.GateUpSwapped,), {"shows": ()})
    assert fault_of(judged(hidden(), case_id, runs=1)) == "D01 gate and up exchanged"
    assert took[0] < 2.0, "about half a second on a usual core"


def test_large_cases_are_not_diagnosed() -> None:
    """Hundreds of layers are computed, so what takes seconds for one is left alone."""
    assert diagnosable(parse_case("v1-T33.H96.I160.E8.K2-bf16-norm-tp3"))
    for large in ("v1-T4096.H96.I160.E8.K2-bf16", "v1-T1.H64.I64.E256.K1-bf16", "v1-T1.H2048.I1024.E8.K1-bf16"):
        assert not diagnosable(parse_case(large))


def test_the_line_says_both_shares() -> None:
    found = DiagnosisLine(fault="F02 residual added 4 times", share=0.998, next_share=0.12)
    assert explained(found) == "F02 residual added 4 times explains 99.8 % of the error, the next best 12 %"
