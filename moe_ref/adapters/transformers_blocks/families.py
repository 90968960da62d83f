"""The blocks that are offered, in the order in which a spec is given to one of them.

Rounding, read in transformers 5.23: the routers of Mixtral, Qwen, OLMoE and gpt-oss multiply in the model's dtype,
those of DeepSeek and Nemotron-H in fp32; Mixtral, DeepSeek and Nemotron-H hand over fp32 weights, the others convert
them to the model's dtype. `eager` rounds each weighted row (`.to(final_hidden_states.dtype)`) and adds up in the
model's dtype (`index_add_`). grouped_mm and batched_mm multiply by the weight, which rounds where the weight is in the
model's dtype, and add up in fp32 (`weighted_out.view(...).sum(dim=1)`); what a shared expert is added to was stored
before. A contract has one word for every rounding in the merge, so `one_sum` is for blocks without any.
"""

from dataclasses import replace
from typing import Any

from moe_ref.adapters.transformers_blocks.family import Family, Options, hidden_act
from moe_ref.contract.features import GATED_SHARED_EXPERT, NOT_RENORMALIZED, RENORMALIZED, Feature
from moe_ref.contract.spec import MLP, MoESpec, Router, SharedExpert, SharedGate

ALL_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu_squared")
V3: dict[str, Any] = {"score": "sigmoid", "selection_bias": "score", "renormalize": True, "renormalize_epsilon": 1e-20}


def _router(spec: MoESpec, **options: Any) -> Router:
    assert spec.router is not None
    return Router(num_experts=spec.num_experts, top_k=spec.top_k, **options)


def _plain(spec: MoESpec) -> MoESpec:
    """A softmax router, with or without renormalisation, and experts of any activation."""
    assert spec.router is not None
    return MoESpec(hidden_size=spec.hidden_size, intermediate_size=spec.intermediate_size,
                   router=_router(spec, renormalize=spec.router.renormalize),
                   experts=MLP(activation=spec.experts.activation))


def _with_shared(spec: MoESpec, gate: SharedGate = "none") -> SharedExpert:
    """A shared expert of the same activation as the experts."""
    assert spec.shared is not None
    mlp = MLP(activation=spec.experts.activation, gated=spec.experts.gated)
    return SharedExpert(intermediate_size=spec.shared.intermediate_size, mlp=mlp, gate=gate)


def _groups(spec: MoESpec) -> dict[str, Any]:
    assert spec.router is not None
    return {"num_groups": spec.router.num_groups, "num_groups_kept": spec.router.num_groups_kept,
            "scaling_factor": spec.router.scaling_factor}


def _v2(spec: MoESpec) -> MoESpec:
    router = _router(spec, **_groups(spec), group_fill="zero")
    return replace(_plain(spec), router=router, shared=_with_shared(spec))


def _v3(spec: MoESpec) -> MoESpec:
    return replace(_plain(spec), router=_v3_router(spec), shared=_with_shared(spec))


def _v3_router(spec: MoESpec) -> Router:
    """One group has no score."""
    groups = _groups(spec)
    return _router(spec, **groups, **V3, group_score="top2_sum" if groups["num_groups"] > 1 else "max")


def _gpt_oss(spec: MoESpec) -> MoESpec:
    mlp = MLP(bias=True, limit=spec.experts.limit, sigmoid_scale=1.702, up_offset=1.0)
    return replace(_plain(spec), router=_router(spec, renormalize=True, logit_bias=True), experts=mlp)


def _llama4(spec: MoESpec) -> MoESpec:
    return replace(_plain(spec), router=_router(spec, score="sigmoid"), shared=_with_shared(spec), weight_on="input")


def _nemotron_h(spec: MoESpec) -> MoESpec:
    mlp = MLP(activation=spec.experts.activation, gated=False)
    return replace(_plain(spec), router=_v3_router(spec), experts=mlp, shared=_with_shared(spec))


def _sizes(experts: str, intermediate: str) -> Options:
    """The four sizes and the activation under the names of a configuration class."""
    def options(spec: MoESpec, columns: int) -> dict[str, Any]:
        return {"hidden_size": spec.hidden_size, intermediate: columns, experts: spec.num_experts,
                "num_experts_per_tok": spec.top_k, "hidden_act": hidden_act(spec.experts)}
    return options


def _renormalized(experts: str, intermediate: str) -> Options:
    """And whether weights are renormalised."""
    def options(spec: MoESpec, columns: int) -> dict[str, Any]:
        assert spec.router is not None
        return _sizes(experts, intermediate)(spec, columns) | {"norm_topk_prob": spec.router.renormalize}
    return options


def _grouped(spec: MoESpec, columns: int) -> dict[str, Any]:
    assert spec.router is not None
    return _sizes("n_routed_experts", "moe_intermediate_size")(spec, columns) | {
        "n_group": spec.router.num_groups, "topk_group": spec.router.num_groups_kept, "n_shared_experts": 1,
        "routed_scaling_factor": spec.router.scaling_factor, "norm_topk_prob": spec.router.renormalize}


