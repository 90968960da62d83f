"""Tiny models of the transformers library, one per way of storing experts, and their layer's parameters.

The parameters are taken from the modules in memory, put into canonical order here by plain indexing, so that they
share no code with the reader of checkpoints.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moe_ref.contract.spec import MLP, MoESpec, Router, SharedExpert

HIDDEN, INTERMEDIATE, EXPERTS, SHARED = 12, 8, 6, 10
COMMON = {"hidden_size": HIDDEN, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 6,
          "num_hidden_layers": 2, "vocab_size": 16, "max_position_embeddings": 32, "pad_token_id": None,
          "bos_token_id": None, "eos_token_id": None, "num_experts_per_tok": 2}
LATENT_ATTENTION = {"kv_lora_rank": 4, "q_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
                    "v_head_dim": 4}
DENSE_FIRST = {"first_k_dense_replace": 1, "intermediate_size": 10}

PLAIN = MoESpec(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, router=Router(num_experts=EXPERTS, top_k=2))
BIASED = replace(PLAIN, router=Router(num_experts=EXPERTS, top_k=2, score="sigmoid", selection_bias="score"))


def sharing(spec: MoESpec, width: int, **options: Any) -> MoESpec:
    """The spec with a shared expert of that width."""
    return replace(spec, shared=SharedExpert(intermediate_size=width, mlp=spec.experts, **options))


@dataclass(frozen=True)
class Family:
    """A model_type, its configuration, the spec of its second layer, and how to find the layer in the model.

    block: path of the MoE module. parameters: attribute paths in it of parameters outside the experts. shared:
    path of the shared expert. prefix: of the saved names, where it is not the naming's. model: its class, where
    it is no causal language model. read: w13_EGIH and the like from the block, if not as out_in does.
    """

    name: str
    config: str
    options: dict[str, Any]
    spec: MoESpec
    parameters: dict[str, str]
    block: str = "model.layers.1.mlp"
    shared: str = ""
    prefix: str = ""
    model: str = ""
    read: Callable[[torch.nn.Module, MoESpec], dict[str, torch.Tensor]] | None = None

    @property
    def model_type(self) -> str:
        """The name that namings know it by."""
        return configuration(self).model_type


def configuration(family: Family) -> Any:
    module = importlib.import_module(f"transformers.models.{family.name}.configuration_{family.name}")
    options = family.options if "text_config" in family.options else COMMON | family.options
    return getattr(module, family.config)(**options)


def build(family: Family) -> Any:
    """The model, every parameter and every floating-point buffer drawn at random, zero biases included."""
    import transformers

    config = configuration(family)
    if family.model:
        module = importlib.import_module(f"transformers.models.{family.name}.modeling_{family.name}")
        model = getattr(module, family.model)(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def attribute(root: Any, path: str) -> Any:
    """root.a.b.0.c for "a.b.0.c"."""
    for step in path.split("."):
        root = root[int(step)] if step.isdigit() else getattr(root, step)
    return root


def halves(w13: torch.Tensor, dim: int) -> torch.Tensor:
    """Gate and up, one after the other along `dim`, as an axis of their own before it."""
    return torch.stack(w13.chunk(2, dim), dim)


def out_in(block: torch.nn.Module, spec: MoESpec) -> dict[str, torch.Tensor]:
    """[E, 2I, H] and [E, H, I]; [E, I, H] without a gate."""
    experts: Any = block.experts
    w13 = halves(experts.gate_up_proj, 1) if spec.experts.gated else experts.up_proj[:, None]
    return {"w13_EGIH": w13, "w2_EHI": experts.down_proj}


def in_out(block: torch.nn.Module, spec: MoESpec) -> dict[str, torch.Tensor]:
    """[E, H, 2I] and [E, I, H], with biases [E, 2I] and [E, H]."""
    experts: Any = block.experts
    tensors = {"w13_EGIH": halves(experts.gate_up_proj.mT, 1), "w2_EHI": experts.down_proj.mT}
    if spec.experts.bias:
        tensors |= {"w13_bias_EGI": halves(experts.gate_up_proj_bias, 1), "w2_bias_EH": experts.down_proj_bias}
    return tensors


def interleaved(block: torch.nn.Module, spec: MoESpec) -> dict[str, torch.Tensor]:
    """[E, H, 2I] with gate in the even columns and up in the odd ones."""
    experts: Any = block.experts
    w13, bias = experts.gate_up_proj, experts.gate_up_proj_bias
    return {"w13_EGIH": torch.stack([w13[..., 0::2].mT, w13[..., 1::2].mT], 1), "w2_EHI": experts.down_proj.mT,
            "w13_bias_EGI": torch.stack([bias[:, 0::2], bias[:, 1::2]], 1), "w2_bias_EH": experts.down_proj_bias}


def linear_stacks(block: torch.nn.Module, spec: MoESpec) -> dict[str, torch.Tensor]:
    """JetMoE: input_linear and output_linear."""
    module: Any = block
    return {"w13_EGIH": halves(module.input_linear.weight, 1), "w2_EHI": module.output_linear.weight}


def folded(block: torch.nn.Module, spec: MoESpec) -> dict[str, torch.Tensor]:
    """DBRX: w1, v1 and w2 as [E * I, H]."""
    w1, v1, w2 = (attribute(block, f"experts.mlp.{name}").reshape(EXPERTS, INTERMEDIATE, HIDDEN)
                  for name in ("w1", "v1", "w2"))
    return {"w13_EGIH": torch.stack([w1, v1], 1), "w2_EHI": w2.mT}


def modules(first: str, second: str) -> Callable[[torch.nn.Module, MoESpec], dict[str, torch.Tensor]]:
    """A module per expert without a gate, of two linear layers."""
    def read(block: torch.nn.Module, spec: MoESpec) -> dict[str, torch.Tensor]:
        up, down = ([attribute(block, f"experts.expert_{e}.{name}") for e in range(EXPERTS)]
                    for name in (first, second))
        tensors = {"w13_EGIH": torch.stack([one.weight for one in up])[:, None],
                   "w2_EHI": torch.stack([one.weight for one in down])}
        if spec.experts.bias:
            tensors |= {"w13_bias_EGI": torch.stack([one.bias for one in up])[:, None],
                        "w2_bias_EH": torch.stack([one.bias for one in down])}
        return tensors
    return read


def identities(block: torch.nn.Module, spec: MoESpec) -> dict[str, torch.Tensor]:
    """LongCat: gate and up are allocated for identity experts too, down is not."""
    experts: Any = block.experts
    return {"w13_EGIH": halves(experts.gate_up_proj[:EXPERTS], 1), "w2_EHI": experts.down_proj}


def dense(block: torch.nn.Module, spec: MoESpec) -> dict[str, torch.Tensor]:
    """An MLP without a router, as one expert."""
    module: Any = block
    return {"w13_EGIH": torch.stack([module.gate_proj.weight, module.up_proj.weight])[None],
            "w2_EHI": module.down_proj.weight[None]}


def canonical(model: torch.nn.Module, family: Family) -> dict[str, torch.Tensor]:
    """Every parameter of the layer by its canonical name, unsharded."""
    block = attribute(model, family.block)
    tensors = (family.read or out_in)(block, family.spec)
    tensors |= {name: attribute(block, path) for name, path in family.parameters.items()}
    if family.shared:
        tensors |= shared_tensors(attribute(model, family.shared), family.spec)
    return {name: tensor.detach().reshape(-1) if name.endswith("_E") else tensor.detach()
            for name, tensor in tensors.items()}


def shared_tensors(module: Any, spec: MoESpec) -> dict[str, torch.Tensor]:
    """The shared expert's matrices: fused, separate, or one projection."""
    if hasattr(module, "input_linear"):
        return {"shared_w13_GIH": halves(module.input_linear.weight, 0),
                "shared_w2_HI": module.output_linear.weight}
    if hasattr(module, "gate_up_proj"):
        w13 = halves(module.gate_up_proj.weight, 0)
    elif spec.experts.gated:
        w13 = torch.stack([module.gate_proj.weight, module.up_proj.weight])
    else:
        w13 = module.up_proj.weight[None]
    return {"shared_w13_GIH": w13, "shared_w2_HI": module.down_proj.weight}


