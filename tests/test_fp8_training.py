"""Training in 8 bits: every product of experts rounds both operands to e4m3 along its sum, forward and backward. Right
layers, whose quantiser is torch's own, are never accused; each mistake of a quantiser fails where it sits.

`python -m tests.test_fp8_training [SEEDS]` prints how near right layers come to what is allowed."""

import sys
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_ref.adapters.grouped_rows import rounded
from moe_ref.contract.capabilities import Numerics
from moe_ref.contract.case_id import format_case, parse_case
from moe_ref.contract.spec import MoESpec, Router
from moe_ref.contract.vocabulary import Dtype, Format, Stage, Verdict
from moe_ref.contract.weights import ExpertWeights
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.bounds.backward_mlp import Cut, MLPBackward, MLPRows
from moe_ref.verify.bounds.backward_steps import BackwardSteps
from moe_ref.verify.bounds.operands import RULES, rounded_operand, rounded_rows
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.bounds.rows import Rows, exact
from moe_ref.verify.bounds.steps import Steps
from tests.in_process import judged, verdict
from tests.subjects import fp8_training as subjects
from tests.subjects.fp8_training import Fp8Training, OnActivation, PowersOfTwo, Products, Separately, mistaken

SMALL, WIDER = "v1-T12.H40.I36", "v1-T48.H64.I96"

RIGHT = (
    (Fp8Training, ".E6.K3-fp32-norm"), (Fp8Training, ".E6.K3-bf16-norm-sh19-shgate-res-tp3"),
    (Fp8Training, ".E6.K3-fp16-norm-zipf-large-tp2"), (Fp8Training, "-bf16-sh19-tp2"),
    # Biases, whose gradients are sums of what was not rounded; experts without rows; a rank without columns.
    (Fp8Training, ".E6.K3-fp32-norm-mlpbias-sh19-shgate-shmlpbias-outbias-tp2"),
    (Fp8Training, ".E6.K3-bf16-norm-empty-tp2"), (Fp8Training, ".E6.K3-fp32-norm-tp2-split3.0"),
    (Fp8Training, ".E6.K3-fp32-sigmoid-norm-sh19-weightinput-outlier-tp2"),
    # Columns of zeros, whose scale is 1; one projection.
    (Fp8Training, ".E6.K3-bf16-norm-relu-tp2"), (Fp8Training, ".E6.K3-fp32-norm-relu2-nogate-mlpbias-tp2"),
    (Separately, ".E6.K3-bf16-norm-outlier-tp2"), (Separately, ".E6.K3-fp32-norm-tp3"),
    (PowersOfTwo, ".E6.K3-bf16-norm-mlpbias-sh19-tp2"), (PowersOfTwo, ".E6.K3-fp32-norm-large-tp2"),
    (OnActivation, ".E6.K3-bf16-norm-mlpbias-tp2"), (OnActivation, ".E6.K3-fp32-norm-sh19-shgate-tp2"),
    (subjects.Throughout, ".E6.K3-bf16-norm-tp2"), (subjects.Last, ".E6.K3-bf16-norm-sh19-tp2"),
    (subjects.Hidden, ".E6.K3-fp32-norm-tp2"),
)


@pytest.mark.sampled(every=12)
@pytest.mark.parametrize(("layer", "words"), RIGHT)
def test_right_layers_pass(layer: type[Products], words: str) -> None:
    line = judged(layer(), f"{SMALL}{words}-bwd", runs=1)
    assert line.verdict is Verdict.PASS, line.message


@pytest.mark.sampled(every=2, each="quantiser")
@pytest.mark.parametrize(("layer", "quantiser"), [
    *((Fp8Training, one) for one in (
        subjects.TensorScale, subjects.WrongAxis, subjects.NeighbouringScale, subjects.GradientInBf16,
        subjects.WeightGradientInBf16, subjects.E5m2Gradient, subjects.ScaleForgotten, subjects.WeightNotRoundedAnew)),
    # A power of two shared by too many moves next to no border: such scales do not show.
    *((PowersOfTwo, one) for one in (
        subjects.NeighbouringScale, subjects.GradientInBf16, subjects.E5m2Gradient, subjects.ScaleForgotten)),
])
def test_mistakes_fail_at_their_product(quantiser: type[subjects.Quantiser], layer: type[Products]) -> None:
    """In fp32, where errors are so small that next to no code may be another: by a factor of thousands."""
    # The first product of a gradient that takes w2 makes grad_act, of which grad_w13 is the first to be seen.
    stage = Stage.GRAD_W13 if quantiser is subjects.WeightNotRoundedAnew else Stage.GRAD_W2
    line = verdict(mistaken(quantiser, layer), f"{SMALL}.E6.K3-fp32-norm-bwd")
    assert (line.verdict, line.first_stage) == (Verdict.MISMATCH, stage), line.message
    assert max(float(one.ratio) for one in line.stages or [] if one.stage == stage) > 1000


