"""Mistakes in the mathematics, made on our side: each must show against the block that does not make it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import moe_ref
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.weights import MoEWeights
from moe_ref.oracle.router import router_logits, score
from tests.third_party.blocks import Run
from tests.third_party.compare import Forward, compare_forward
from tests.third_party.families import FAMILIES

Change = Callable[[MoESpec, MoEWeights], tuple[MoESpec, MoEWeights]]
ChangeRouting = Callable[[torch.Tensor, MoESpec, MoEWeights, Routing], Routing]


@dataclass(frozen=True)
class Mistake:
    """What is wrong, of which family, and how: in spec and weights, or in the routing that the oracle finds."""

    title: str
    family: str
    change: Change
    routing: ChangeRouting | None = None


def in_router(**options: Any) -> Change:
    """Other options of the router."""
    return lambda spec, weights: (replace(spec, router=replace(spec.router, **options)), weights)  # type: ignore


def in_experts(**options: Any) -> Change:
    """Other options of the routed MLP."""
    return lambda spec, weights: (replace(spec, experts=replace(spec.experts, **options)), weights)


def in_shared(**options: Any) -> Change:
    """Other options of the shared expert."""
    return lambda spec, weights: (replace(spec, shared=replace(spec.shared, **options)), weights)  # type: ignore


def in_shared_mlp(**options: Any) -> Change:
    """Other options of the shared expert's MLP."""
    def change(spec: MoESpec, weights: MoEWeights) -> tuple[MoESpec, MoEWeights]:
        assert spec.shared is not None
        return replace(spec, shared=replace(spec.shared, mlp=replace(spec.shared.mlp, **options))), weights
    return change


def in_capacity(**options: Any) -> Change:
    """Other options of the capacity."""
    def change(spec: MoESpec, weights: MoEWeights) -> tuple[MoESpec, MoEWeights]:
        assert spec.router is not None
        assert spec.router.capacity is not None
        capacity = replace(spec.router.capacity, **options)
        return replace(spec, router=replace(spec.router, capacity=capacity)), weights
    return change


def without(*names: str, also: Change | None = None) -> Change:
    """Parameters gone, and the spec that does not ask for them."""
    def change(spec: MoESpec, weights: MoEWeights) -> tuple[MoESpec, MoEWeights]:
        spec, weights = also(spec, weights) if also else (spec, weights)
        return spec, replace(weights, **dict.fromkeys(names))
    return change


def of_layer(**options: Any) -> Change:
    """Other options of the layer."""
    return lambda spec, weights: (replace(spec, **options), weights)