GATE = {"router_EH": "gate.weight"}
ROUTER = {"router_EH": "router.weight"}
DEEPSEEK = GATE | {"selection_bias_E": "gate.e_score_correction_bias"}
MIXED, SHARED_EXPERT = "model.layers.1.mlp", "model.layers.1.mlp.shared_expert"
SHARED_EXPERTS, FEED_FORWARD = "model.layers.1.mlp.shared_experts", "model.layers.1.feed_forward"

LOCAL = {"intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS}
NUMBER = {"moe_intermediate_size": INTERMEDIATE, "num_experts": EXPERTS}
ROUTED = {"moe_intermediate_size": INTERMEDIATE, "n_routed_experts": EXPERTS}
QWEN = NUMBER | {"shared_expert_intermediate_size": SHARED}
QWEN_GATES = GATE | {"shared_gate_SH": "shared_expert_gate.weight"}
LINEAR_ATTENTION = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 4,
                    "linear_value_head_dim": 4}
STEP = {"share_expert_dim": SHARED, "intermediate_size": 10, "layer_types": ["full_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse"], "swiglu_limits": [1.0, 1.0], "swiglu_limits_shared": [1.0, 1.0],
        "pad_token_id": 0}
STEP_VISION = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
OAI = replace(PLAIN, router=Router(num_experts=EXPERTS, top_k=2, logit_bias=True), experts=MLP(bias=True))
OAI_ROUTER = ROUTER | {"router_bias_E": "router.bias"}
UNGATED = replace(BIASED, experts=MLP(gated=False, activation="relu_squared"))
GATED_SHARE = sharing(PLAIN, SHARED, gate="sigmoid")

