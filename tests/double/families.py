"""One tiny layer per released family of mixture-of-experts models; families of equal mathematics share a spec.

Read from the modelling code of transformers 5.23; sizes, limits and caps are small enough to be reached. Not here,
because their routers lie outside the spec and are injected instead: phimoe (two masked softmaxes), zaya (a router
with state), hashed layers of deepseek_v4. gemma4 and muse_spark are without their norms.
"""

from dataclasses import replace

from moe_ref import MLP, Capacity, MoESpec, Router, SharedExpert


def layer(router: Router | None, *, experts: MLP | None = None, shared: SharedExpert | None = None,
          hidden: int = 6, intermediate: int = 4, **options: object) -> MoESpec:
    """A small layer; plain SwiGLU experts unless told otherwise."""
    return MoESpec(hidden_size=hidden, intermediate_size=intermediate, router=router, experts=experts or MLP(),
                   shared=shared, **options)


def softmax(**options: object) -> Router:
    """Eight experts, three chosen."""
    return Router(**{"num_experts": 8, "top_k": 3, **options})


def sigmoid(**options: object) -> Router:
    """With a selection bias, renormalised, as nearly all of this kind."""
    return softmax(**{"score": "sigmoid", "selection_bias": "score", "renormalize": True, **options})


PLAIN_SHARED = SharedExpert(intermediate_size=5)
GATED_SHARED = SharedExpert(intermediate_size=7, gate="sigmoid")
GROUPS = {"num_experts": 12, "top_k": 4, "num_groups": 4, "num_groups_kept": 2, "group_score": "top2_sum"}
EPSILON = {"renormalize": True, "renormalize_epsilon": 1e-20, "scaling_factor": 2.5}
CLAMPED = MLP(limit=0.7)
GPT_OSS = MLP(bias=True, limit=0.7, sigmoid_scale=1.702, up_offset=1.0)

DENSE = layer(None, intermediate=9)
MIXTRAL = layer(softmax(top_k=2, renormalize=True), intermediate=8)
QWEN2 = layer(softmax(num_experts=6), shared=GATED_SHARED)
QWEN_NEXT = layer(softmax(renormalize=True), shared=GATED_SHARED)
OLMOE = layer(softmax(num_experts=9, top_k=4), hidden=5)
GRANITE_SHARED = layer(softmax(renormalize=True), shared=PLAIN_SHARED)
JETMOE = layer(softmax(renormalize=True), output_bias=True)
COHERE2 = layer(softmax(renormalize=True), shared=SharedExpert(intermediate_size=5, merge="mean"))
COHERE2_SIGMOID = layer(softmax(score="sigmoid"), shared=SharedExpert(intermediate_size=5, merge="mean"))
DEEPSEEK_V2 = layer(softmax(num_groups=4, num_groups_kept=2, group_fill="zero", scaling_factor=16.0),
                    shared=SharedExpert(intermediate_size=8))
DEEPSEEK_V3 = layer(sigmoid(**GROUPS, **EPSILON), shared=PLAIN_SHARED)
GLM4 = layer(sigmoid(**EPSILON), shared=PLAIN_SHARED)
MIMO = layer(sigmoid(renormalize_epsilon=1e-20))
NEMOTRON = layer(sigmoid(**EPSILON), experts=MLP(activation="relu_squared", gated=False),
                 shared=SharedExpert(intermediate_size=7, mlp=MLP(activation="relu_squared", gated=False)))
GLM5 = layer(sigmoid(**EPSILON), experts=CLAMPED, shared=SharedExpert(intermediate_size=5, mlp=CLAMPED))
HY_V4 = layer(sigmoid(**EPSILON), experts=CLAMPED, shared=PLAIN_SHARED)
AXK2 = layer(sigmoid(**GROUPS, **EPSILON, group_fill="zero"), shared=PLAIN_SHARED)
MISTRAL4 = layer(softmax(**GROUPS, **EPSILON, group_fill="zero"), shared=PLAIN_SHARED)
DEEPSEEK_V4 = layer(sigmoid(**{**EPSILON, "scaling_factor": 1.5}, score="sqrt_softplus"), experts=CLAMPED,
                    shared=SharedExpert(intermediate_size=5, mlp=CLAMPED))
MINIMAX_M2 = layer(sigmoid())
MINIMAX_M3 = layer(sigmoid(scaling_factor=2.0), experts=replace(GPT_OSS, bias=False),
                   shared=SharedExpert(intermediate_size=5, mlp=replace(GPT_OSS, bias=False)))
STEP = layer(sigmoid(scaling_factor=2.0), experts=MLP(limit=0.3, limit_at="after"),
             shared=SharedExpert(intermediate_size=5, mlp=MLP(limit=0.5, limit_at="after")))
