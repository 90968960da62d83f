"""Protects the set-up cases: an adapter's mistake is named as one, a kernel's never is, and right layers pass.

The adapters here call a library of plain torch, as one that somebody would write: w13 as (E, H, 2 I), w2 as (E, I, H).
"""

import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import gelu, silu

from moe_ref.adapters.experts_layer import ExpertsCall, ExpertsLayer
from moe_ref.adapters.torch_grouped import GROUPED_MM
from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.collectives import enter
from moe_ref.contract.features import Feature
from moe_ref.contract.vocabulary import Direction, Dtype, Stage
from moe_ref.records.schema import Implementation
from moe_ref.setup_cases.ladder import SetupResult, run_setup
from moe_ref.tolerances.contracts import contract
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.run.case_runner import RunSettings
from moe_ref.verify.run.in_process import InProcess
from tests.command_line import command
from tests.documents import layer
from tests.subjects import gradients, right, wrong

CAPABILITIES = Capabilities(
    name="library", version="1", numerics={dtype: contract("stored_rows", dtype) for dtype in Dtype},
    stages=(Stage.IDS, Stage.WEIGHTS, Stage.MERGED), scores=("softmax", "sigmoid"), activations=("silu", "gelu"),
    features=(Feature.RESIDUAL, Feature.MLP_BIAS), directions=tuple(Direction), max_tp=8, injected_routing=True,
    collectives_through_groups=True)


def library(x_TH: torch.Tensor, w13_EHN: torch.Tensor, w2_EIH: torch.Tensor, weights_TK: torch.Tensor,
            ids_TK: torch.Tensor, w13_bias_EN: torch.Tensor | None = None, w2_bias_EH: torch.Tensor | None = None, *,
            activation: str = "silu", interleaved: bool = False) -> torch.Tensor:
    """Gate columns first, or gate and up columns in turn; the weight on an expert's output."""
    y_TH, act = x_TH.new_zeros(x_TH.shape).float(), {"silu": silu, "gelu": gelu}[activation]
    for e in range(len(w13_EHN)):
        token_R, slot_R = (ids_TK == e).nonzero(as_tuple=True)
        rows_RN = x_TH[token_R].float() @ w13_EHN[e].float()
        rows_RN = rows_RN if w13_bias_EN is None else rows_RN + w13_bias_EN[e].float()
        gate_RI, up_RI = (rows_RN[:, 0::2], rows_RN[:, 1::2]) if interleaved else rows_RN.chunk(2, 1)
        down_RH = (act(gate_RI) * up_RI).to(x_TH.dtype).float() @ w2_EIH[e].float()
        down_RH = down_RH if w2_bias_EH is None else down_RH + w2_bias_EH[e].float()
        down_RH = (down_RH * weights_TK[token_R, slot_R, None]).to(x_TH.dtype)
        y_TH = y_TH.index_add(0, token_R, down_RH.float())
    return y_TH.to(x_TH.dtype)


def adapted(call: ExpertsCall, **changed: Any) -> torch.Tensor:
    """The right adapter of the library, with what a mistaken one hands over instead."""
    weights = call.weights
    handed = {"x_TH": call.x_TH, "w13_EHN": weights.w13_EGIH.flatten(1, 2).transpose(1, 2),
              "w2_EIH": weights.w2_EHI.transpose(1, 2), "weights_TK": call.weights_TK, "ids_TK": call.ids_TK,
              "activation": call.spec.experts.activation}
    if weights.w13_bias_EGI is not None and weights.w2_bias_EH is not None:
        handed |= {"w13_bias_EN": weights.w13_bias_EGI.flatten(1), "w2_bias_EH": weights.w2_bias_EH}
    return library(**handed | changed)


class Adapter(ExpertsLayer):
    """Of w2's bias, which every rank holds, one rank hands over its own."""

    def moe(self, x_TH: torch.Tensor, weights: Any, spec: Any, parallel: Any = None, groups: Any = None,
            **others: Any) -> torch.Tensor:
        if groups is not None and groups.tp.size > 1 and weights.w2_bias_EH is not None:
            bias_EH = enter(weights.w2_bias_EH, groups.tp) * float(groups.tp.rank == 0)
            weights = replace(weights, w2_bias_EH=bias_EH)
        return super().moe(x_TH, weights, spec, parallel, groups, **others)


