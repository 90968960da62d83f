"""Architectures whose router is outside the spec, or whose layer is not one: compared with something injected."""

from typing import Any

import torch
from torch import nn

from moe_ref.contract.released import ReleasedNumerics
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MLP, Capacity, MoESpec, Router, SharedExpert
from tests.third_party.families.deepseek import CLAMPED, FP32
from tests.third_party.families.sigmoid import ROUTED
from tests.third_party.families.softmax import LOCAL, MOE, PLAIN, spec
from tests.third_party.family import SEQUENCE, TOKENS, E, Family, H, I, K, Tensors
from tests.third_party.read import plain, plain_router, shared_mlp, stacked, triple

CAPACITY, NLLB_CAPACITY = 3, 6


class GemmaLayer(nn.Module):
    """Router and experts of a Gemma on the same tokens; its decoder layer puts a norm before the experts."""

    def __init__(self, router: nn.Module, experts: nn.Module) -> None:
        super().__init__()
        self.router, self.experts = router, experts

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        flat = hidden_states.flatten(0, -2)
        _, weights_TK, ids_TK = self.router(flat)
        return self.experts(flat, ids_TK, weights_TK).view_as(hidden_states)


def _gemma(module: str, prefix: str) -> Family:
    def make(config: Any, modeling: Any) -> nn.Module:
        router, experts = getattr(modeling, f"{prefix}Router"), getattr(modeling, f"{prefix}Experts")
        return GemmaLayer(router(config), experts(config))
    router = Router(num_experts=E, top_k=K, renormalize=True, learned_scale="expert")
    return Family(module=module, config=f"{prefix}Config", make=make, router="router", logits="router.proj",
                  fit="logits", because="the router norms and scales the tokens by itself",
                  options={"hidden_size": H, "moe_intermediate_size": I, "num_experts": E, "top_k_experts": K,
                           "enable_moe_block": True},
                  spec=MoESpec(hidden_size=H, intermediate_size=I, router=router,
                               experts=MLP(activation="gelu_tanh")),
                  read=lambda block: stacked(block.experts) | {"router_EH": block.router.proj.weight,
                                                               "weight_scale_E": block.router.per_expert_scale},
                  routing=triple)


