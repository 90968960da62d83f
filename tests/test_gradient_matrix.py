"""Protects the backward direction: right gradients are never accused, each mistake of a layer is found and named."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import moe_ref
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Stage, Verdict, gradient_stage
from moe_ref.contract.weights import EXPERT_PARAMETERS, SHARED_PARAMETERS, WHOLE_PARAMETERS, MoEWeights
from moe_ref.inputs.build import GeneratedWeights, build_inputs, output_gradient
from moe_ref.records.schema import from_number
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.measure.gradients import measure_case
from tests.in_process import judged, verdict
from tests.subjects import gradients as rounded
from tests.subjects import oracle_gradients as oracle
from tests.subjects.whole import whole_spec

SMALL = "v1-T12.H40.I36"

FORMS = (
    # Every schedule, with biases that one rank adds and gates that all ranks hold.
    ".E4.K2-fp32", ".E6.K3-fp32-norm-gelu-sh19-shgelu-tp2-reducescatter",
    ".E6.K3-fp32-norm-gelutanh-sh19-shgate-shgelutanh-tp2-allreducerows",
    ".E6.K3-fp32-norm-mlpbias-sh19-shgate-shmlpbias-outbias-tp3-gather",
    # Tokens on one rank each, whose router gradients are added up; a rank without tokens.
    ".E6.K3-bf16-norm-sh19-res-tp2-reducescatter-tokenstp",
    ".E6.K3-fp32-norm-sh19-shgate-outbias-res-tp2-ep2-tokensep",
    ".E6.K3-fp32-norm-sh19-shgate-tp2-ep3-reducescatter-tokensboth-share5.4.3.2.1.0",
    # Experts over ranks, and copies that serve other rows of the same expert.
    ".E6.K3-fp32-norm-mlpbias-outbias-tp2-ep2", ".E6.K3-bf16-norm-mlpbias-tp2-ep3-roundrobin-copy0.5",
    ".E6.K3-fp32-norm-sh19-shgate-shmlpbias-tp2-reducescatter-tokenstp-wholeshared",
    # A capacity: dropped slots, and tokens that lost all of them.
    ".E6.K3-fp32-sigmoid-norm-cap2-capweight-capafter", ".E6.K3-fp32-sigmoid-norm-cap2-capchoice-tp2",
)
"""What the oracle's layer is judged in besides OPTIONS."""

OPTIONS = (
    # Dtypes, a dense layer, a rank without columns, one slot whose renormalised weight has no gradient.
    ".E4.K2-fp16-norm-tp2", ".E4.K2-bf16-norm-tp3", ".E4.K1-bf16-norm-tp2", "-fp32-sh19-shgate-res-tp2",
    ".E6.K3-fp32-norm-relu-limit1-tp2-split3.0",
    # Kinks and clamps: a value near one has a bound that covers both sides.
    ".E6.K3-bf16-norm-relu2-nogate-mlpbias-tp2", ".E6.K3-bf16-norm-routerbias-mlpbias-limit1-alpha1.702-up1-tp2",
    ".E6.K3-fp32-norm-limit1-limitafter-tp2", ".E6.K3-bf16-norm-relu-large-tp2",
    # Routers: everything that a routing weight is made of.
    ".E6.K3-bf16-sigmoid-norm-eps1em20-bias-g3.2-top2sum-scale2.5-sh19-shgate-res-tp3",
    ".E6.K3-fp32-norm-scale2.5-sqrtsoftplus-expertscale-tp2", ".E6.K3-fp32-norm-logitscale0.5-logitcap1.5-tp2",
    ".E6.K3-fp32-sigmoid-norm-eps1.5-epsclamp-tp2", ".E6.K3-bf16-scale2-zero3-tp2",
    ".E6.K3-fp32-sigmoid-norm-learnscale-sh24-shgatecap2-shupcap2.5-shrouter2-shmean-tp2",
    ".E6.K3-bf16-sigmoid-norm-sh19-weightinput-tp2",
    # Injected logits, experts without rows, outliers, another order in memory.
    ".E6.K3-fp32-norm-zipf-tp2", ".E6.K3-bf16-norm-onehot-tp2", ".E6.K3-fp16-norm-empty-tp2",
    ".E6.K3-bf16-norm-outlier-tp2-inoutinterleaved",
)

FEW = (".E4.K2-bf16-norm-tp3", ".E6.K3-bf16-norm-sh19-shgate-res-tp2", ".E6.K3-fp32-norm-limit1-limitafter-tp2",
       ".E6.K3-bf16-sigmoid-norm-learnscale-sh24-shgatecap2-shupcap2.5-shrouter2-tp2")


def backward(words: str) -> str:
    """The id of a small layer's backward case."""
    return f"{SMALL}{words}-bwd"


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize("words", FORMS + OPTIONS)
def test_exact_gradients_pass_under_every_form(words: str) -> None:
    """Autograd through the oracle on every rank against the bound's own values, which are written-out formulas."""
    line = judged(oracle.oracle_gradients, backward(words), runs=1)
    assert line.verdict == Verdict.PASS, line.message
    assert from_number(line.power) > 10


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize("words", OPTIONS)
def test_rounded_gradients_pass(words: str) -> None:
    """Rows and gradients in the dtype of the model, added up between ranks in it, and twice the same bits."""
    line = judged(rounded.rounded, backward(words))
    assert line.verdict == Verdict.PASS, line.message
    assert line.same_bits