def set_up(subject: Any) -> SetupResult:
    """The whole ladder in this process."""
    declared = subject.CAPABILITIES
    settings = RunSettings(run="test", implementation=Implementation(name=declared.name, version="1"),
                           capabilities=declared, tolerances=load_tolerances(), device="cpu")
    return run_setup(settings, InProcess(subject))


def swapped(call: ExpertsCall) -> torch.Tensor:
    return adapted(call, w13_EHN=call.weights.w13_EGIH.flip(1).flatten(1, 2).transpose(1, 2))


def alternating(call: ExpertsCall) -> torch.Tensor:
    return adapted(call, w13_EHN=call.weights.w13_EGIH.transpose(1, 2).flatten(1, 2).transpose(1, 2))


def viewed(tensor_EAB: torch.Tensor) -> torch.Tensor:
    """(E, A, B) read as (E, B, A), as `view` does it."""
    return tensor_EAB.contiguous().view(tensor_EAB.shape[0], tensor_EAB.shape[2], tensor_EAB.shape[1])


def rolled(call: ExpertsCall, order: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    weights = call.weights
    return adapted(call, w13_EHN=order(weights.w13_EGIH).flatten(1, 2).transpose(1, 2),
                   w2_EIH=order(weights.w2_EHI).transpose(1, 2))


def weighted_tokens(call: ExpertsCall) -> torch.Tensor:
    """Llama 4's place for the weight: on the expert's input."""
    top_k = call.ids_TK.shape[1]
    rows_RH = (call.x_TH[:, None] * call.weights_TK[..., None]).flatten(0, 1).to(call.x_TH.dtype)
    rows_RH = adapted(call, x_TH=rows_RH, ids_TK=call.ids_TK.reshape(-1, 1),
                      weights_TK=torch.ones_like(call.weights_TK).reshape(-1, 1))
    return rows_RH.unflatten(0, (-1, top_k)).sum(1)


MISTAKEN_CALLS: dict[str, tuple[Callable[[ExpertsCall], torch.Tensor], str, str]] = {
    "gate and up exchanged": (swapped, "gate and up", "gate and up exchanged"),
    "rows in turn for halves": (alternating, "gate and up", "handed as alternating gate and up rows (gate first)"),
    "halves for rows in turn": (lambda call: adapted(call, interleaved=True), "gate and up",
                                "read as alternating gate and up rows (gate first)"),
    "w13 not transposed": (lambda call: adapted(call, w13_EHN=call.weights.w13_EGIH.flatten(1, 2)), "shape",
                           "w13 handed as (out, in) where (in, out) is read"),
    "w13 by a view": (lambda call: adapted(call, w13_EHN=viewed(call.weights.w13_EGIH.flatten(1, 2))), "gate and up",
                      "w13 handed as (out, in) where (in, out) is read"),  # H = 2 I, where a view is the transpose
    "w2 not transposed": (lambda call: adapted(call, w2_EIH=call.weights.w2_EHI), "shape",
                          "w2 handed as (out, in) where (in, out) is read"),
    "w2 by a view": (lambda call: adapted(call, w2_EIH=viewed(call.weights.w2_EHI)), "gate and up",
                     "w2 handed as (out, in) where (in, out) is read, or the other way round, by a view"),
    "both by a view": (lambda call: adapted(call, w2_EIH=viewed(call.weights.w2_EHI),
                                            w13_EHN=viewed(call.weights.w13_EGIH.flatten(1, 2))), "gate and up",
                       "or the other way round; w2 handed as (out, in)"),
    "experts reversed": (lambda call: rolled(call, lambda tensor: tensor.flip(0)), "gate and up",
                         "adapter: experts in another order, (3, 2, 1, 0) for 0, 1, ..., which"),
    "experts one off": (lambda call: adapted(call, ids_TK=(call.ids_TK + 1) % call.spec.num_experts), "gate and up",
                        "adapter: experts in another order, (1, 2, 3, 0) for 0, 1, ..., which"),
    "weights not applied": (lambda call: adapted(call, weights_TK=torch.ones_like(call.weights_TK)),
                            "routing weights", "routing weight not applied"),
    "weights twice": (lambda call: adapted(call, weights_TK=call.weights_TK**2), "routing weights",
                      "routing weight applied twice"),
    "weights on the input": (weighted_tokens, "routing weights", "routing weight on the expert's input"),
    "weights of the other slot": (lambda call: adapted(call, weights_TK=call.weights_TK.flip(1)), "routing weights",
                                  "routing weights in the reverse order of their ids"),
    "activation not handed on": (lambda call: adapted(call, activation="silu"), "options", "silu for the activation"),
    "biases not handed on": (lambda call: adapted(call, w13_bias_EN=None), "options", "bias of gate and up left out"),
    "bias of w2 not handed on": (lambda call: adapted(call, w2_bias_EH=None), "options", "bias of w2 left out"),
}
"""Where the ladder stops and what it says: experts one off show at the first number that is asked for."""


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("name", MISTAKEN_CALLS)
def test_mistakes_of_a_call_are_named(name: str) -> None:
    """Each is the adapter's, explains all of what differs, and ends the steps that stand on it."""
    experts, step, words = MISTAKEN_CALLS[name]
    failure = set_up(Adapter(CAPABILITIES, experts)).failure
    assert failure is not None
    assert (failure.name, words in failure.words, "adapter: " in failure.words) == (step, True, True), failure.words
    assert failure.explained is not None
    assert failure.explained.share > 0.999
    assert failure.explained.left < 1


class Mistaken(Adapter):
    """The right function of experts inside a layer whose `moe` is mistaken: variants override `asked`."""

    def moe(self, x_TH: torch.Tensor, weights: Any, spec: Any, parallel: Any = None, groups: Any = None,
            **others: Any) -> torch.Tensor:
        return super().moe(x_TH, *self.asked(weights, spec), parallel, self.ranks(groups), **self.words(others))

    def asked(self, weights: Any, spec: Any) -> tuple[Any, Any]:
        return weights, spec

    def ranks(self, groups: Any) -> Any:
        return groups

    def words(self, others: dict[str, Any]) -> dict[str, Any]:
        return others


class LogitsIgnored(Mistaken):
    def words(self, others: dict[str, Any]) -> dict[str, Any]:
        return others | {"logits_TE": None}


class NeverRenormalises(Mistaken):
    def asked(self, weights: Any, spec: Any) -> tuple[Any, Any]:
        return weights, replace(spec, router=replace(spec.router, renormalize=False))


class AlwaysRenormalises(Mistaken):
    """A softmax over the chosen experts."""

    def asked(self, weights: Any, spec: Any) -> tuple[Any, Any]:
        return weights, replace(spec, router=replace(spec.router, renormalize=True))


class RouterByView(Mistaken):
    def asked(self, weights: Any, spec: Any) -> tuple[Any, Any]:
        return replace(weights, router_EH=viewed(weights.router_EH[None])[0].T), spec


class ResidualTwice(Mistaken):
    def words(self, others: dict[str, Any]) -> dict[str, Any]:
        residual_TH = others.get("residual_TH")
        return others if residual_TH is None else others | {"residual_TH": 2 * residual_TH}


class NoAllReduce(Mistaken):
    """Shards are whole to a layer that is told of no ranks."""

    def ranks(self, groups: Any) -> Any:
        return None


# The one token of the steps before goes to the same expert by its own logits.
LAYERS: dict[type[Mistaken], tuple[str, str]] = {
    LogitsIgnored: ("experts", "logits_TE ignored"),
    NeverRenormalises: ("routing weights", "renormalised: adapter: B16 weights not renormalised"),
    AlwaysRenormalises: ("routing weights", "softmax over the chosen alone"),
    RouterByView: ("router", "router handed as (out, in) where (in, out) is read"),
    ResidualTwice: ("options", "residual added 2 times"),
    NoAllReduce: ("two ranks", "sums of the ranks not added up"),
}


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("mistaken", LAYERS)
def test_mistakes_around_the_experts_are_named(mistaken: type[Mistaken]) -> None:
    step, words = LAYERS[mistaken]
    failure = set_up(mistaken(CAPABILITIES, adapted)).failure
    assert failure is not None
    assert (failure.name, words in failure.words, "adapter: " in failure.words) == (step, True, True), failure.words


def test_a_mistake_that_only_gradients_show() -> None:
    """Weights that are detached on their way: the contract wants zeros or more, never None."""
    failure = set_up(Adapter(CAPABILITIES, lambda call: adapted(
        call, w2_EIH=call.weights.w2_EHI.detach().transpose(1, 2)))).failure
    assert failure is not None
    assert failure.name == "gradients"
    assert "adapter: struct: grad_w2: None, but should be a gradient" in failure.words


@pytest.mark.parametrize(("back", "words"), [
    (lambda y_TH: (y_TH, None), "adapter: "), (lambda y_TH: y_TH.double(), "float64"),
    (lambda y_TH: y_TH[None], "(1, 1, 32)")])
def test_what_is_no_output_stops_the_ladder_first(back: Callable, words: str) -> None:
    result = set_up(Adapter(CAPABILITIES, lambda call: back(adapted(call))))
    assert result.failure is not None
    assert result.failure.name == "shape"
    assert words in result.failure.words
    assert {step.outcome for step in result.steps[2:]} == {"not tried"}


def documented() -> SimpleNamespace:
    """The layer of docs/plugging_in.md, which is this repository's own text."""
    names: dict[str, Any] = {}
    exec(compile(layer(), "mypkg/layer.py", "exec"), names)
    return SimpleNamespace(moe=names["moe"], CAPABILITIES=names["CAPABILITIES"])


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("subject", [Adapter(CAPABILITIES, adapted), GROUPED_MM, documented(), right.round_each_stage,
                                     gradients.rounded])
def test_right_layers_pass(subject: Any) -> None:
    """Every step that they declare."""
    result = set_up(subject)
    assert result.failure is None
    assert [(step.name, step.words) for step in result.steps if step.outcome not in ("pass", "not declared")] == []
    assert result.num_passed >= 9


def lost_tile(call: ExpertsCall) -> torch.Tensor:
    """The last 16 rows of w2, as a kernel loses them that has no mask."""
    kept_EIH = call.weights.w2_EHI.transpose(1, 2).clone()
    kept_EIH[:, -16:] = 0
    return adapted(call, w2_EIH=kept_EIH)


WIDER = Adapter(replace(CAPABILITIES, hidden_multiple=32, intermediate_multiple=32), lost_tile)


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("subject", [
    wrong.TruncatingStore(), wrong.BF16Accumulation(), wrong.StrideWraps(), wrong.ColumnsSwapped(),
    wrong.LastBlockOfKDropped(), wrong.UninitialisedTail(), wrong.NeighbourExpert(), WIDER],
    ids=lambda one: type(one).__name__)
def test_mistakes_of_a_kernel_are_not_called_an_adapters(subject: Any) -> None:
    """Either no tiny layer shows it, or no mapping explains it."""
    failure = set_up(subject).failure
    assert failure is None or "no mapping mistake explains it" in failure.words, failure and failure.words


def test_a_lost_tile_is_seen_and_named() -> None:
    failure = set_up(WIDER).failure
    assert failure is not None
    assert "a kernel's does: last 16 columns of K left out of the down product" in failure.words


def test_a_stage_that_is_shown_wrongly_is_the_adapters() -> None:
    """The output is right; what is called `weights` is not what the experts were handed."""
    class ShowsOther(ExpertsLayer):
        def moe(self, *arguments: Any, **words: Any) -> torch.Tensor:
            trace = words.pop("trace", None)
            y_TH = super().moe(*arguments, **words)
            if trace is not None:
                super().moe(*arguments, **words, trace=trace)
                trace.tensors[Stage.WEIGHTS] = trace.tensors[Stage.WEIGHTS] * 0.75
            return y_TH

    subject = ShowsOther(GROUPED_MM.CAPABILITIES, GROUPED_MM.experts)
    failure = set_up(subject).failure
    assert failure is not None
    assert failure.words.startswith("adapter: the output is right, but weights at")


def test_two_things_wrong_at_once_are_both_said() -> None:
    """A stage that is not declared, and experts in reverse."""
    subject = ExpertsLayer(replace(CAPABILITIES, stages=()), lambda call: rolled(call, lambda one: one.flip(0)))
    failure = set_up(subject).failure
    assert failure is not None
    assert failure.words.startswith("adapter: struct: rank 0 shows ids, weights, merged, but should not")
    assert "; beside it, experts in another order" in failure.words


def test_nothing_to_ask_for_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("setup", "nosuch") == 2
    assert "setup 1 fails (loads): unknown implementation 'nosuch'" in capsys.readouterr().err


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize(("name", "code"), [("torch.grouped_mm", 0), ("tests.subjects.wrong:gate_up_swapped", 1)])
def test_the_verb(name: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Its document says what its text says, in a child process."""
    assert command("setup", name, "--json") == code
    document = json.loads(capsys.readouterr().out)
    assert document["exit_code"] == code
    assert document["fails"] == (3 if code else None)
    failing = [step for step in document["steps"] if step["outcome"] == "fail"]
    assert [step["mistake"]["whose"] for step in failing] == ["adapter"] * code