def of_weights(**changes: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Parameters read wrongly."""
    return lambda spec, weights: (spec, replace(
        weights, **{name: change(getattr(weights, name)) for name, change in changes.items()}))


def same(spec: MoESpec, weights: MoEWeights) -> tuple[MoESpec, MoEWeights]:
    """Nothing in spec and weights."""
    return spec, weights


def leaking_bias(x_TH: torch.Tensor, spec: MoESpec, weights: MoEWeights, own: Routing) -> Routing:
    """The selection bias stays in the weights."""
    assert spec.router is not None
    assert weights.selection_bias_E is not None
    biased_TE = score(router_logits(x_TH, weights), spec.router) + weights.selection_bias_E.double()
    weights_TK = biased_TE.gather(1, own.ids_TK)
    return replace(own, weights_TK=weights_TK / weights_TK.sum(-1, keepdim=True) * spec.router.scaling_factor)


def unscaled_shared(x_TH: torch.Tensor, spec: MoESpec, weights: MoEWeights, own: Routing) -> Routing:
    """Shared experts without the scale of the routed ones."""
    assert spec.router is not None
    assert own.shared_TS is not None
    return replace(own, shared_TS=own.shared_TS / spec.router.scaling_factor)


SHARED = ("shared_w13_GIH", "shared_w2_HI")
EXPERT_BIASES = ("w13_bias_EGI", "w2_bias_EH")

MISTAKES = [
    Mistake("no renormalisation", "mixtral", in_router(renormalize=False)),
    Mistake("sigmoid for softmax", "mixtral", in_router(score="sigmoid")),
    Mistake("gate and up swapped", "mixtral", of_weights(w13_EGIH=lambda w13: w13.flip(1))),
    Mistake("gelu_tanh for silu", "mixtral", in_experts(activation="gelu_tanh")),
    Mistake("renormalised though it is not", "olmoe", in_router(renormalize=True)),
    Mistake("shared expert's gate dropped", "qwen2_moe", without("shared_gate_SH", also=in_shared(gate="none"))),
    Mistake("shared expert dropped", "deepseek_v3", without(*SHARED, also=of_layer(shared=None))),
    Mistake("selection bias dropped", "deepseek_v3",
            without("selection_bias_E", also=in_router(selection_bias=None))),
    Mistake("selection bias in the weights", "deepseek_v3", same, leaking_bias),
    Mistake("groups out filled with 0", "deepseek_v3", in_router(group_fill="zero")),
    Mistake("best of a group for its two best", "deepseek_v3", in_router(group_score="max")),
    Mistake("no groups", "deepseek_v3", in_router(num_groups=1, num_groups_kept=1)),
    Mistake("one group more", "deepseek_v3", in_router(num_groups_kept=3)),
    Mistake("scaling factor dropped", "deepseek_v3", in_router(scaling_factor=1.0)),
    Mistake("no renormalisation", "deepseek_v3", in_router(renormalize=False)),
    Mistake("epsilon 1e-20 dropped", "deepseek_v3", in_router(renormalize_epsilon=0.0)),
    Mistake("bias on the logits", "glm4_moe", in_router(selection_bias="logit")),
    Mistake("bias on the scores", "kolibri1", in_router(selection_bias="score")),
    Mistake("groups out filled with -inf", "axk2", in_router(group_fill="minus_inf")),
    Mistake("two best of a group for its best", "deepseek_v2", in_router(group_score="top2_sum")),
    Mistake("renormalised though it is not", "deepseek_v2", in_router(renormalize=True)),
    Mistake("epsilon 1e-6 dropped", "lfm2_moe", in_router(renormalize_epsilon=0.0)),
    Mistake("epsilon 1e-6 clamped at", "lfm2_moe", in_router(epsilon_rule="clamp")),
    Mistake("epsilon 1e-6 for 1e-20", "hy_v3", in_router(renormalize_epsilon=1e-6)),
    Mistake("epsilon 1e-12 added", "ernie4_5_moe", in_router(epsilon_rule="add")),
    Mistake("no softcap of logits", "laguna", in_router(logit_softcap=0.0)),
    Mistake("no scale of logits", "muse_spark", in_router(logit_scale=1.0)),
    Mistake("epsilon 1e-15 dropped", "muse_spark", in_router(renormalize_epsilon=0.0)),
    Mistake("sigmoid for sqrt(softplus)", "deepseek_v4", in_router(score="sigmoid")),
    Mistake("limit dropped", "deepseek_v4", in_experts(limit=None)),
    Mistake("shared expert's limit dropped", "glm5_next", in_shared_mlp(limit=None)),
    Mistake("shared expert clamped too", "hy_v4", in_shared_mlp(limit=1.0)),
    Mistake("limit before the activation", "step3p7", in_experts(limit_at="before")),
    Mistake("limit of the routed for the shared expert", "step3p7", in_shared_mlp(limit=1.0)),
    Mistake("limit after the activation", "gpt_oss", in_experts(limit_at="after")),
    Mistake("no limit", "gpt_oss", in_experts(limit=None)),
    Mistake("alpha 1 for 1.702", "gpt_oss", in_experts(sigmoid_scale=1.0)),
    Mistake("no offset of up", "gpt_oss", in_experts(up_offset=0.0)),
    Mistake("biases of experts dropped", "gpt_oss", without(*EXPERT_BIASES, also=in_experts(bias=False))),
    Mistake("down bias twice", "gpt_oss", of_weights(w2_bias_EH=lambda bias: 2 * bias)),
    Mistake("router bias dropped", "gpt_oss", without("router_bias_E", also=in_router(logit_bias=False))),
    Mistake("interleaved read as concatenated", "gpt_oss",
            of_weights(w13_EGIH=lambda w13: w13.transpose(1, 2).flatten(1, 2).unflatten(1, (2, -1)))),
    Mistake("gelu for gelu_tanh", "gemma4", in_experts(activation="gelu")),
    Mistake("scale per expert dropped", "gemma4", of_weights(weight_scale_E=torch.ones_like)),
    Mistake("relu for relu squared", "nemotron_h", in_experts(activation="relu")),
    Mistake("weight on the output", "llama4", of_layer(weight_on="output")),
    Mistake("sum for mean", "cohere2_moe", in_shared(merge="sum")),
    Mistake("output bias dropped", "jetmoe", without("output_bias_H", also=of_layer(output_bias=False))),
    Mistake("gate's softcap dropped", "inkling2", in_experts(gate_softcap=0.0)),
    Mistake("up's softcap dropped", "inkling2", in_experts(up_softcap=0.0)),
    Mistake("learned scale dropped", "inkling", of_weights(weight_scale_E=torch.ones_like)),
    Mistake("shared experts without the routed scale", "inkling", same, unscaled_shared),
    Mistake("bias of identity experts dropped", "longcat_flash",
            of_weights(selection_bias_E=lambda bias: torch.cat([bias[:-4], torch.zeros_like(bias[-4:])]))),
    Mistake("first and second choices in one row", "nllb_moe", in_capacity(priority="token")),
    Mistake("renormalised over what was selected", "nllb_moe", in_capacity(renormalize_after=False)),
    Mistake("renormalised over what is left", "nllb_moe_before", in_capacity(renormalize_after=True)),
    Mistake("no capacity", "switch_transformers", in_router(capacity=None)),
    Mistake("capacity over the whole batch", "switch_transformers", in_capacity(sequence_length=None)),
    Mistake("larger weights stay", "switch_transformers", in_capacity(priority="weight")),
]


def compare_mistaken(mistake: Mistake, x_TH: torch.Tensor, run: Run, weights: MoEWeights) -> Forward:
    """The fp32 comparison with the mistake on our side."""
    family = FAMILIES[mistake.family]
    spec, weights = mistake.change(family.spec, weights)
    own = None
    if mistake.routing is not None:
        own = mistake.routing(x_TH, spec, weights, moe_ref.route(x_TH, weights, spec, logits_TE=run.logits_TE))
    return compare_forward(x_TH, run, weights, family, spec, own)


def seen(forward: Forward) -> bool:
    """Whether any of the comparisons refuses."""
    refused = forward.choice is not None and bool(forward.choice.unexplained)
    return refused or any(ratio is not None and not ratio <= 1 for ratio in (forward.weights, forward.experts))