@pytest.mark.sampled(every=10)
@pytest.mark.parametrize("words", FEW)
@pytest.mark.parametrize("subject", [rounded.RoundedLast, rounded.RoundedWeightedActivation, rounded.RoundedHidden])
def test_other_rounding_contracts_pass(subject: Callable[[], rounded.Rounded], words: str) -> None:
    line = judged(subject(), backward(words), runs=1)
    assert line.verdict == Verdict.PASS, line.message


@pytest.mark.parametrize("words", FEW)
def test_a_layer_rounded_at_every_step_is_not_accused(words: str) -> None:
    """What is predicted of so many roundings still has power."""
    line = judged(rounded.RoundedThroughout(), backward(words), runs=1)
    assert line.verdict == Verdict.PASS, line.message


MISTAKES = [
    (rounded.WeightsDetached, ".E6.K3-fp32-norm-tp2", Stage.GRAD_ROUTER),
    (rounded.WeightsDetached, ".E6.K3-bf16-norm-tp2", Stage.GRAD_ROUTER),
    (rounded.WeightTwice, ".E6.K3-bf16-norm-tp2", Stage.GRAD_W2),
    (rounded.WeightGradientInBf16, ".E6.K3-fp32-norm-tp2", Stage.GRAD_W2),
    (rounded.RanksDiffer, ".E6.K3-fp32-norm-tp2", Stage.GRAD_ROUTER),
    (oracle.TokensNotReduced, ".E6.K3-bf16-norm-tp2", Stage.GRAD_X),
    (oracle.TokensNotReduced, ".E6.K3-bf16-norm-sh19-tp2-ep2", Stage.GRAD_X),
    # As wide as tokens is also the router's gradient, which is added up where ranks have their own tokens.
    (oracle.TokensNotReduced, ".E6.K3-fp32-norm-tp2-reducescatter-tokenstp", Stage.GRAD_ROUTER),
    (oracle.WeightsNotReduced, ".E6.K3-bf16-norm-tp2", Stage.GRAD_ROUTER),
    (oracle.TokensReducedTwice, ".E6.K3-bf16-norm-tp2", Stage.GRAD_X),
    (oracle.TokensTimesRanks, ".E6.K3-bf16-norm-tp2", Stage.GRAD_X),
    (oracle.WholeParametersDivided, ".E6.K3-bf16-norm-tp2", Stage.GRAD_ROUTER),
    (oracle.WholeParametersDivided, ".E6.K3-bf16-norm-sh19-shgate-outbias-tp2", Stage.GRAD_OUTPUT_BIAS),
    (oracle.GateAndUpSwapped, ".E6.K3-bf16-norm-tp2", Stage.GRAD_W13),
    (oracle.EmptyExpertsNotZero, ".E6.K3-bf16-norm-empty-tp2", Stage.GRAD_W2),
    (oracle.ResidualDropped, ".E6.K3-bf16-norm-res-tp2", Stage.GRAD_RESIDUAL),
    (oracle.SharedGateDropped, ".E6.K3-bf16-norm-sh19-shgate-tp2", Stage.GRAD_SHARED_GATE),
]


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize(("subject", "words", "stage"), MISTAKES)
def test_a_mistake_is_caught_and_named(subject: Callable[[], rounded.Rounded], words: str, stage: Stage) -> None:
    """Forward all of them are right, so that nothing but a gradient gives them away."""
    line = verdict(subject(), backward(words))
    assert (line.verdict, line.first_stage) == (Verdict.MISMATCH, stage), line.message
    assert verdict(subject(), f"{SMALL}{words}").verdict == Verdict.PASS


def test_the_message_says_where() -> None:
    """Stage, experts and ranks in the first line; of a parameter the row and the column."""
    line = judged(oracle.EmptyExpertsNotZero(), backward(".E6.K3-bf16-norm-empty-tp2"), runs=1)
    assert line.reason == "grad_w2: infinitely over bound, expert 3, 5, rank 0, 1"
    assert "grad_w2[row 0, expert 3, rank 0, column 0] got 9.5367" in line.message
    assert "tokens" not in line.message


def test_ranks_that_differ_are_named() -> None:
    line = judged(rounded.RanksDiffer(), backward(".E6.K3-fp32-norm-tp2"), runs=1)
    assert line.reason == ("grad_router: declared equal on all ranks, but the bits of rank 1 differ from those of "
                           "the first that holds the same")


def test_an_output_without_a_gradient_is_a_fault_of_structure() -> None:
    class Detached(rounded.Rounded):
        def moe(self, *arguments: object, **options: object) -> torch.Tensor:
            return super().moe(*arguments, **options).detach()  # type: ignore[arg-type]

    line = judged(Detached(), backward(".E4.K2-fp32-norm"), runs=1)
    assert line.verdict == Verdict.STRUCT
    assert "output: no gradient, but should have one" in line.reason


