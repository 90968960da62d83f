"""Protects the whole specification: a right layer passes all of the families tier, each mistake fails in a case.

The cases were chosen for the mistake: the option is in use and the data make it show. Same request, measurement
and verdict as in a run, without the child process.
"""

from collections import Counter

import pytest

from moe_ref.contract.case_id import parse_case
from moe_ref.contract.features import Feature, features_of
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.vocabulary import Direction, Dtype, Ranks, Stage, Verdict
from moe_ref.tiers.tiers import tier
from tests.in_process import judged, verdict
from tests.subjects import mistaken_experts as experts
from tests.subjects import mistaken_routers as routers
from tests.subjects import whole_variants as variants
from tests.subjects.oracle_gradients import oracle_gradients
from tests.subjects.parallel import parallel_moe
from tests.subjects.whole import WholeSpec, whole_spec

SMALL = "v1-T21.H48.I40.E8"
IDS = [one.case_id for one in tier("families").cases]


def right_layer(case_id: str) -> object:
    """The simplest right layer that takes a case: on ranks that share out columns, on any grid, with gradients."""
    case = parse_case(case_id)
    return next(subject for subject in (whole_spec, parallel_moe, oracle_gradients)
                if subject.CAPABILITIES.refusal(case, Ranks.LOCAL, "cpu") is None)


@pytest.mark.sampled(every=16)
@pytest.mark.parametrize("start", range(16))
def test_a_right_layer_of_the_whole_specification_passes(start: int) -> None:
    """All of the tier, in sixteen portions; an accusation here is a defect of the harness."""
    lines = [judged(right_layer(case_id), case_id, runs=1) for case_id in IDS[start::16]]
    assert [line.message for line in lines if line.verdict != Verdict.PASS] == []


def test_the_tier_holds_every_feature() -> None:
    """In fp32 and bf16, on one rank and on three; a feature without a case would be declared and never judged."""
    for dtype in (Dtype.FP32, Dtype.BF16):
        for tp in (1, 3):
            cases = [one.case for one in tier("families").cases
                     if one.case.problem.dtype is dtype and one.case.parallel.tp == tp]
            features = set().union(*(features_of(case.problem.spec) for case in cases))
            features |= {Feature.RESIDUAL} & {Feature.RESIDUAL for case in cases if case.problem.residual}
            assert features == set(Feature)
            assert len(cases) >= 40


ROUTER_MISTAKES = {
    routers.SelectionBiasDropped: ("K3-fp32-sigmoid-norm-eps1em06-bias", Stage.IDS),
    routers.SelectionBiasInWeights: ("K3-fp32-sigmoid-norm-eps1em06-bias", Stage.WEIGHTS),
    routers.SelectionBiasOnLogits: ("K3-fp32-norm-eps1em12-bias-epsclamp-sh26", Stage.IDS),
    routers.SelectionBiasOnScores: ("K3-fp32-sigmoid-norm-biaslogit", Stage.IDS),
    routers.GroupFillZero: ("K4-fp32-sigmoid-norm-eps1em20-bias-g4.2-top2sum-scale2.5-sh26-zipf", Stage.IDS),
    routers.GroupFillMinusInfinity: (
        "K4-fp32-sigmoid-norm-eps1em20-bias-g4.2-top2sum-scale2.5-fillzero-sh26-zipf", Stage.IDS),
    routers.GroupByMax: ("K3-fp32-norm-eps1em20-g4.2-top2sum-fillzero-sh26", Stage.IDS),
    routers.NotRenormalised: ("K2-fp32-norm", Stage.WEIGHTS),
    routers.EpsilonAdded: ("K3-fp32-norm-eps0.5-epsclamp", Stage.WEIGHTS),
    routers.SharedNotInSum: ("K3-fp32-sigmoid-norm-bias-scale2.5-learnscale-sh26-shrouter2", Stage.WEIGHTS),
    routers.ScalesDropped: ("K3-fp32-sigmoid-norm-learnscale", Stage.WEIGHTS),
    routers.LearnedScaleOfSlot: ("K3-fp32-norm-expertscale-gelutanh", Stage.WEIGHTS),
    routers.LogitBiasDropped: ("K3-fp32-norm-routerbias", Stage.LOGITS),
    routers.LogitsNotCapped: ("K3-fp32-sigmoid-norm-bias-scale2.5-logitcap1.5-sh26", Stage.IDS),
    routers.SoftplusWithoutRoot: ("K3-fp32-sqrtsoftplus", Stage.WEIGHTS),
    routers.DroppedTokensKept: ("K2-fp32-norm-cap3-allone", Stage.IDS),
    routers.FirstTokensFirst: ("K2-fp32-norm-cap4-capweight", Stage.IDS),
    routers.OneLimitForAllSequences: ("K1-fp32-capfactor1.25-capseq7-relu-nogate", Stage.IDS),
}