FAMILIES = [
    Family("mixtral", "MixtralConfig", LOCAL, PLAIN, GATE),
    Family("minimax", "MiniMaxConfig", LOCAL, PLAIN, GATE),
    Family("minimax_m2", "MiniMaxM2Config", LOCAL, BIASED,
           GATE | {"selection_bias_E": "e_score_correction_bias"}),
    Family("phimoe", "PhimoeConfig", LOCAL, PLAIN, ROUTER),
    Family("qwen2_moe", "Qwen2MoeConfig", QWEN, GATED_SHARE, QWEN_GATES, shared=SHARED_EXPERT),
    Family("qwen3_moe", "Qwen3MoeConfig", NUMBER, PLAIN, GATE),
    Family("qwen3_next", "Qwen3NextConfig", QWEN | LINEAR_ATTENTION, GATED_SHARE, QWEN_GATES,
           shared=SHARED_EXPERT),
    Family("qwen3_5_moe", "Qwen3_5MoeTextConfig", QWEN | LINEAR_ATTENTION, GATED_SHARE, QWEN_GATES,
           shared=SHARED_EXPERT),
    Family("olmoe", "OlmoeConfig", {"intermediate_size": INTERMEDIATE, "num_experts": EXPERTS}, PLAIN, GATE),
    Family("flex_olmo", "FlexOlmoConfig", {"intermediate_size": INTERMEDIATE, "num_experts": EXPERTS}, PLAIN,
           GATE),
    Family("deepseek_v2", "DeepseekV2Config", ROUTED | DENSE_FIRST | LATENT_ATTENTION | {"n_shared_experts": 2},
           sharing(PLAIN, 2 * INTERMEDIATE), GATE, shared=SHARED_EXPERTS),
    Family("deepseek_v3", "DeepseekV3Config",
           ROUTED | DENSE_FIRST | LATENT_ATTENTION | {"n_shared_experts": 1, "n_group": 2, "topk_group": 1},
           sharing(BIASED, INTERMEDIATE), DEEPSEEK, shared=SHARED_EXPERTS),
    Family("deepseek_v4", "DeepseekV4Config", ROUTED | {"mlp_layer_types": ["moe", "moe"]},
           sharing(BIASED, INTERMEDIATE), DEEPSEEK, shared=SHARED_EXPERTS, prefix="model.layers.1"),
    Family("glm4_moe", "Glm4MoeConfig", ROUTED | DENSE_FIRST | {"n_shared_experts": 1},
           sharing(BIASED, INTERMEDIATE), DEEPSEEK, shared=SHARED_EXPERTS),
    Family("dots1", "Dots1Config", ROUTED | DENSE_FIRST | {"n_shared_experts": 1},
           sharing(BIASED, INTERMEDIATE), DEEPSEEK, shared=SHARED_EXPERTS),
    Family("cohere2_moe", "Cohere2MoeConfig",
           {"intermediate_size": INTERMEDIATE, "num_experts": EXPERTS, "num_shared_experts": 1},
           sharing(PLAIN, INTERMEDIATE, merge="mean"), GATE, shared=SHARED_EXPERTS),
    Family("exaone_moe", "ExaoneMoeConfig",
           NUMBER | {"num_shared_experts": 1, "n_group": 1, "topk_group": 1, "intermediate_size": 10},
           sharing(BIASED, INTERMEDIATE), DEEPSEEK, shared=SHARED_EXPERTS),
    Family("ernie4_5_moe", "Ernie4_5_MoeConfig",
           {"moe_intermediate_size": INTERMEDIATE, "moe_num_experts": EXPERTS, "num_experts": EXPERTS,
            "moe_num_shared_experts": 2, "moe_layer_start_index": 0, "intermediate_size": 10},
           sharing(BIASED, 2 * INTERMEDIATE),
           GATE | {"selection_bias_E": "gate.moe_statics.e_score_correction_bias"}, shared=SHARED_EXPERTS),
    Family("laguna", "LagunaConfig", QWEN | {"intermediate_size": 10}, sharing(BIASED, SHARED), DEEPSEEK,
           shared=SHARED_EXPERTS),
    Family("afmoe", "AfmoeConfig",
           NUMBER | {"num_shared_experts": 2, "num_dense_layers": 1, "intermediate_size": 10},
           sharing(BIASED, 2 * INTERMEDIATE),
           {"router_EH": "router.gate.weight", "selection_bias_E": "expert_bias"},
           shared=SHARED_EXPERTS),
    Family("hunyuan_v1_moe", "HunYuanMoEV1Config",
           {"intermediate_size": INTERMEDIATE, "num_experts": EXPERTS, "moe_topk": 2, "num_shared_expert": 1},
           sharing(PLAIN, INTERMEDIATE), {"router_EH": "gate.wg.weight"}, shared=f"{MIXED}.shared_mlp"),
    Family("hy_v3", "HYV3Config", NUMBER | {"num_shared_experts": 1, "intermediate_size": 10},
           sharing(BIASED, INTERMEDIATE), GATE | {"selection_bias_E": "e_score_correction_bias"},
           shared=SHARED_EXPERTS),
    Family("lfm2_moe", "Lfm2MoeConfig",
           NUMBER | {"intermediate_size": 10, "num_dense_layers": 1, "layer_types": ["full_attention"] * 2},
           BIASED, GATE | {"selection_bias_E": "expert_bias"}, block=FEED_FORWARD),
    Family("jamba", "JambaConfig",
           {"intermediate_size": INTERMEDIATE, "num_experts": EXPERTS, "attn_layer_period": 1,
            "attn_layer_offset": 0, "expert_layer_period": 1, "expert_layer_offset": 0,
            "use_mamba_kernels": False},
           PLAIN, ROUTER, block=FEED_FORWARD),
    Family("longcat_flash", "LongcatFlashConfig",
           {"expert_ffn_hidden_size": INTERMEDIATE, "n_routed_experts": EXPERTS, "zero_expert_num": 2,
            "moe_topk": 2, "ffn_hidden_size": 10, "num_hidden_layers": 4, **LATENT_ATTENTION},
           replace(PLAIN, router=Router(num_experts=EXPERTS, top_k=2, num_zero_experts=2, selection_bias="score")),
           {"router_EH": "router.classifier.weight", "selection_bias_E": "router.e_score_correction_bias"},
           read=identities),
    Family("nemotron_h", "NemotronHConfig",
           ROUTED | {"n_shared_experts": 1, "moe_shared_expert_intermediate_size": SHARED, "n_group": 1,
                     "topk_group": 1, "layers_block_type": ["moe", "moe"]},
           sharing(UNGATED, SHARED), DEEPSEEK, block="model.layers.1.mixer",
           shared="model.layers.1.mixer.shared_experts"),
    Family("gpt_oss", "GptOssConfig", LOCAL, OAI, OAI_ROUTER, read=interleaved),
    Family("openai_privacy_filter", "OpenAIPrivacyFilterConfig", LOCAL, OAI, OAI_ROUTER, read=in_out,
           block="layers.1.mlp", prefix="layers.1", model="OpenAIPrivacyFilterModel"),
    Family("llama4", "Llama4TextConfig", LOCAL | {"intermediate_size_mlp": 10, "interleave_moe_layer_step": 1},
           sharing(PLAIN, INTERMEDIATE), ROUTER, block=FEED_FORWARD, shared=f"{FEED_FORWARD}.shared_expert",
           read=in_out),
    Family("aria", "AriaTextConfig",
           {"intermediate_size": INTERMEDIATE, "moe_num_experts": EXPERTS, "moe_topk": 2,
            "moe_num_shared_experts": 2},
           sharing(PLAIN, 2 * INTERMEDIATE), ROUTER, shared=SHARED_EXPERTS, read=in_out),
    Family("granitemoe", "GraniteMoeConfig", LOCAL, PLAIN, ROUTER, block="model.layers.1.block_sparse_moe"),
    Family("granitemoeshared", "GraniteMoeSharedConfig", LOCAL | {"shared_intermediate_size": SHARED},
           sharing(PLAIN, SHARED), ROUTER, block="model.layers.1.block_sparse_moe",
           shared="model.layers.1.shared_mlp"),
    Family("granitemoehybrid", "GraniteMoeHybridConfig",
           LOCAL | {"shared_intermediate_size": SHARED, "layer_types": ["attention"] * 2, "mamba_n_heads": 2,
                    "mamba_d_head": 12, "mamba_d_state": 4},
           sharing(PLAIN, SHARED), ROUTER, block="model.layers.1.block_sparse_moe",
           shared="model.layers.1.shared_mlp"),
    Family("jetmoe", "JetMoeConfig", LOCAL | {"kv_channels": 6}, replace(PLAIN, output_bias=True),
           {"router_EH": "router.layer.weight", "output_bias_H": "bias"}, read=linear_stacks),
    Family("dbrx", "DbrxConfig",
           {"d_model": HIDDEN, "n_heads": 2, "n_layers": 2, "max_seq_len": 32,
            "ffn_config": {"ffn_hidden_size": INTERMEDIATE, "moe_num_experts": EXPERTS, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}},
           PLAIN, {"router_EH": "router.layer.weight"}, block="transformer.blocks.1.ffn", read=folded),
    Family("minimax_m3_vl", "MiniMaxM3VLTextConfig", LOCAL | {"shared_intermediate_size": SHARED},
           sharing(BIASED, SHARED), DEEPSEEK, shared=SHARED_EXPERTS),
    Family("step3p7", "Step3p7Config", {"text_config": COMMON | ROUTED | STEP, "vision_config": STEP_VISION},
           sharing(BIASED, SHARED), DEEPSEEK, block="model.language_model.layers.1.mlp",
           shared="model.language_model.layers.1.mlp.shared_experts", model="Step3p7ForConditionalGeneration"),
    Family("switch_transformers", "SwitchTransformersConfig",
           {"d_model": HIDDEN, "d_ff": INTERMEDIATE, "num_experts": EXPERTS, "d_kv": 6, "num_layers": 2,
            "num_decoder_layers": 2, "num_heads": 2, "num_sparse_encoder_layers": 1, "pad_token_id": 0},
           replace(PLAIN, experts=MLP(gated=False, activation="relu")), {"router_EH": "router.classifier.weight"},
           block="encoder.block.1.layer.1.mlp", read=modules("wi", "wo"), model="SwitchTransformersModel"),
    Family("nllb_moe", "NllbMoeConfig",
           {"d_model": HIDDEN, "encoder_ffn_dim": INTERMEDIATE, "decoder_ffn_dim": INTERMEDIATE,
            "num_experts": EXPERTS, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
            "encoder_layers": 2, "decoder_layers": 2, "encoder_sparse_step": 1, "decoder_sparse_step": 1,
            "pad_token_id": 0},
           replace(PLAIN, experts=MLP(gated=False, activation="relu", bias=True)),
           {"router_EH": "router.classifier.weight"}, block="encoder.layers.1.ffn", prefix="encoder.layers.1",
           read=modules("fc1", "fc2"), model="NllbMoeModel"),
    *(Family(name, config, {"intermediate_size": INTERMEDIATE}, replace(PLAIN, router=None), {}, read=dense)
      for name, config in (("llama", "LlamaConfig"), ("mistral", "MistralConfig"), ("qwen2", "Qwen2Config"),
                           ("qwen3", "Qwen3Config"))),
]
"""One per model_type that a naming knows."""

EXPERT_NAMES = {"w1": "model.layers.0.block_sparse_moe.experts.{e}.w1.weight",
                "w3": "model.layers.0.block_sparse_moe.experts.{e}.w3.weight",
                "w2": "model.layers.0.block_sparse_moe.experts.{e}.w2.weight"}
GATE_NAME = "model.layers.0.block_sparse_moe.gate.weight"


def mixtral(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The tensors of one Mixtral layer, and one of its attention, small integers that every dtype holds."""
    generator = torch.Generator().manual_seed(7)
    shapes = {GATE_NAME: (EXPERTS, HIDDEN), "model.layers.0.self_attn.q_proj.weight": (HIDDEN, HIDDEN)}
    for e in range(EXPERTS):
        shapes |= {name.format(e=e): (HIDDEN, INTERMEDIATE) if key == "w2" else (INTERMEDIATE, HIDDEN)
                   for key, name in EXPERT_NAMES.items()}
    return {name: torch.randint(-4, 5, shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint of one file."""
    save_file(tensors, folder / "model.safetensors")
    return folder
