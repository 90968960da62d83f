"""transformers: from_pretrained in bf16 rounds the selection bias of some models. 0: seen, 1: not, 2: cannot run."""

import sys
import tempfile

try:
    import torch
    import transformers

    ARCHITECTURES = {
        "minimax_m2": ("MiniMaxM2ForCausalLM", "MiniMaxM2Config"),
        "minimax_m3_vl": ("MiniMaxM3VLForCausalLM", "MiniMaxM3VLTextConfig"),
        "afmoe": ("AfmoeForCausalLM", "AfmoeConfig"),
        "laguna": ("LagunaForCausalLM", "LagunaConfig"),
        "longcat_flash": ("LongcatFlashForCausalLM", "LongcatFlashConfig"),
        "kimi_linear": ("KimiLinearForCausalLM", "KimiLinearConfig"),
        "step3p7": ("Step3p7TextModel", "Step3p7TextConfig"),
        "lfm2_moe": ("Lfm2MoeForCausalLM", "Lfm2MoeConfig"),
        "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config"),
        "glm4_moe": ("Glm4MoeForCausalLM", "Glm4MoeConfig"),
    }
    CLASSES = {title: tuple(getattr(transformers, name) for name in names) for title, names in ARCHITECTURES.items()}
except (ImportError, AttributeError) as error:
    print(f"CANNOT RUN: {error}")
    sys.exit(2)

EXPERTS, TOP_K, TOKENS = 256, 8, 4096
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16,
         "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
         "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS, "num_experts": EXPERTS,
         "num_experts_per_tok": TOP_K, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
         "num_dense_layers": 0, "use_expert_bias": True, "mlp_layer_types": ["sparse"], "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
FULL = {"layer_types": ["full_attention"]}
OTHERS = {"afmoe": FULL, "lfm2_moe": FULL, "laguna": FULL | {"num_attention_heads_per_layer": [2]},
          "deepseek_v3": LATENT, "kimi_linear": LATENT | FULL | {"q_lora_rank": None},
          "longcat_flash": LATENT | {"num_layers": 1, "num_hidden_layers": 2, "zero_expert_num": 0, "moe_topk": TOP_K,
                                     "ffn_hidden_size": 16, "expert_ffn_hidden_size": 16},
          "minimax_m3_vl": FULL, "step3p7": FULL | {"share_expert_dim": 16}}


def biases(model):
    return [value for key, value in model.state_dict().items()
            if key.endswith(("e_score_correction_bias", "expert_bias"))]


def loaded(title, folder):
    """The bias of the first layer as stored, fp32, and as from_pretrained gives it in bf16."""
    model_class, config_class = CLASSES[title]
    model = model_class(config_class(**(SIZES | OTHERS.get(title, {}))))
    torch.manual_seed(0)
    for value in biases(model):
        value.copy_(6.8 + 0.25 * torch.rand(EXPERTS))
    model.save_pretrained(folder)
    return biases(model)[0], biases(model_class.from_pretrained(folder, dtype=torch.bfloat16))[0]


def main() -> int:
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rounded = []
    scores = torch.sigmoid(torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(1)))
    for title in CLASSES:
        with tempfile.TemporaryDirectory() as folder:
            stored, value = loaded(title, folder)
        chosen = [(scores + bias.float()).topk(TOP_K).indices.sort().values for bias in (stored, value)]
        moved = int((chosen[0] != chosen[1]).any(1).sum())
        print(f"{title:13s} {str(stored.dtype)[6:]} -> {str(value.dtype)[6:]:8s}: {len(stored.unique())} values are "
              f"{len(value.unique()):3d}, {moved:4d} of {TOKENS} tokens choose other experts")
        if value.dtype == torch.bfloat16:
            rounded.append(title)
    if set(rounded) & {"deepseek_v3", "glm4_moe"}:
        raise RuntimeError("models that ask for fp32 are rounded too: this script does not measure what it says")
    print(f"SEEN: {', '.join(rounded)}" if rounded else "NOT SEEN")
    return 0 if rounded else 1


if __name__ == "__main__":
    sys.exit(main())