LAGUNA = layer(sigmoid(scaling_factor=2.0, logit_softcap=1.5), shared=PLAIN_SHARED)
LFM2 = layer(sigmoid(renormalize_epsilon=1e-6))
BEAM = layer(sigmoid(**GROUPS, **EPSILON))
INKLING2 = layer(sigmoid(**{**EPSILON, "scaling_factor": 8.0}), experts=MLP(gate_softcap=2.0, up_softcap=1.5))
FLINT = layer(sigmoid(selection_bias=None), shared=PLAIN_SHARED)
KOLIBRI = layer(sigmoid(selection_bias="logit"), shared=PLAIN_SHARED)
ERNIE = layer(softmax(selection_bias="score", renormalize=True, renormalize_epsilon=1e-12, epsilon_rule="clamp"),
              shared=PLAIN_SHARED)
INKLING = layer(sigmoid(scaling_factor=8.0, learned_scale="layer"),
                shared=SharedExpert(intermediate_size=6, gate="router", num_experts=2))
LONGCAT = layer(softmax(num_experts=6, num_zero_experts=3, selection_bias="score", scaling_factor=6.0))
GPT = layer(softmax(renormalize=True, logit_bias=True), experts=GPT_OSS)
LLAMA4 = layer(softmax(num_experts=4, top_k=1, score="sigmoid"), shared=SharedExpert(intermediate_size=8),
               intermediate=8, weight_on="input")
SWITCH = layer(softmax(num_experts=4, top_k=1, capacity=Capacity(tokens=2, sequence_length=9)),
               experts=MLP(activation="relu", gated=False))
NLLB = layer(softmax(num_experts=5, top_k=2, renormalize=True, renormalize_epsilon=2.0**-52, epsilon_rule="clamp",
                     capacity=Capacity(tokens=9, priority="choice", renormalize_after=True)),
             experts=MLP(activation="relu", gated=False, bias=True))
MEGATRON = layer(softmax(renormalize=True, capacity=Capacity(factor=0.75, priority="weight")))
GEMMA4 = layer(softmax(renormalize=True, learned_scale="expert"), experts=MLP(activation="gelu_tanh"))
MUSE_SPARK = layer(sigmoid(logit_scale=0.25, renormalize_epsilon=1e-15, scaling_factor=2.0))

FAMILIES = {
    "dense": DENSE, "mixtral": MIXTRAL, "minimax": MIXTRAL, "dbrx": MIXTRAL, "granitemoe": MIXTRAL,
    "granitemoehybrid": GRANITE_SHARED, "granitemoeshared": GRANITE_SHARED, "aria": GRANITE_SHARED,
    "hunyuan_v1_moe": GRANITE_SHARED, "qwen2_moe": QWEN2, "qwen3_moe": MIXTRAL, "qwen3_vl_moe": MIXTRAL,
    "qwen3_omni_moe_thinker": MIXTRAL, "qwen3_omni_moe_talker": QWEN_NEXT, "qwen3_next": QWEN_NEXT,
    "qwen3_5_moe": QWEN_NEXT, "qwen4_exp": QWEN_NEXT, "mellum": MIXTRAL, "olmoe": OLMOE, "flex_olmo": OLMOE,
    "jamba": OLMOE, "jetmoe": JETMOE, "cohere2_moe": COHERE2, "cohere2_moe_sigmoid": COHERE2_SIGMOID,
    "deepseek_v2": DEEPSEEK_V2, "deepseek_ocr": DEEPSEEK_V2, "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v32": DEEPSEEK_V3, "dots1": DEEPSEEK_V3, "kimi_linear": DEEPSEEK_V3, "exaone_moe": DEEPSEEK_V3,
    "bailing_hybrid": DEEPSEEK_V3,
    "solar_open": GLM4, "axk1": DEEPSEEK_V3, "dots3_note": DEEPSEEK_V3, "glm4_moe": GLM4, "glm4_moe_lite": GLM4,
    "glm4v_moe": GLM4, "glm_moe_dsa": GLM4, "mimo_v2_flash": MIMO, "nemotron_h": NEMOTRON, "glm5_next": GLM5,
    "hy_v4": HY_V4, "axk2": AXK2, "mistral4": MISTRAL4, "mistral_large4": MISTRAL4, "deepseek_v4": DEEPSEEK_V4,
    "afmoe": GLM4, "hy_v3": GLM4, "minimax_m2": MINIMAX_M2, "minimax_m3_vl": MINIMAX_M3, "step3p7": STEP,
    "laguna": LAGUNA, "lfm2_moe": LFM2, "beam": BEAM, "inkling2": INKLING2, "flint": FLINT, "kolibri1": KOLIBRI,
    "ernie4_5_moe": ERNIE, "inkling": INKLING, "longcat_flash": LONGCAT, "gpt_oss": GPT,
    "openai_privacy_filter": GPT, "llama4": LLAMA4, "switch_transformers": SWITCH, "nllb_moe": NLLB,
    "megatron": MEGATRON, "gemma4": GEMMA4, "muse_spark": MUSE_SPARK,
}
"""Names share a spec where only sizes, factors or the shared width differ; megatron stands for its capacity."""

DISTINCT = {next(name for name in FAMILIES if FAMILIES[name] is spec): spec for spec in FAMILIES.values()}
"""Every spec once, under the name of its first family."""