EXPERT_MISTAKES = {
    experts.NoClamp: ("K2-fp32-norm-routerbias-mlpbias-limit7-alpha1.702-up1-large", Stage.ACT),
    experts.GateClampedFromBelow: ("K2-fp32-norm-limit1", Stage.ACT),
    experts.ClampAfter: ("K2-fp32-norm-limit1", Stage.ACT),
    experts.ClampBefore: ("K2-fp32-norm-limit1-limitafter", Stage.ACT),
    experts.SharedClampedAsRouted: ("K3-fp32-sigmoid-norm-eps1em20-bias-scale2.5-limit7-sh26-large", Stage.SHARED),
    experts.SigmoidScaleOne: ("K2-fp32-norm-routerbias-mlpbias-limit1-alpha1.702-up1", Stage.ACT),
    experts.NoUpOffset: ("K2-fp32-norm-routerbias-mlpbias-limit1-alpha1.702-up1", Stage.ACT),
    experts.NoSoftcap: ("K3-fp32-sigmoid-norm-bias-gatecap2-upcap2-sh26-shgatecap2-shupcap2", Stage.ACT),
    experts.SigmoidSoftcapped: ("K3-fp32-sigmoid-norm-bias-gatecap2-upcap2-sh26-shgatecap2-shupcap2", Stage.ACT),
    experts.GeluErf: ("K2-fp32-norm-gelutanh", Stage.ACT),
    experts.ReluNotSquared: ("K2-fp32-norm-relu2-nogate-outlier", Stage.ACT),
    experts.GateUpSwapped: ("K2-fp32-norm-limit1", Stage.ACT),
    experts.UpBiasDropped: ("K2-fp32-norm-mlpbias", Stage.ACT),
    experts.DownBiasDropped: ("K2-fp32-norm-mlpbias", Stage.DOWN),
    experts.DownBiasPerRank: ("K2-fp32-norm-mlpbias-tp3", Stage.DOWN),
    experts.OutputBiasPerRank: ("K2-fp32-norm-outbias-tp3", Stage.MERGED),
    experts.WeightOnOutput: ("K1-fp32-sigmoid-sh26-weightinput", Stage.ACT),
    experts.IdentityPerRank: ("K3-fp32-bias-scale6-zero4-tp3", Stage.DOWN),
    experts.IdentityUnweighted: ("K3-fp32-bias-scale6-zero4", Stage.DOWN),
    experts.MeanAsSum: ("K2-fp32-norm-sh26-shmean", Stage.MERGED),
    experts.ScaleOnShared: ("K3-fp32-sigmoid-norm-bias-scale2.5-logitcap1.5-sh26", Stage.MERGED),
    experts.SharedGatesSwapped: ("K3-fp32-sigmoid-norm-bias-scale2.5-learnscale-sh26-shrouter2", Stage.SHARED),
    experts.SharedColumnsOfRankZero: (
        "K3-fp32-sigmoid-norm-bias-scale2.5-learnscale-sh26-shrouter2-tp3", Stage.SHARED),
    experts.NaNSpreads: ("K2-fp32-norm-zipf-nonfinite", Stage.MERGED),
    experts.NaNBecomesZero: ("K3-fp32-sigmoid-norm-relu2-nogate-sh26-zipf-nonfinite", Stage.ACT),
    experts.NaNTokensVanish: ("K2-fp32-norm-nonfinite", Stage.ACT),
    experts.NaNEndsInStore: ("K2-fp32-norm-zipf-nonfinite", Stage.REDUCED),
}


