"""What a layer asks of an implementation beyond a plain softmax router over gated experts. Imports no torch."""

from enum import StrEnum

from moe_ref.contract.spec import MLP, MoESpec, Router


class Feature(StrEnum):
    """Options of a spec by the words that a refusal uses; activations and scores are declared by name."""

    DENSE = "a layer without a router"
    LOGIT_BIAS = "a router bias"
    LOGIT_CAP = "a scale or cap of logits"
    GROUPS = "expert groups"
    GROUP_FILL_ZERO = "expert groups filled with 0"
    SELECTION_BIAS = "a selection bias"
    SELECTION_BIAS_ON_LOGITS = "a selection bias on logits"
    EPSILON_CLAMP = "a renormalisation clamped at epsilon"
    LEARNED_SCALE = "a learned scale of weights"
    ZERO_EXPERTS = "identity experts"
    CAPACITY = "a capacity"
    WEIGHT_ON_INPUT = "weights on the input"
    NOT_GATED = "experts without a gate"
    MLP_BIAS = "biases of experts"
    LIMIT = "clamped activations"
    SCALED_SWIGLU = "a scale inside silu, or an offset of up"
    SOFTCAP = "soft-capped activations"
    SHARED_EXPERT = "a shared expert"
    SHARED_ROUTER_GATE = "shared experts weighted by the router"
    SHARED_MEAN = "the mean of routed and shared experts"
    OUTPUT_BIAS = "a bias after the merge"
    RESIDUAL = "a residual"


def features_of(spec: MoESpec) -> frozenset[Feature]:
    """Every feature that `spec` needs; the residual is no part of a spec."""
    shared = spec.shared
    used = {Feature.DENSE: spec.router is None, Feature.WEIGHT_ON_INPUT: spec.weight_on == "input",
            Feature.OUTPUT_BIAS: spec.output_bias, Feature.SHARED_EXPERT: shared is not None,
            Feature.SHARED_ROUTER_GATE: shared is not None and shared.gate == "router",
            Feature.SHARED_MEAN: shared is not None and shared.merge == "mean"}
    if spec.router:
        used |= _router_features(spec.router)
    found = {feature for feature, is_used in used.items() if is_used}
    for mlp in [spec.experts] + ([shared.mlp] if shared else []):
        found |= {feature for feature, is_used in _mlp_features(mlp).items() if is_used}
    return frozenset(found)


RENORMALIZED = "renormalised weights"
NOT_RENORMALIZED = "weights that are not renormalised"
GATED_SHARED_EXPERT = "a shared expert with a sigmoid gate"
GPT_OSS_CLAMP = "the clamped SwiGLU of gpt-oss, limit 7 and scale 1.702"


def traits_of(spec: MoESpec) -> frozenset[str]:
    """What Capabilities.needs may name: the features of `spec`, and what every implementation is taken to know."""
    traits = {str(feature) for feature in features_of(spec)}
    if spec.router:
        traits.add(RENORMALIZED if spec.router.renormalize else NOT_RENORMALIZED)
    if spec.shared and spec.shared.gate == "sigmoid":
        traits.add(GATED_SHARED_EXPERT)
    mlp = spec.experts
    if (mlp.limit, mlp.limit_at, mlp.sigmoid_scale, mlp.up_offset) == (7.0, "before", 1.702, 1.0):
        traits.add(GPT_OSS_CLAMP)
    return frozenset(traits)


def _router_features(router: Router) -> dict[Feature, bool]:
    return {
        Feature.LOGIT_BIAS: router.logit_bias,
        Feature.LOGIT_CAP: router.logit_scale != 1.0 or router.logit_softcap != 0.0,
        Feature.GROUPS: router.num_groups > 1,
        Feature.GROUP_FILL_ZERO: router.num_groups > 1 and router.group_fill == "zero",
        Feature.SELECTION_BIAS: router.selection_bias is not None,
        Feature.SELECTION_BIAS_ON_LOGITS: router.selection_bias == "logit",
        Feature.EPSILON_CLAMP: router.epsilon_rule == "clamp",
        Feature.LEARNED_SCALE: router.learned_scale is not None,
        Feature.ZERO_EXPERTS: router.num_zero_experts > 0,
        Feature.CAPACITY: router.capacity is not None,
    }


def _mlp_features(mlp: MLP) -> dict[Feature, bool]:
    return {
        Feature.NOT_GATED: not mlp.gated,
        Feature.MLP_BIAS: mlp.bias,
        Feature.LIMIT: mlp.limit is not None,
        Feature.SCALED_SWIGLU: mlp.sigmoid_scale != 1.0 or mlp.up_offset != 0.0,
        Feature.SOFTCAP: mlp.gate_softcap != 0.0 or mlp.up_softcap != 0.0,
    }
