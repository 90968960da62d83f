"""Tiny whole models of transformers, and what their experts were handed and gave: x, ids, weights, output, gradient."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

SIZES = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROUTED = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}

CONFIGS: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**SIZES, intermediate_size=32),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **ROUTED, num_experts=8),
    "deepseek_v3": DeepseekV3Config(**SIZES | ROUTED | {
        "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 64, "n_routed_experts": 8, "n_group": 2,
        "topk_group": 1, "first_k_dense_replace": 0, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 16}),
    # Its limit is released as 7, which these numbers would not reach.
    "gpt_oss": GptOssConfig(**SIZES, intermediate_size=32, num_local_experts=8, num_experts_per_tok=2,
                            swiglu_limit=0.5),
}

IDS = torch.tensor([[5, 99, 3, 64, 17, 17, 120, 33, 8], [77, 41, 9, 100, 3, 56, 12, 88, 64]])


@dataclass
class Layer:
    """One call of one experts module."""

    module: nn.Module
    x_TH: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    output_TH: torch.Tensor
    gradients: list[torch.Tensor] = field(default_factory=list)


def model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model in evaluation mode; every parameter drawn, biases too, which a new model has at 0."""
    made = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return made.to(dtype)


@contextmanager
def watched(made: nn.Module) -> Iterator[list[Layer]]:
    """Calls of the experts while the context lasts, with the gradients that arrive at their outputs."""
    calls: list[Layer] = []

    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        layer = Layer(module, *(one.detach().clone() for one in (*inputs, output)))
        if output.requires_grad:
            output.register_hook(lambda gradient: layer.gradients.append(gradient.detach().clone()))
        calls.append(layer)

    experts = [module for module in made.modules() if hasattr(module, "is_transposed")]
    handles = [module.register_forward_hook(hook) for module in experts]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