def assert_caught(subject: WholeSpec, words: str, stage: Stage) -> None:
    """In that case and at that stage."""
    case_id = words if words.startswith("v1") else f"{SMALL}.{words}"
    assert case_id in IDS
    line = verdict(subject, case_id)
    assert (line.verdict, line.first_stage) == (Verdict.MISMATCH, stage), line.message


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("mistake", ROUTER_MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistaken_router_is_caught(mistake: type[routers.WholeRouter]) -> None:
    assert_caught(WholeSpec(mistake()), *ROUTER_MISTAKES[mistake])


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("mistake", EXPERT_MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistaken_layer_is_caught(mistake: type[WholeSpec]) -> None:
    assert_caught(mistake(), *EXPERT_MISTAKES[mistake])


def test_a_large_epsilon_is_caught_where_sums_are_small() -> None:
    """1e-6 in a sum of about 1 is below what rounding may do to it; one sigmoid of a negative logit shows it."""
    assert_caught(WholeSpec(routers.LargeEpsilon()), "v1-T24.H48.I40.E2.K1-fp32-sigmoid-norm-eps1em20-zipf",
                  Stage.WEIGHTS)


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("words", ["K2-fp32-norm-cap4-capweight", "K3-bf16-sigmoid-norm-cap5-capafter-tp3",
                                   "K3-fp32-bias-scale6-zero4-tp3", "K2-fp32-norm-zipf-nonfinite",
                                   "K2-bf16-sigmoid-sh26-shmean-outbias-res-tp3",
                                   "K3-bf16-norm-zero4-cap5-sh26-res"])
def test_a_black_box_passes(words: str) -> None:
    """Capacity, identity experts, means and NaN judged by the output alone: a right layer is not refused."""
    line = judged(variants.BlackBox(), f"{SMALL}.{words}", runs=1)
    assert line.verdict == Verdict.PASS, line.message


def test_a_black_box_that_loses_a_nan_is_caught() -> None:
    """Weights that are not numbers leave no doubt about the output, whichever experts were chosen."""

    class HiddenStore(experts.NaNEndsInStore):
        shows = ()

    line = judged(HiddenStore(), f"{SMALL}.K2-fp32-norm-nonfinite", runs=1)
    assert (line.verdict, line.first_stage) == (Verdict.MISMATCH, Stage.REDUCED), line.message


def test_ids_of_the_tier_are_canonical_and_different() -> None:
    """The same layer twice would be judged once."""
    assert all(parse_case(one.case_id) == one.case for one in tier("families").cases)
    assert set(Counter(IDS).values()) == {1}


VARIANTS = {
    "fp32 throughout": (variants.FP32Throughout(), "bf16", 3),
    "weight on the activation": (variants.WeightedActivation(), "bf16", 3),
    "every step rounded": (variants.EagerLoop(), "bf16", 3),
    "every step rounded, hidden": (variants.HiddenEagerLoop(), "bf16", 1),
}


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("name", VARIANTS)
def test_other_rounding_contracts_pass(name: str) -> None:
    """Right layers that round elsewhere, as they declare; every fourth layer of the tier."""
    subject, dtype, tp = VARIANTS[name]
    chosen = [one.case_id for one in tier("families").cases
              if one.case.problem.dtype == dtype and one.case.parallel == Parallel(tp=tp)
              and one.case.direction is Direction.FORWARD][::4]
    lines = [judged(subject, case_id, runs=1) for case_id in chosen]
    assert [line.message for line in lines if line.verdict != Verdict.PASS] == []


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize(("subject", "word"), [
    (variants.SharedOneByOne(), "shrouter"), (variants.LateBias(), "outbias"),
    (WholeSpec(variants.NaiveSoftplus()), "sqrtsoftplus"),
], ids=["shared one by one", "late bias", "naive softplus"])
def test_other_orders_of_the_same_steps_pass(subject: WholeSpec, word: str) -> None:
    """What the specification leaves open: where a shared weight or a late bias joins, how softplus is written."""
    chosen = [case_id for case_id in IDS if word in case_id
              and subject.CAPABILITIES.refusal(parse_case(case_id), Ranks.LOCAL, "cpu") is None]
    assert chosen
    lines = [judged(subject, case_id, runs=1) for case_id in chosen]
    assert [line.message for line in lines if line.verdict != Verdict.PASS] == []