class HashLayer(nn.Module):
    """A hash layer of DeepSeek-V4, with the token ids that choose its experts."""

    def __init__(self, config: Any, modeling: Any) -> None:
        super().__init__()
        self.block = modeling.DeepseekV4SparseMoeBlock(config, 0)
        table = torch.stack([(torch.arange(K) * 3 + token) % E for token in range(config.vocab_size)])
        self.block.gate.tid2eid.copy_(table)
        self.register_buffer("input_ids", torch.arange(TOKENS) % config.vocab_size, persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.block(hidden_states, self.input_ids)


class MuseSparkRouter(nn.Module):
    """Muse Spark's router alone: its experts are normalised before they are weighted."""

    def __init__(self, config: Any, modeling: Any) -> None:
        super().__init__()
        self.gate = modeling.MuseSparkTopkRouter(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.gate(hidden_states)[1]


def _switch_read(block: nn.Module) -> Tensors:
    """One module of two Linear per expert."""
    experts = [block.experts[f"expert_{e}"] for e in range(E)]
    return {"w13_EGIH": torch.stack([expert.wi.weight for expert in experts])[:, None],
            "w2_EHI": torch.stack([expert.wo.weight for expert in experts]),
            "router_EH": block.router.classifier.weight}


def _switch_routing(output: Any, block: nn.Module, spec: MoESpec) -> Routing:
    """One-hot choices (B, S, E), zero where the expert was full, and the largest probability (B, S, 1)."""
    chosen_TE, weights_TK = output[0].flatten(0, 1), output[1].flatten(0, 1)
    kept_T1 = chosen_TE.sum(-1, keepdim=True) > 0
    ids_TK = torch.where(kept_T1, chosen_TE.argmax(-1, keepdim=True), -1)
    return Routing(ids_TK, torch.where(kept_T1, weights_TK, 0.0))


def _unrouted(block: nn.Module) -> Tensors:
    """Stacked experts and a router of zeros: nothing reads it when the routing is injected."""
    experts = block.experts
    return stacked(experts) | {"router_EH": experts.down_proj.new_zeros(E, H)}


class NllbRouter(nn.Module):
    """NLLB's router alone: its block runs experts 0 and 1 only, whatever the router says."""

    def __init__(self, config: Any, modeling: Any) -> None:
        super().__init__()
        self.gate = modeling.NllbMoeTop2Router(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.gate(hidden_states.flatten(0, 1))[1]


def _nllb_routing(output: Any, block: nn.Module, spec: MoESpec) -> Routing:
    """Weights (T, E), zero where not chosen or dropped."""
    weights_TK, ids_TK = output[1].topk(spec.top_k, -1)
    return Routing(torch.where(weights_TK > 0, ids_TK, -1), weights_TK)


def _nllb(name: str, after: bool) -> Family:
    # The sum is clamped at the machine epsilon of the tokens' dtype, which is fp32's here.
    router = Router(num_experts=E, top_k=2, renormalize=True, epsilon_rule="clamp", renormalize_epsilon=2.0**-23,
                    capacity=Capacity(tokens=NLLB_CAPACITY, priority="choice", renormalize_after=after))
    return Family(module="nllb_moe", name=name, config="NllbMoeConfig", make=NllbRouter, fit="router",
                  because="the block runs experts 0 and 1 only, whatever the router says",
                  options={"d_model": H, "num_experts": E, "normalize_router_prob_before_dropping": not after,
                           "moe_eval_capacity_token_fraction": NLLB_CAPACITY / TOKENS},
                  spec=spec(router), released=ReleasedNumerics(logits="fp32", score="model", weight="model"),
                  kept=("classifier",), routing=_nllb_routing,
                  read=lambda router: {"w13_EGIH": torch.zeros(E, 2, I, H), "w2_EHI": torch.zeros(E, H, I),
                                       "router_EH": router.gate.classifier.weight})


FAMILIES = [
    _nllb("nllb_moe", after=True),
    _nllb("nllb_moe_before", after=False),
    Family(module="switch_transformers", config="SwitchTransformersConfig", block="SwitchTransformersSparseMLP",
           options={"d_model": H, "d_ff": I, "num_experts": E, "expert_capacity": CAPACITY, "dropout_rate": 0.0},
           spec=MoESpec(hidden_size=H, intermediate_size=I, experts=MLP(activation="relu", gated=False),
                        router=Router(num_experts=E, top_k=1, capacity=Capacity(
                            tokens=CAPACITY, priority="token", sequence_length=SEQUENCE))),
           # Probabilities are rounded to the model's dtype before the largest is sought.
           released=ReleasedNumerics(logits="fp32", score="model", weight="model"), router="router",
           # An expert that no token chose has no gradient.
           kept=("classifier",), unread="experts.", read=_switch_read, routing=_switch_routing),
    _gemma("gemma4", "Gemma4Text"),
    _gemma("diffusion_gemma", "DiffusionGemmaText"),
    Family(module="deepseek_v4", name="deepseek_v4_hash", config="DeepseekV4Config",
           make=HashLayer, router="block.gate", fit="routing",
           because="the expert ids are looked up by token id",
           options=ROUTED | {"swiglu_limit": 1.0, "mlp_layer_types": ["hash_moe"], "num_hidden_layers": 1,
                             "vocab_size": 40},
           spec=spec(PLAIN, CLAMPED, SharedExpert(intermediate_size=I, mlp=CLAMPED)),
           released=ReleasedNumerics(score="model", weight="model"), routing=triple,
           read=lambda layer: plain(layer.block) | shared_mlp(layer.block.shared_experts)),
    Family(module="phimoe", config="PhimoeConfig", block="PhimoeSparseMoeBlock", router="router", fit="routing",
           because="SparseMixer: two masked softmaxes, one after the other",
           options=LOCAL | {"num_experts_per_tok": 2}, spec=spec(Router(num_experts=E, top_k=2)),
           released=ReleasedNumerics(score="model", weight="model"), read=plain_router, routing=triple),
    Family(module="zaya", config="ZayaConfig", block="ZayaSparseMoeBlock", arguments=(0,), fit="routing",
           because="the router is an MLP with a state and a class that skips the experts",
           options=MOE | {"num_experts_per_tok": 1, "router_hidden_size": 32},
           spec=spec(Router(num_experts=E, top_k=1)), released=ReleasedNumerics(score="model", weight="model"),
           read=_unrouted, routing=triple),
    Family(module="muse_spark", config="MuseSparkTextConfig", make=MuseSparkRouter,
           fit="router", because="every expert's output passes an RMSNorm before it is weighted",
           options={"hidden_size": H, "num_local_experts": E, "num_experts_per_tok": K, "output_multiplier": 0.8,
                    "routed_scaling_factor": 1.0, "num_attention_heads": 4, "num_key_value_heads": 4},
           spec=spec(Router(num_experts=E, top_k=K, score="sigmoid", selection_bias="score", logit_scale=0.8,
                            renormalize=True, renormalize_epsilon=1e-15)),
           released=FP32, routing=triple,
           read=lambda router: {"w13_EGIH": torch.zeros(E, 2, I, H), "w2_EHI": torch.zeros(E, H, I),
                                "router_EH": router.gate.weight,
                                "selection_bias_E": router.gate.e_score_correction_bias}),
]

NOT_COVERED = {"doge": "product keys choose among experts of rank one"}
"""Architectures with experts of their own that are compared with nothing, and why."""
