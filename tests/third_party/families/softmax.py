"""Softmax routers without a selection bias."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moe_ref.contract.released import ReleasedNumerics
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MLP, MoESpec, Router, SharedExpert
from tests.third_party.family import SHARED_WIDTH, E, Family, H, I, K, Tensors
from tests.third_party.read import (
    gated_shared,
    plain,
    plain_router,
    shared_mlp,
    stacked,
    transposed,
    transposed_with_biases,
    triple,
    with_shared,
)

MOE = {"hidden_size": H, "moe_intermediate_size": I, "num_experts": E, "num_experts_per_tok": K}
LOCAL = {"hidden_size": H, "intermediate_size": I, "num_local_experts": E, "num_experts_per_tok": K}

RENORMALIZED = Router(num_experts=E, top_k=K, renormalize=True)
PLAIN = Router(num_experts=E, top_k=K)
QWEN = ReleasedNumerics(weight="model")
AFTER = ReleasedNumerics(weight="model", score_after_selection=True)
ALL_MODEL = ReleasedNumerics(score="model", weight="model")
ALL_MODEL_AFTER = ReleasedNumerics(score="model", weight="model", score_after_selection=True)
GATED_SHARED = SharedExpert(intermediate_size=SHARED_WIDTH, gate="sigmoid")
OAI = MLP(bias=True, limit=1.0, sigmoid_scale=1.702, up_offset=1.0)


def spec(router: Router, experts: MLP | None = None, shared: SharedExpert | None = None,
         output_bias: bool = False) -> MoESpec:
    """A layer of the small sizes."""
    return MoESpec(hidden_size=H, intermediate_size=I, router=router, experts=experts or MLP(), shared=shared,
                   output_bias=output_bias)


def _mixtral_like(module: str, prefix: str) -> Family:
    return Family(module=module, config=f"{prefix}Config", block=f"{prefix}SparseMoeBlock", options=LOCAL,
                  spec=spec(RENORMALIZED), read=plain, routing=triple)


def _qwen_like(module: str, prefix: str, router: Router, shared: bool, options: dict[str, object],
               config: str = "", name: str = "") -> Family:
    more: dict[str, object] = {"shared_expert_intermediate_size": SHARED_WIDTH} if shared else {}
    return Family(module=module, name=name, config=config or f"{prefix}Config", block=f"{prefix}SparseMoeBlock",
                  options=MOE | more | options, spec=spec(router, shared=GATED_SHARED if shared else None),
                  released=QWEN, read=gated_shared if shared else plain, routing=triple)


def _qwens() -> list[Family]:
    norm, off = {"norm_topk_prob": True}, {"norm_topk_prob": False}
    olmoe = {"intermediate_size": I}
    return [
        _qwen_like("qwen2_moe", "Qwen2Moe", PLAIN, True, off),
        _qwen_like("qwen3_moe", "Qwen3Moe", RENORMALIZED, False, norm),
        _qwen_like("qwen3_next", "Qwen3Next", RENORMALIZED, True, norm),
        _qwen_like("qwen3_5_moe", "Qwen3_5Moe", RENORMALIZED, True, {}, "Qwen3_5MoeTextConfig"),
        _qwen_like("qwen3_vl_moe", "Qwen3VLMoeText", RENORMALIZED, False, {}, "Qwen3VLMoeTextConfig"),
        _qwen_like("qwen3_omni_moe", "Qwen3OmniMoeThinkerText", RENORMALIZED, False, norm,
                   "Qwen3OmniMoeTextConfig"),
        _qwen_like("qwen4_exp", "Qwen4ExpText", RENORMALIZED, True, norm, "Qwen4ExpTextConfig"),
        _qwen_like("mellum", "Mellum", RENORMALIZED, False, norm),
        _qwen_like("olmoe", "Olmoe", PLAIN, False, off | olmoe),
        _qwen_like("flex_olmo", "FlexOlmo", PLAIN, False, off | olmoe),
    ]


def _granite(module: str, prefix: str) -> Family:
    return Family(module=module, config=f"{prefix}Config", block=f"{prefix}MoE", options=LOCAL, router="router",
                  spec=spec(RENORMALIZED), released=AFTER, read=plain_router, routing=triple)


def _dbrx_read(block: nn.Module) -> Tensors:
    """w1, v1 and w2 as (E * I, H)."""
    mlp = block.experts.mlp
    w1, v1, w2 = (matrix.view(E, I, H) for matrix in (mlp.w1, mlp.v1, mlp.w2))
    return {"w13_EGIH": torch.stack([w1, v1], dim=1), "w2_EHI": w2.transpose(1, 2),
            "router_EH": block.router.layer.weight}


def _dbrx_routing(output: Any, block: nn.Module, spec: MoESpec) -> Routing:
    weights_TK, ids_TK = block.route_tokens_to_experts(output)
    return Routing(ids_TK, weights_TK)


def _jetmoe_routing(output: Any, block: nn.Module, spec: MoESpec) -> Routing:
    """Rows sorted by expert, back in (token, slot) order."""
    row_R, _, weight_R, count_E, _ = output
    ids_R = torch.repeat_interleave(torch.arange(len(count_E)), torch.tensor(count_E))
    ids_TK = torch.zeros_like(ids_R).scatter(0, row_R, ids_R).view(-1, spec.top_k)
    return Routing(ids_TK, torch.zeros_like(weight_R).scatter(0, row_R, weight_R).view(-1, spec.top_k))


def _privacy_routing(output: Any, block: nn.Module, spec: MoESpec) -> Routing:
    """Weights are divided by K and the output multiplied by it, a power of two here."""
    return Routing(output[2], output[1] * spec.top_k)


def _oai(module: str, prefix: str, interleaved: bool) -> Family:
    def read(block: nn.Module) -> Tensors:
        return transposed_with_biases(block.experts, interleaved) | {
            "router_EH": block.router.weight, "router_bias_E": block.router.bias}
    router = Router(num_experts=E, top_k=K, renormalize=True, logit_bias=True)
    # In the eager code of openai_privacy_filter every step is rounded to fp32, nothing to the model's dtype.
    precise = ReleasedNumerics(logits="fp32", score_after_selection=True, rows="fp32", activation="fp32",
                               merge="fp32")
    return Family(module=module, config=f"{prefix}Config", block=f"{prefix}MLP",
                  options=LOCAL | {"swiglu_limit": 1.0}, spec=spec(router, OAI), router="router",
                  released=ALL_MODEL_AFTER if interleaved else precise,
                  grouped=None if interleaved else replace(precise, rows="model", activation="model"),
                  read=read, routing=triple if interleaved else _privacy_routing, fan_in=-2)


FAMILIES = [
    _mixtral_like("mixtral", "Mixtral"),
    _mixtral_like("minimax", "MiniMax"),
    *_qwens(),
    Family(module="jamba", config="JambaConfig", block="JambaSparseMoeBlock",
           options=MOE | {"intermediate_size": I}, spec=spec(PLAIN), released=QWEN, router="router",
           read=plain_router, routing=triple),
    _granite("granitemoe", "GraniteMoe"),
    _granite("granitemoeshared", "GraniteMoeShared"),
    _granite("granitemoehybrid", "GraniteMoeHybrid"),
    _granite("granitemoe_swa", "GraniteMoeSWA"),
    Family(module="jetmoe", config="JetMoeConfig", block="JetMoeMoE", options=LOCAL, router="router",
           released=ReleasedNumerics(weight="model", score_after_selection=True, merge="fp32"),
           spec=spec(RENORMALIZED, output_bias=True), routing=_jetmoe_routing,
           read=lambda block: {"w13_EGIH": block.input_linear.weight.unflatten(1, (2, -1)),
                               "w2_EHI": block.output_linear.weight, "router_EH": block.router.layer.weight,
                               "output_bias_H": block.bias}),
    Family(module="aria", config="AriaTextConfig", block="AriaTextMoELayer", router="router", fan_in=-2,
           options={"hidden_size": H, "intermediate_size": I, "moe_num_experts": E, "moe_topk": K,
                    "moe_num_shared_experts": 2},
           spec=spec(RENORMALIZED, shared=SharedExpert(intermediate_size=2 * I)), released=ALL_MODEL_AFTER,
           read=lambda block: transposed(block.experts) | {"router_EH": block.router.weight}
           | shared_mlp(block.shared_experts), routing=triple),
    Family(module="cohere2_moe", config="Cohere2MoeConfig", block="Cohere2MoeSparseMoeBlock",
           options={"hidden_size": H, "intermediate_size": I, "num_experts": E, "num_experts_per_tok": K,
                    "num_shared_experts": 1},
           spec=spec(RENORMALIZED, shared=SharedExpert(intermediate_size=I, merge="mean")), released=AFTER,
           read=with_shared, routing=triple),
    Family(module="dbrx", config="DbrxConfig", block="DbrxFFN", router="router",
           options={"ffn_config": {"ffn_hidden_size": I, "moe_num_experts": E, "moe_top_k": K, "hidden_size": H},
                    "d_model": H},
           spec=spec(RENORMALIZED), released=ALL_MODEL, read=_dbrx_read, routing=_dbrx_routing),
    _oai("gpt_oss", "GptOss", interleaved=True),
    _oai("openai_privacy_filter", "OpenAIPrivacyFilter", interleaved=False),
    Family(module="hunyuan_v1_moe", config="HunYuanMoEV1Config", block="HunYuanMoEV1Moe",
           options={"hidden_size": H, "intermediate_size": I, "num_experts": E, "moe_topk": K},
           spec=spec(RENORMALIZED, shared=SharedExpert(intermediate_size=I)),
           # Its gate is created in fp32, and works in fp32 only while nobody casts it.
           kept=("gate.wg",), released=ReleasedNumerics(logits="fp32"),
           read=lambda block: stacked(block.experts) | {"router_EH": block.gate.wg.weight}
           | shared_mlp(block.shared_mlp), routing=triple),
]
