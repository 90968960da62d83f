"""Sigmoid routers (and two softmax ones) with a selection bias, without groups; shared experts of every kind."""

from typing import Any

from torch import nn

from moe_ref.contract.released import ReleasedNumerics
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MLP, MoESpec, Router, SharedExpert
from tests.third_party.families.deepseek import CLAMPED, FP32, SHARED, V3
from tests.third_party.families.softmax import LOCAL, MOE, spec
from tests.third_party.family import SHARED_WIDTH, E, Family, H, I, K, Tensors
from tests.third_party.read import (
    biased,
    biased_with_shared,
    plain,
    shared,
    shared_mlp,
    stacked,
    triple,
    with_shared,
)

ROUTED = {"hidden_size": H, "moe_intermediate_size": I, "n_routed_experts": E, "num_experts_per_tok": K}
ZERO_EXPERTS = 4


def _router(**options: Any) -> Router:
    return Router(**{"num_experts": E, "top_k": K, "score": "sigmoid", "selection_bias": "score",
                     "renormalize": True} | options)


WIDE = SharedExpert(intermediate_size=SHARED_WIDTH)
MODEL_LOGITS_ON_OUTPUT = ReleasedNumerics(scale_on="output")


def _minimax_m3_read(block: nn.Module) -> Tensors:
    """The shared expert's gate and up are one matrix (2I, H)."""
    mlp = block.shared_experts
    return biased(block) | shared(*mlp.gate_up_proj.weight.chunk(2, 0), mlp.down_proj.weight)


def _inkling_read(block: nn.Module) -> Tensors:
    """The router's last columns weight the shared experts, kept as (S, I, H) and (S, H, I)."""
    gate, mlp = block.gate, block.shared_experts
    num_shared = gate.n_shared_experts
    return stacked(block.experts) | {
        "router_EH": gate.weight[:-num_shared], "shared_gate_SH": gate.weight[-num_shared:],
        "selection_bias_E": gate.e_score_correction_bias, "weight_scale_E": gate.global_scale,
    } | shared(mlp.gate_proj.flatten(0, 1), mlp.up_proj.flatten(0, 1), mlp.down_proj.transpose(0, 1).flatten(1))


def _inkling_routing(output: Any, block: nn.Module, spec: MoESpec) -> Routing:
    return Routing(output[2], output[1], shared_TS=output[3])


def _llama4_read(block: nn.Module) -> Tensors:
    mlp = block.shared_expert
    return {"w13_EGIH": block.experts.gate_up_proj.transpose(1, 2).unflatten(1, (2, -1)),
            "w2_EHI": block.experts.down_proj.transpose(1, 2), "router_EH": block.router.weight} | shared_mlp(mlp)


def _llama4_routing(output: Any, block: nn.Module, spec: MoESpec) -> Routing:
    """Scores (T, E), zero where not selected."""
    weights_TK, ids_TK = output[0].topk(spec.top_k, -1)
    return Routing(ids_TK, weights_TK)


def _longcat_read(block: nn.Module) -> Tensors:
    """gate_up_proj has rows for the identity experts too, which nothing reads."""
    experts, router = block.experts, block.router
    return {"w13_EGIH": experts.gate_up_proj[:-ZERO_EXPERTS].unflatten(1, (2, -1)), "w2_EHI": experts.down_proj,
            "router_EH": router.classifier.weight, "selection_bias_E": router.e_score_correction_bias}


def _on_block(name: str) -> Any:
    """A reader where the selection bias is the block's own tensor `name`."""
    def read(block: nn.Module) -> Tensors:
        found = plain(block) | {"selection_bias_E": getattr(block, name)}
        return found | shared_mlp(block.shared_experts) if hasattr(block, "shared_experts") else found
    return read


OAI_PLAIN = MLP(limit=1.0, sigmoid_scale=1.702, up_offset=1.0)
ERNIE = spec(_router(score="softmax", renormalize_epsilon=1e-12, epsilon_rule="clamp"),
             shared=SharedExpert(intermediate_size=2 * I))
ERNIE_NUMERICS = ReleasedNumerics(logits="fp32", weight="model")
CLAMPED_AFTER = MLP(limit=1.0, limit_at="after")

