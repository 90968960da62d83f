"""DeepSeek's routers and their descendants: groups of experts, scores in fp32, a scaling factor."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from moe_ref.contract.released import ReleasedNumerics
from moe_ref.contract.spec import MLP, Router, SharedExpert
from tests.third_party.families.softmax import spec
from tests.third_party.family import SHARED_WIDTH, E, Family, H, I, K, Tensors
from tests.third_party.read import biased, biased_with_shared, triple, with_shared

ROUTED = {"hidden_size": H, "moe_intermediate_size": I, "n_routed_experts": E, "num_experts_per_tok": K}
GROUPS = {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
          "n_shared_experts": 1}
ONE_GROUP = GROUPS | {"n_group": 1, "topk_group": 1}

FP32 = ReleasedNumerics(logits="fp32")
GROUPED = {"num_experts": E, "top_k": K, "num_groups": 4, "num_groups_kept": 2}
V3_OPTIONS = {"score": "sigmoid", "selection_bias": "score", "renormalize": True, "renormalize_epsilon": 1e-20,
              "scaling_factor": 2.5}
V3 = Router(**GROUPED, **V3_OPTIONS, group_score="top2_sum")  # type: ignore[arg-type]
V3_FLAT = Router(num_experts=E, top_k=K, **V3_OPTIONS)  # type: ignore[arg-type]
ZERO_FILLED = Router(**GROUPED, **V3_OPTIONS, group_score="top2_sum", group_fill="zero")  # type: ignore[arg-type]
MISTRAL = Router(**GROUPED, group_score="top2_sum", group_fill="zero", renormalize=True,  # type: ignore[arg-type]
                 renormalize_epsilon=1e-20, scaling_factor=2.5)
SHARED = SharedExpert(intermediate_size=I)
CLAMPED = MLP(limit=1.0)


def _v3(module: str, prefix: str, router: Router = V3, options: Mapping[str, object] = GROUPS, *, config: str = "",
        block: str = "MoE", experts: MLP | None = None, shared: SharedExpert | None = SHARED) -> Family:
    return Family(module=module, config=f"{config or prefix}Config", block=prefix + block,
                  options=ROUTED | options, spec=spec(router, experts, shared), released=FP32, routing=triple,
                  read=biased_with_shared if shared else biased)


def _v2(module: str, config: str, prefix: str) -> Family:
    router = Router(**GROUPED, group_fill="zero", scaling_factor=13.0)  # type: ignore[arg-type]
    return Family(module=module, config=f"{config}Config", block=f"{prefix}Moe",
                  options=ROUTED | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
                                    "routed_scaling_factor": 13.0, "n_shared_experts": 2, "num_attention_heads": 4,
                                    "num_key_value_heads": 4},
                  spec=spec(router, shared=SharedExpert(intermediate_size=2 * I)), released=FP32, read=with_shared,
                  routing=triple)


def _axk1(config: Any, modeling: Any) -> nn.Module:
    """The layer without the norm that its class applies to the result."""
    block = modeling.AXK1MoE(config)
    block.post_mlp_layernorm = nn.Identity()
    return block


def _nemotron_read(block: nn.Module) -> Tensors:
    """up_proj (E, I, H), one projection, and so the shared expert's."""
    return {"w13_EGIH": block.experts.up_proj[:, None], "w2_EHI": block.experts.down_proj,
            "router_EH": block.gate.weight, "selection_bias_E": block.gate.e_score_correction_bias,
            "shared_w13_GIH": block.shared_experts.up_proj.weight[None],
            "shared_w2_HI": block.shared_experts.down_proj.weight}


RELU_SQUARED = MLP(activation="relu_squared", gated=False)
KIMI = {"hidden_size": H, "moe_intermediate_size": I, "num_experts": E, "num_experts_per_token": K,
        "num_shared_experts": 1, "num_expert_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}

FAMILIES = [
    _v2("deepseek_v2", "DeepseekV2", "DeepseekV2"),
    _v2("deepseek_ocr2", "DeepseekOcr2Text", "DeepseekOcr2Text"),
    _v2("unlimited_ocr", "UnlimitedOcrText", "UnlimitedOcrText"),
    _v3("deepseek_v3", "DeepseekV3"),
    _v3("deepseek_v32", "DeepseekV32"),
    _v3("dots1", "Dots1"),
    _v3("glm4_moe", "Glm4Moe", V3_FLAT, ONE_GROUP),
    _v3("glm4_moe_lite", "Glm4MoeLite"),
    _v3("glm4v_moe", "Glm4vMoeText", config="Glm4vMoeText"),
    _v3("glm_moe_dsa", "GlmMoeDsa"),
    _v3("solar_open", "SolarOpen"),
    _v3("bailing_hybrid", "BailingHybrid", options=GROUPS | {"num_experts": E, "num_shared_experts": 1}),
    _v3("dots3_note", "Dots3NoteText", options=GROUPS | {"shared_experts_intermediate_size": I}),
    Family(module="axk1", config="AXK1Config", make=_axk1, options=ROUTED | GROUPS, spec=spec(V3, shared=SHARED),
           released=FP32, read=biased_with_shared, routing=triple),
    _v3("exaone_moe", "ExaoneMoe", options=GROUPS | {"num_experts": E, "num_shared_experts": 1},
        block="SparseMoEBlock"),
    _v3("kimi_linear", "KimiLinear", options=KIMI),
    _v3("mimo_v2_flash", "MiMoV2Flash", V3_FLAT, ONE_GROUP, shared=None),
    _v3("axk2", "AXK2", ZERO_FILLED),
    _v3("glm5_next", "Glm5NextText", V3_FLAT, ONE_GROUP | {"swiglu_limit": 1.0}, experts=CLAMPED,
        shared=SharedExpert(intermediate_size=I, mlp=CLAMPED)),
    # Its shared expert has no limit.
    _v3("hy_v4", "HYV4", V3_FLAT, ONE_GROUP | {"swiglu_limit": 1.0}, experts=CLAMPED),
    Family(module="mistral4", config="Mistral4Config", block="Mistral4MoE", options=ROUTED | GROUPS,
           spec=spec(MISTRAL, shared=SHARED), released=ReleasedNumerics(score="model", weight="model"),
           read=with_shared, routing=triple),
    Family(module="mistral_large4", config="MistralLarge4TextConfig", block="MistralLarge4TextMoE",
           options=ROUTED | GROUPS, spec=spec(MISTRAL, shared=SHARED), released=FP32, read=with_shared,
           routing=triple),
    Family(module="nemotron_h", config="NemotronHConfig", block="NemotronHMoE",
           options=ROUTED | ONE_GROUP | {"moe_shared_expert_intermediate_size": SHARED_WIDTH},
           spec=spec(V3_FLAT, RELU_SQUARED, SharedExpert(intermediate_size=SHARED_WIDTH, mlp=RELU_SQUARED)),
           released=ReleasedNumerics(logits="fp32", merge="fp32"), read=_nemotron_read, routing=triple),
]
