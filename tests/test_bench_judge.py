"""Protects the comparison before the clock: right layers pass at the shape that is timed, wrong ones do not."""

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import moe_fast
import moe_ref
from moe_ref.bench import torch_layers
from moe_ref.bench.judge import Judge
from moe_ref.bench.problem import Batch, Operation, RankLayer, draw_batch, draw_probes, draw_weights, rank_layer
from moe_ref.bench.subjects import Subject
from moe_ref.contract.errors import UsageTypeError, UsageValueError
from moe_ref.contract.vocabulary import Dtype, Verdict
from moe_ref.contract.weights import MoEWeights
from tests.in_process import judged

TOKENS = 5
MODELS = ("olmoe.1b.7b.E4", "qwen1.5.moe.a2.7b.E4")
"""A plain softmax router, and a shared expert behind a sigmoid gate."""
ODD = {"command.a.plus.E4": 2048, "llama4.scout.E4": 512, "gptoss.20b.E4": 64, "inkling.E8": 64}
"""The mean of routed and shared, weights on the input, biases and clamps, shared experts that the router weighs."""


@cache
def prepared(model: str) -> tuple[RankLayer, MoEWeights, Batch, Judge]:
    """A layer of some tens of columns of I with its inputs and judge."""
    layer = rank_layer(model, ODD.get(model, 44 if "qwen" in model else 32), Dtype.BF16)
    weights = draw_weights(layer, "cpu")
    probes = draw_probes(layer, weights, "cpu")
    return layer, weights, draw_batch(layer, weights, probes, TOKENS, "cpu"), Judge(layer, weights, probes, "cpu")


def ratio(implementation: Any, model: str, operation: Operation,
          change: Callable[[Any], Any] = lambda result: result) -> float:
    """What the judge says of one call, its result perhaps changed."""
    layer, weights, batch, judge = prepared(model)
    subject = Subject("subject", implementation)
    result = change(subject.call(operation, layer, weights, batch)())
    return judge.ratio(operation, subject.numerics(layer), batch, result)


@pytest.mark.sampled(every=10)
@pytest.mark.parametrize("operation", list(Operation))
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("implementation", [torch_layers.loop, torch_layers.grouped, moe_fast],
                         ids=["loop", "grouped", "moe_fast"])
def test_right_layers_pass(implementation: Any, model: str, operation: Operation) -> None:
    """torch's two and the kernels, from tokens, for a given routing and backwards."""
    assert 0 < ratio(implementation, model, operation) <= 1


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize("operation", list(Operation))
@pytest.mark.parametrize("model", list(ODD))
def test_the_oracle_passes_on_every_kind_of_layer(model: str, operation: Operation) -> None:
    """Whatever a specification may ask for has its truth, so that an implementation of it can be timed."""
    assert 0 < ratio(moe_ref, model, operation) <= 1


def spoiled(name: str, place: tuple[int | slice, ...], factor: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    """Multiplies a part of one gradient."""
    def change(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        changed = gradients[name].clone()
        changed[place] *= factor
        return gradients | {name: changed}
    return change


@pytest.mark.parametrize(("operation", "change"), [
    (Operation.EXPERTS, lambda y_TH: 0 * y_TH), (Operation.EXPERTS, lambda y_TH: 1.05 * y_TH),
    (Operation.EXPERTS, lambda y_TH: y_TH.roll(1, dims=1)), (Operation.LAYER, lambda y_TH: y_TH / 2),
    (Operation.EXPERTS, lambda y_TH: y_TH[1:]), (Operation.EXPERTS, lambda y_TH: y_TH * torch.nan),
    (Operation.BACKWARD, spoiled("x_TH", (0,), 0.5)), (Operation.BACKWARD, spoiled("weights_TK", (0,), 0.0)),
    (Operation.BACKWARD, spoiled("w13_EGIH", (slice(None), 1), 0.0)),
    (Operation.BACKWARD, spoiled("w2_EHI", (slice(None), slice(None), -1), 0.5))])
def test_wrong_results_are_seen(operation: Operation, change: Callable[[Any], Any]) -> None:
    """Zeros, a factor, columns or rows in another place, NaN, and each of the gradients by itself."""
    assert ratio(torch_layers.loop, MODELS[0], operation, change) > 1


def test_a_routing_that_is_not_the_given_one_is_seen() -> None:
    """A layer that goes on with its own choice, or forgets the weights, computes something else."""
    def own(x_TH: torch.Tensor, weights: MoEWeights, spec: Any, routing: Any = None) -> torch.Tensor:
        equal = torch.full_like(routing.weights_TK, 1 / spec.top_k)
        return torch_layers.loop.moe(x_TH, weights, spec, routing=type(routing)(routing.ids_TK, equal))
    wrong = SimpleNamespace(moe=own, CAPABILITIES=torch_layers.loop.CAPABILITIES)
    assert ratio(wrong, MODELS[0], Operation.EXPERTS) > 1


@pytest.mark.sampled(every=10)
@pytest.mark.parametrize("case", [
    "v1-T21.H48.I40.E8.K2-bf16-norm", "v1-T21.H48.I40.E8.K2-fp32-norm-bwd", "v1-T21.H48.I40.E8.K2-bf16-norm-bwd",
    "v1-T21.H48.I40.E8.K4-bf16-sigmoid-norm-eps1em20-bias-g4.2-top2sum-scale2.5-sh24-zipf",
    "v1-T21.H48.I40.E8.K3-fp16-norm-sh24-shgate-res", "v1-T21.H48.I40.E8.K2-bf16-norm-gelutanh"])
@pytest.mark.parametrize("implementation", [torch_layers.loop, torch_layers.grouped], ids=["loop", "grouped"])
def test_torch_layers_pass_the_harness(implementation: Any, case: str) -> None:
    """They are implementations like any other: routers, shared experts, residual and gradients are judged in full."""
    line = judged(implementation, case, runs=1)
    assert line.verdict == Verdict.PASS, line.message


def test_grouped_mm_says_what_it_cannot() -> None:
    """Rows that are no multiple of 16 bytes are refused with the number, before torch raises."""
    layer, weights, batch, _ = prepared(MODELS[0])
    odd = rank_layer(MODELS[0], 200, Dtype.BF16)
    with pytest.raises(UsageValueError, match="intermediate_size=6 of 2 bytes, but should be a multiple of 16 bytes"):
        torch_layers.grouped.moe(batch.x_TH, draw_weights(odd, "cpu"), odd.spec)
    with pytest.raises(UsageValueError, match="x_TH: shape"):
        torch_layers.loop.moe(batch.x_TH[:, 1:], weights, layer.spec)
    with pytest.raises(UsageTypeError, match=r"dtype torch\.float64"):
        torch_layers.loop.moe(batch.x_TH.double(), weights, layer.spec)
