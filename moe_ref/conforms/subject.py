"""A maintainer's function as an implementation: a whole layer, or the experts of one."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from moe_ref.adapters.experts_layer import ExpertsCall, ExpertsLayer
from moe_ref.adapters.routed import SCORES
from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.errors import raise_faults
from moe_ref.contract.features import features_of
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.router_spec import Router
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Direction, Dtype, Format, Stage, Storage

Takes = Literal["experts", "layer"]

MOST_ALIGNED = 128
"""Sizes of the set-up cases are as aligned as those of the spec, up to here."""


@dataclass(frozen=True)
class Layer:
    """A whole layer with the contract's signature, and what is declared for it."""

    CAPABILITIES: Capabilities
    function: Callable[..., torch.Tensor]

    def moe(self, *arguments: Any, trace: Trace | None = None, **words: Any) -> torch.Tensor:
        """The function's own result; it is handed a trace where stages of it are declared."""
        declared = self.CAPABILITIES.stages
        given = {"trace": DeclaredTrace(trace, declared) if trace is not None else None} if declared else {}
        return self.function(*arguments, **words, **given)


class DeclaredTrace(Trace):
    """Keeps what is declared, in another trace, and lets the rest pass."""

    def __init__(self, inner: Trace, stages: tuple[Stage, ...]) -> None:
        super().__init__(inner.tensors)
        self.stages = stages

    def record(self, stage: Stage, tensor: torch.Tensor) -> None:
        if stage in self.stages:
            super().record(stage, tensor)


def aligned(size: int) -> int:
    """The largest power of two, up to MOST_ALIGNED, that divides a size; 1 of a rank that has no columns."""
    return max(1, min(size & -size, MOST_ALIGNED))


def name_of(function: Callable) -> str:
    """As module:function, for messages and the record."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", type(function).__name__)
    return f"{module or '?'}:{name}"


def spec_of_experts(spec: MoESpec) -> MoESpec:
    """What of a spec a function of experts computes: the routed experts under a plain router.

    Raises UsageValueError for a layer without a router, or with its weights on the input.
    """
    faults = ["a layer without a router has no routing to hand to a function of experts"] * (spec.router is None)
    faults += ["weight_on='input', but a function of experts is handed weights of its output"
               ] * (spec.weight_on == "input")
    raise_faults("assert_conforms", [f"{one}; give takes='layer'" for one in faults])
    router = spec.router
    assert router is not None
    plain = Router(num_experts=router.num_experts, top_k=router.top_k, renormalize=router.renormalize,
                   score=router.score if router.score in SCORES else "softmax", scaling_factor=router.scaling_factor)
    return replace(spec, router=plain, shared=None, output_bias=False)


def subject_of(function: Callable, spec: MoESpec, takes: Takes, numerics: dict[Dtype, Numerics], tp: tuple[int, ...],
               directions: tuple[Direction, ...], stages: tuple[Stage, ...],
               deterministic: bool) -> ExpertsLayer | Layer:
    """What the harness judges; the function is asked for what the spec needs and nothing beyond."""
    if takes == "experts":
        stages = (Stage.IDS, Stage.WEIGHTS, Stage.MERGED)
        # The router is ours, whatever a contract of whole layers says of its own: its logits are in fp32.
        numerics = {dtype: replace(kind, storage={**kind.storage, Stage.LOGITS: Format.FP32})
                    for dtype, kind in numerics.items()}
    try:
        taken = inspect.signature(function).parameters
    except ValueError:
        # Of some compiled functions Python knows no parameters: they are asked for what the contract's moe takes.
        taken = inspect.signature(ExpertsLayer.moe).parameters
    any_keyword = takes == "experts" or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values())
    shared, widths = spec.shared, {stop - start for degree in tp for start, stop in
                                   Parallel(tp=degree).ranges(spec.intermediate_size)}
    capabilities = Capabilities(
        name=name_of(function), version="in process", numerics=numerics, features=tuple(sorted(features_of(spec))),
        stages=stages, storages=(Storage.OUT_IN, Storage.PADDED),
        activations=tuple(dict.fromkeys((spec.experts.activation, *([shared.mlp.activation] if shared else ())))),
        scores=(spec.router.score,) if spec.router else (),
        directions=tuple(dict.fromkeys((Direction.FORWARD, *directions))), max_tp=max(tp),
        deterministic=deterministic, collectives_through_groups=True,
        injected_routing=any_keyword or "routing" in taken, injected_logits=any_keyword or "logits_TE" in taken,
        hidden_multiple=aligned(spec.hidden_size), intermediate_multiple=min(map(aligned, widths)))
    if takes == "layer":
        return Layer(capabilities, function)
    return ExpertsLayer(capabilities, lambda call: _called(function, call))


def _called(function: Callable, call: ExpertsCall) -> torch.Tensor:
    """The field's call: gate rows before up rows in one w13_EFH; biases by keyword where experts have them."""
    weights, others = call.weights, {}
    if weights.w13_bias_EGI is not None and weights.w2_bias_EH is not None:
        others = {"w13_bias_EF": weights.w13_bias_EGI.flatten(1), "w2_bias_EH": weights.w2_bias_EH}
    return function(call.x_TH, weights.w13_EGIH.flatten(1, 2), weights.w2_EHI, call.weights_TK, call.ids_TK, **others)