def test_scales_over_all_ranks_are_seen() -> None:
    """Each rank's rows are those that it holds: here columns of the activation have the scales of another rank's."""
    line = verdict(mistaken(subjects.OverRanks), f"{SMALL}.E6.K3-fp32-norm-tp2-bwd")
    assert (line.verdict, line.first_stage) == (Verdict.MISMATCH, Stage.GRAD_W2), line.message
    assert verdict(mistaken(subjects.OverRanks), f"{SMALL}.E6.K3-fp32-norm-bwd").verdict is Verdict.PASS


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("quantiser", [subjects.GradientInBf16, subjects.E5m2Gradient, subjects.WrongAxis,
                                       subjects.TensorScale])
def test_mistakes_in_bf16(quantiser: type[subjects.Quantiser]) -> None:
    """Rows in bf16 may lie on either side of a border now and then; what quantisers do wrong is still more."""
    line = verdict(mistaken(quantiser), f"{SMALL}.E6.K3-bf16-norm-bwd")
    assert (line.verdict, line.first_stage) == (Verdict.MISMATCH, Stage.GRAD_W2), line.message


@pytest.mark.parametrize(("layer", "declared"), [(Fp8Training, Separately), (Separately, Fp8Training)])
def test_rows_of_gate_and_up_are_declared(layer: type[Products], declared: type[Products]) -> None:
    """One row of both has one scale, two have two: only the gradient of the tokens is made of it."""
    quiet = layer()
    quiet.CAPABILITIES = declared().CAPABILITIES
    line = judged(quiet, f"{SMALL}.E6.K3-fp32-norm-bwd", runs=1)
    assert (line.verdict, line.first_stage) == (Verdict.MISMATCH, Stage.GRAD_X), line.message


def test_where_a_weight_joins_is_declared() -> None:
    """A column of weighted gradients has another scale than one of gradients."""
    class Quiet(subjects.Hidden):
        def expert_rows(self, *arguments: Any) -> Any:
            return OnActivation.expert_rows(self, *arguments)  # type: ignore[arg-type]

    line = judged(Quiet(), f"{SMALL}.E6.K3-fp32-norm-bwd", runs=1)
    assert (line.verdict, line.first_stage) == (Verdict.MISMATCH, Stage.GRAD_W2), line.message


def test_a_layer_in_bf16_is_no_layer_in_8_bits() -> None:
    """And the other way round: forward and backward."""
    plain, rounding = subjects.Rounded(), Fp8Training()
    plain.CAPABILITIES, rounding.CAPABILITIES = rounding.CAPABILITIES, plain.CAPABILITIES
    for one in (plain, rounding):
        assert judged(one, f"{SMALL}.E6.K3-bf16-norm-bwd", runs=1).verdict is Verdict.MISMATCH


@pytest.mark.parametrize("products", ["mxfp8", "fp8_block"])
def test_gradients_of_blocks_are_refused(products: Any) -> None:
    """Blocks along the rows of an expert depend on their order, which no contract fixes."""
    layer = Fp8Training()
    numerics = replace(rounded(Dtype.BF16), products=products)
    layer.CAPABILITIES = replace(layer.CAPABILITIES, numerics={Dtype.BF16: numerics})
    line = judged(layer, f"{SMALL}.E6.K3-bf16-norm-bwd", runs=1)
    assert line.reason == "not declared: gradients with operands in e4m3"


@pytest.mark.parametrize("products", ["fp8_row", "fp8_row_e8m0"])
def test_rows_with_errors_become_what_is_predicted(products: str) -> None:
    """Whatever the size of an error, next to the distance of e4m3's numbers: none beyond its bound, and the mean square
    within a factor of what is predicted."""
    rule, generator = RULES[products], torch.Generator().manual_seed(3)
    value = torch.randn(256, 48, generator=generator, dtype=torch.float64)
    for size in (1e-4, 1e-3, 0.02, 0.2):
        sigma = size * value.abs()
        error = torch.randn(value.shape, generator=generator, dtype=torch.float64).clamp(-4, 4) * sigma
        got = rounded_rows(Rows(value, 4 * sigma, sigma.square()), rule, scale_apart=True)
        off = (rounded_operand(value + error, rule) - got.value).abs()
        assert got.variance is not None
        assert bool((off <= got.bound).all())
        assert 0.1 < float(off.square().mean() / got.variance.mean()) < 1.05


def test_a_row_of_zeros_stays_small() -> None:
    """What an error makes of it is as small as the error, though its scale is another one altogether."""
    zeros = torch.zeros(1, 4, dtype=torch.float64)
    got = rounded_rows(Rows(zeros, zeros + 1e-3, zeros + 1e-6), RULES["fp8_row"], scale_apart=True)
    assert float(got.bound.max()) < 1.1e-3
    assert got.variance is not None
    assert float(got.variance.min()) > 1e-7
    assert not rounded_rows(exact(zeros), RULES["fp8_row"]).bound.any()