def _grouped_v2(spec: MoESpec, columns: int) -> dict[str, Any]:
    # The block has no scale and no choice of its own for attention; its configuration wants heads that divide.
    return _grouped(spec, columns) | {"topk_method": "group_limited_greedy", "num_attention_heads": 4,
                                      "num_key_value_heads": 4}


def _grouped_nemotron(spec: MoESpec, columns: int) -> dict[str, Any]:
    return _grouped(spec, columns) | {"mlp_hidden_act": hidden_act(spec.experts),
                                      "moe_shared_expert_intermediate_size": columns}


def _limited(spec: MoESpec, columns: int) -> dict[str, Any]:
    return _sizes("num_local_experts", "intermediate_size")(spec, columns) | {"swiglu_limit": spec.experts.limit}


LOCAL = _sizes("num_local_experts", "intermediate_size")
PRECISE: dict[str, Any] = {"logits": "fp32", "weights": "fp32", "shared": "shared_experts"}
SWIGLU_OAI = (Feature.LOGIT_BIAS, Feature.MLP_BIAS, Feature.LIMIT, Feature.SCALED_SWIGLU)

FAMILIES: tuple[Family, ...] = (
    Family(module="mixtral", config="MixtralConfig", block="MixtralSparseMoeBlock", options=LOCAL, wanted=_plain,
           weights="fp32", one_sum=("grouped_mm", "batched_mm"), activations=ALL_ACTIVATIONS, needs=(RENORMALIZED,)),
    Family(module="olmoe", config="OlmoeConfig", block="OlmoeSparseMoeBlock",
           options=_renormalized("num_experts", "intermediate_size"), wanted=_plain, activations=ALL_ACTIVATIONS,
           needs=(NOT_RENORMALIZED,)),
    Family(module="qwen2_moe", config="Qwen2MoeConfig", block="Qwen2MoeSparseMoeBlock",
           options=_renormalized("num_experts", "moe_intermediate_size"),
           wanted=lambda spec: replace(_plain(spec), shared=_with_shared(spec, "sigmoid")), shared="shared_expert",
           shared_gate="shared_expert_gate", features=(Feature.SHARED_EXPERT,), needs=(GATED_SHARED_EXPERT,)),
    Family(module="deepseek_v2", config="DeepseekV2Config", block="DeepseekV2Moe", options=_grouped_v2, wanted=_v2,
           features=(Feature.GROUPS, Feature.GROUP_FILL_ZERO, Feature.SHARED_EXPERT),
           needs=(NOT_RENORMALIZED, Feature.GROUPS, Feature.SHARED_EXPERT), **PRECISE),
    Family(module="deepseek_v3", config="DeepseekV3Config", block="DeepseekV3MoE", options=_grouped, wanted=_v3,
           scores=("sigmoid",), features=(Feature.GROUPS, Feature.SELECTION_BIAS, Feature.SHARED_EXPERT),
           needs=(RENORMALIZED, Feature.SELECTION_BIAS, Feature.SHARED_EXPERT), **PRECISE),
    Family(module="gpt_oss", config="GptOssConfig", block="GptOssMLP", options=_limited, wanted=_gpt_oss,
           experts="interleaved", gate="router", features=SWIGLU_OAI, needs=(RENORMALIZED, *SWIGLU_OAI)),
    # No class of exchangeable experts: it has one way to compute, which is eager's.
    Family(module="llama4", config="Llama4TextConfig", block="Llama4TextMoe", options=LOCAL, wanted=_llama4,
           experts="transposed", gate="router", shared="shared_expert", backends=("eager",), one_sum=("eager",),
           scores=("sigmoid",), features=(Feature.WEIGHT_ON_INPUT, Feature.SHARED_EXPERT), injected_routing=False,
           needs=(NOT_RENORMALIZED, Feature.WEIGHT_ON_INPUT, Feature.SHARED_EXPERT)),
    Family(module="nemotron_h", config="NemotronHConfig", block="NemotronHMoE", options=_grouped_nemotron,
           wanted=_nemotron_h, experts="ungated", scores=("sigmoid",), activations=("relu_squared", "silu", "relu"),
           features=(Feature.NOT_GATED, Feature.SELECTION_BIAS, Feature.GROUPS, Feature.SHARED_EXPERT),
           needs=(RENORMALIZED, Feature.NOT_GATED, Feature.SELECTION_BIAS, Feature.SHARED_EXPERT),
           **PRECISE),
)


def family_of(spec: MoESpec) -> Family | None:
    """The first one that computes exactly this spec."""
    return next((one for one in FAMILIES if _fits(one, spec)), None)


def _fits(family: Family, spec: MoESpec) -> bool:
    declared = family.capabilities(family.module, "", family.backends[0])
    if declared.refused_mathematics(spec):
        return False
    return family.wanted(spec) == spec