def test_the_direction_must_be_declared() -> None:
    """An implementation that only declares the forward pass is never asked for gradients."""
    line = judged(whole_spec, backward(".E4.K2-fp32-norm"), runs=1)
    assert (line.verdict, line.reason) == (Verdict.UNSUPPORTED, "not declared: direction bwd")


def test_no_gradient_of_data_that_is_not_finite() -> None:
    with pytest.raises(UsageValueError, match="direction bwd with data nonfinite"):
        parse_case(backward(".E4.K2-fp32-norm-nonfinite"))


def test_without_tokens_every_gradient_is_exactly_zero() -> None:
    """The sums are empty: nothing but 0 passes, and nothing else was there to show power with."""
    line = judged(oracle.oracle_gradients, "v1-T0.H40.I36.E6.K3-fp32-norm-sh19-tp2-bwd", runs=1)
    assert line.verdict == Verdict.PASS, line.message
    assert {stage.ratio for stage in line.stages if stage.stage.startswith("grad_")} == {0.0}


def whole_weights(weights: GeneratedWeights) -> MoEWeights:
    """All experts of a problem in memory."""
    experts, shared = [weights.expert(e) for e in range(weights.problem.spec.num_experts)], weights.shared_expert()
    held = dict(zip(EXPERT_PARAMETERS, zip(*experts, strict=True), strict=True))
    stacked = {name: torch.stack(parts) for name, parts in held.items() if parts[0] is not None}
    of_shared = {} if shared is None else dict(zip(SHARED_PARAMETERS, shared, strict=True))
    return MoEWeights(**stacked, **of_shared, **{name: getattr(weights, name) for name in WHOLE_PARAMETERS})


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize("words", [words.partition("-tp")[0] for words in (*OPTIONS[4:18], FORMS[3])])
def test_the_wanted_values_are_the_written_out_gradients(words: str) -> None:
    """What is wanted of a gradient is moe_backward's, measured here as if a subject had shown it."""
    case = parse_case(backward(words))
    inputs, spec, trace = build_inputs(case.problem), case.problem.spec, moe_ref.Trace()
    weights = whole_weights(inputs.weights)
    moe_ref.moe(inputs.x_TH, weights, spec, logits_TE=inputs.logits_TE, residual_TH=inputs.residual_TH, trace=trace)
    written = vars(moe_ref.moe_backward(output_gradient(case.problem), inputs.x_TH, weights, spec,
                                        logits_TE=inputs.logits_TE))
    leaves = {"x_TH": inputs.x_TH, "logits_TE": inputs.logits_TE, "residual_TH": inputs.residual_TH,
              **dict(weights.named_tensors())}
    shown = {gradient_stage(name): torch.zeros_like(leaf) if written[name] is None else written[name].to(leaf.dtype)
             for name, leaf in leaves.items() if leaf is not None and name != "selection_bias_E"}
    capabilities = moe_ref.CAPABILITIES
    model = RoundingModel(load_tolerances(), "cpu", capabilities.contract(case.problem).accumulate)
    found = measure_case(case, inputs, [trace.tensors | shown], capabilities, model)
    assert found.struct_faults == ()
    assert {stage.stage for stage in found.stages} >= set(shown)
    assert [stage.stage for stage in found.stages if not from_number(stage.ratio) <= 1] == []


WIDTHS = (24, 64, 128, 256, 512)


def print_power() -> None:
    """By how much zeros would miss what is allowed, per gradient and width: the tables in docs/bounds.md."""
    for words in ("fp32", "fp16", "bf16"):
        for stage in (Stage.GRAD_W2, Stage.GRAD_W13, Stage.GRAD_ROUTER, Stage.GRAD_X):
            cells = [f"{missed(width, words, stage):.2g}" for width in WIDTHS]
            print(f"| {stage} | {words} | {' | '.join(cells)} |")


def missed(width: int, words: str, stage: Stage) -> float:
    """Largest value over what is allowed: what a gradient of zeros gets."""
    class Zeros(rounded.Rounded):
        def moe(self, x_TH: torch.Tensor, weights: MoEWeights, *arguments: object, **options: object) -> torch.Tensor:
            names = ("x_TH", "w13_EGIH", "w2_EHI", "router_EH")
            name = next(name for name in names if gradient_stage(name) is stage)
            if name == "x_TH":
                x_TH = rounded.changed(x_TH, torch.zeros_like)
            else:
                weights = replace(weights, **{name: rounded.changed(getattr(weights, name), torch.zeros_like)})
            return super().moe(x_TH, weights, *arguments, **options)  # type: ignore[arg-type]

    line = judged(Zeros(), f"v1-T24.H{width}.I{width}.E6.K2-{words}-norm-tp2-bwd", runs=1)
    return from_number(next(one.ratio for one in line.stages if one.stage == stage))


if __name__ == "__main__":
    print_power()