FAMILIES = [
    Family(module="afmoe", config="AfmoeConfig", block="AfmoeSparseMoeBlock", router="router", routing=triple,
           options=MOE | {"num_shared_experts": 2, "route_scale": 2.448},
           spec=spec(_router(renormalize_epsilon=1e-20, scaling_factor=2.448),
                     shared=SharedExpert(intermediate_size=2 * I)),
           read=lambda block: stacked(block.experts) | shared_mlp(block.shared_experts)
           | {"router_EH": block.router.gate.weight, "selection_bias_E": block.expert_bias}),
    Family(module="beam", config="BeamConfig", block="BeamMoE", read=biased, routing=triple,
           options=MOE | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}, spec=spec(V3),
           released=ReleasedNumerics(logits="fp32", scale_on="output", activation="fp32")),
    Family(module="deepseek_v4", config="DeepseekV4Config", block="DeepseekV4SparseMoeBlock", arguments=(0,),
           options=ROUTED | {"swiglu_limit": 1.0, "mlp_layer_types": ["moe"], "num_hidden_layers": 1},
           spec=spec(_router(score="sqrt_softplus", renormalize_epsilon=1e-20, scaling_factor=1.5), CLAMPED,
                     SharedExpert(intermediate_size=I, mlp=CLAMPED)),
           released=ReleasedNumerics(score="model", weight="model"), read=biased_with_shared, routing=triple),
    Family(module="ernie4_5_moe", config="Ernie4_5_MoeConfig", block="Ernie4_5_MoeSparseMoeBlock",
           options=MOE | {"moe_num_shared_experts": 2},
           spec=ERNIE, released=ERNIE_NUMERICS, routing=triple,
           read=lambda block: with_shared(block)
           | {"selection_bias_E": block.gate.moe_statics.e_score_correction_bias.flatten()}),
    Family(module="ernie4_5_vl_moe", config="Ernie4_5_VLMoeTextConfig", block="Ernie4_5_VLMoeMoeBlock",
           # Without image tokens its second set of experts is not run.
           options={"hidden_size": H, "moe_intermediate_size": [I, I], "moe_num_experts": E, "moe_k": K,
                    "moe_num_shared_experts": 2},
           spec=ERNIE, released=ERNIE_NUMERICS, router="text_moe.gate", routing=triple,
           unread="vision_moe.",
           read=lambda block: plain(block.text_moe) | shared_mlp(block.shared_experts)
           | {"selection_bias_E": block.text_moe.gate.moe_statics.e_score_correction_bias.flatten()}),
    Family(module="flint", config="FlintConfig", block="FlintSparseMoeBlock", released=FP32,
           options=MOE | {"shared_expert_intermediate_size": SHARED_WIDTH, "norm_topk_prob": True},
           spec=spec(_router(selection_bias=None), shared=WIDE), routing=triple,
           read=lambda block: plain(block) | shared_mlp(block.shared_expert)),
    Family(module="hy_v3", config="HYV3Config", block="HYV3MoE",
           options=MOE | {"num_shared_experts": 1, "router_scaling_factor": 2.826},
           spec=spec(_router(renormalize_epsilon=1e-20, scaling_factor=2.826), shared=SHARED), released=FP32,
           read=_on_block("e_score_correction_bias"), routing=triple),
    Family(module="inkling", config="InklingTextConfig", block="InklingMoE",
           options=ROUTED | {"n_shared_experts": 2, "route_scale": 7.3},
           spec=spec(_router(scaling_factor=7.3, learned_scale="layer"),
                     shared=SharedExpert(intermediate_size=2 * I, gate="router", num_experts=2)),
           released=ReleasedNumerics(logits="fp32", weight="model"), read=_inkling_read, routing=_inkling_routing),
    Family(module="inkling2", config="Inkling2TextConfig", block="Inkling2SparseMoeBlock",
           options=ROUTED | {"mlp_gate_softcap": 2.0, "mlp_up_softcap": 2.0},
           spec=spec(_router(renormalize_epsilon=1e-20, scaling_factor=8.0),
                     MLP(gate_softcap=2.0, up_softcap=2.0)),
           released=ReleasedNumerics(logits="fp32", activation="fp32", merge="fp32"), read=biased, routing=triple),
    Family(module="kolibri1", config="Kolibri1Config", block="Kolibri1SparseMoeBlock",
           options=MOE | {"norm_topk_prob": True, "shared_expert_intermediate_size": SHARED_WIDTH},
           spec=spec(_router(selection_bias="logit"), shared=WIDE), read=biased_with_shared, routing=triple,
           released=ReleasedNumerics(logits="fp32", score_after_selection=True)),
    Family(module="laguna", config="LagunaConfig", block="LagunaSparseMoeBlock",
           options=MOE | {"shared_expert_intermediate_size": SHARED_WIDTH, "moe_router_logit_softcapping": 1.5,
                          "moe_routed_scaling_factor": 2.7},
           spec=spec(_router(logit_softcap=1.5, scaling_factor=2.7), shared=WIDE), read=biased_with_shared,
           routing=triple, released=ReleasedNumerics(weight="model", scale_on="output")),
    # Its bias is a buffer made with dtype=torch.float32, which loading leaves as it is.
    Family(module="lfm2_moe", config="Lfm2MoeConfig", block="Lfm2MoeSparseMoeBlock", options=MOE, routing=triple,
           kept=("expert_bias",),
           spec=spec(_router(renormalize_epsilon=1e-6)), read=_on_block("expert_bias"),
           released=ReleasedNumerics(score="model", weight="model")),
    Family(module="llama4", config="Llama4TextConfig", block="Llama4TextMoe", router="router", fan_in=-2,
           options=LOCAL | {"num_experts_per_tok": 1},
           spec=MoESpec(hidden_size=H, intermediate_size=I, router=Router(num_experts=E, top_k=1, score="sigmoid"),
                        shared=SHARED, weight_on="input"),
           released=ReleasedNumerics(weight="model", score_after_selection=True, merge="fp32"),
           read=_llama4_read, routing=_llama4_routing),
    Family(module="longcat_flash", config="LongcatFlashConfig", block="LongcatFlashMoE", router="router",
           options={"hidden_size": H, "expert_ffn_hidden_size": I, "n_routed_experts": E - ZERO_EXPERTS,
                    "zero_expert_num": ZERO_EXPERTS, "moe_topk": K, "routed_scaling_factor": 6.0},
           spec=spec(Router(num_experts=E - ZERO_EXPERTS, top_k=K, selection_bias="score", scaling_factor=6.0,
                            num_zero_experts=ZERO_EXPERTS)), released=FP32, read=_longcat_read, routing=triple),
    Family(module="minimax_m2", config="MiniMaxM2Config", block="MiniMaxM2SparseMoeBlock", options=LOCAL,
           spec=spec(_router()), read=_on_block("e_score_correction_bias"), routing=triple),
    Family(module="minimax_m3_vl", config="MiniMaxM3VLTextConfig", block="MiniMaxM3VLSparseMoeBlock",
           options=LOCAL | {"shared_intermediate_size": SHARED_WIDTH, "swiglu_limit": 1.0,
                            "routed_scaling_factor": 2.7},
           spec=spec(_router(scaling_factor=2.7), OAI_PLAIN,
                     SharedExpert(intermediate_size=SHARED_WIDTH, mlp=OAI_PLAIN)),
           released=MODEL_LOGITS_ON_OUTPUT, read=_minimax_m3_read, routing=triple),
    Family(module="step3p7", config="Step3p7TextConfig", block="Step3p7SparseMoeBlock", arguments=(0,),
           options=ROUTED | {"share_expert_dim": SHARED_WIDTH, "moe_router_scaling_factor": 2.7,
                             "swiglu_limits": [1.0], "swiglu_limits_shared": [2.0], "num_hidden_layers": 1,
                             "layer_types": ["full_attention"], "mlp_layer_types": ["sparse"]},
           spec=spec(_router(scaling_factor=2.7), CLAMPED_AFTER,
                     SharedExpert(intermediate_size=SHARED_WIDTH, mlp=MLP(limit=2.0, limit_at="after"))),
           released=MODEL_LOGITS_ON_OUTPUT, read=biased_with_shared, routing=triple),
]