def rounded_to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Rows under one scale each, in fp64, on torch's own e4m3."""
    scale = (values.abs().amax(-1, keepdim=True) / 448).float()
    return (values.float() / scale).to(torch.float8_e4m3fn).double() * scale.double()


@pytest.mark.parametrize("by_output", [False, True])
def test_ranks_round_what_they_hold(by_output: bool) -> None:
    """The wanted values by hand: two ranks share an expert by columns of its activation, or by outputs of w2 too."""
    q, generator = rounded_to_e4m3, torch.Generator().manual_seed(11)
    x, grad, w13, w2, weight = (torch.randn(*shape, generator=generator).double() for shape in (
        (5, 6), (5, 6), (2, 8, 6), (6, 8), (5, 1)))
    columns, outputs = ((0, 5), (5, 8)), (((0, 2), (2, 6)) if by_output else ((0, 6), (0, 6)))
    inner = ((0, 8), (0, 8)) if by_output else columns
    cuts = [Cut(*one) for one in zip(columns, inner, outputs, strict=True)]
    spec = MoESpec(hidden_size=6, intermediate_size=8, router=Router(num_experts=2, top_k=1))
    numerics = Numerics(storage={Stage.ACT: Format.FP32, Stage.DOWN: Format.FP32}, products="fp8_row")
    back = BackwardSteps(Steps(spec, numerics, RoundingModel(load_tolerances(), "cpu", Format.FP32)), Format.FP32)
    found = MLPBackward(back, ExpertWeights(w13, w2, None, None), spec.experts, cuts).run(
        MLPRows.routed(back, x, grad, exact(weight)))

    gate, up = (q(x) @ q(one).T for one in w13)
    act, grad_down = torch.nn.functional.silu(gate) * up, weight * grad
    held = [slice(*one) for one in set(outputs)]
    grad_act = sum(q(grad_down[:, one]) @ q(w2[one].T).T for one in held)
    sigmoid = torch.sigmoid(gate)
    grad_gate_up = [grad_act * up * sigmoid * (1 + gate * (1 - sigmoid)), grad_act * act / up]
    wanted = [torch.stack([q(one.T) @ q(x.T).T for one in grad_gate_up]), q(grad_down.T) @ q(act.T).T]
    for got, want in zip(found.parameters[:2], wanted, strict=True):
        assert got is not None
        assert torch.allclose(got.value, want, rtol=1e-5, atol=1e-5)
    for part, cut in zip(found.parts, cuts, strict=True):
        rows = torch.cat([one[:, slice(*cut.columns)] for one in grad_gate_up], 1)
        of_rank = w13[:, slice(*cut.columns)].flatten(0, 1)
        assert torch.allclose(part.x[0].value, q(rows) @ q(of_rank.T).T, rtol=1e-5, atol=1e-5)
        down = q(act[:, slice(*cut.inner)]) @ q(w2[slice(*cut.outputs), slice(*cut.inner)]).T
        assert part.weights is not None
        assert torch.allclose(part.weights.value, (grad[:, slice(*cut.outputs)] * down).sum(1, keepdim=True), rtol=1e-5,
                              atol=1e-5)


def study(seeds: int) -> None:
    """Largest error over what is allowed, by dtype and gradient: the table in docs/backward.md."""
    layers = (Fp8Training, Separately, PowersOfTwo, subjects.Throughout, subjects.Last, subjects.Hidden, OnActivation)
    cases = [SMALL + words for words in (
        ".E6.K3-fp32-norm-tp2", ".E6.K3-bf16-norm-mlpbias-sh19-shgate-tp3", ".E6.K3-bf16-norm-outlier",
        ".E6.K3-fp16-norm-zipf-large-tp2", ".E6.K3-fp32-sigmoid-norm-sh19-weightinput-empty",
        ".E6.K3-bf16-norm-relu-tp2")] + [f"{WIDER}.E4.K2-bf16-norm-tp2"]
    worst, number, not_run = defaultdict(float), 0, 0
    for seed in range(seeds):
        for place, words in enumerate(cases):
            case = parse_case(f"{words}-bwd")
            case = replace(case, problem=replace(case.problem, seed=seed))
            line = judged(layers[(seed + place) % len(layers)](), format_case(case), runs=1)
            number, not_run = number + 1, not_run + (line.verdict is Verdict.NOT_RUN)
            assert line.verdict in (Verdict.PASS, Verdict.NOT_RUN), f"{format_case(case)}: {line.message}"
            for one in line.stages or []:
                key = (case.problem.dtype, one.stage)
                worst[key] = max(worst[key], float(one.ratio))
    print(f"{number} runs, {not_run} without power")
    for (dtype, stage), ratio in sorted(worst.items()):
        if stage.startswith("grad_"):
            print(f"| {stage} | {dtype} | {ratio:.2f} |")


if __name__ == "__main__":
    study(int(sys.argv[1]) if len(sys.argv) > 1 else 35)
