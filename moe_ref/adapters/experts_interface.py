"""Our experts inside whole models of transformers: `register` a function, then `model.set_experts_implementation`.

transformers 5.23 hands its experts modules to the registered function, with tokens, ids and weights that the model's
own router made. What a module computes is read from it; a gate that is not in the list below is refused, since
parameters alone do not tell a clamped SwiGLU from a plain one.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_ref.adapters.transformers_blocks.family import ACTIVATIONS
from moe_ref.contract.errors import UsageTypeError, UsageValueError
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MLP, Activation, MoESpec, Router
from moe_ref.contract.weights import MoEWeights


class ExpertsFunction(Protocol):
    """moe_ref.experts, moe_fast.experts, or what is called alike."""

    def __call__(self, x_TH: torch.Tensor, routing: Routing, weights: MoEWeights, spec: MoESpec,
                 /) -> torch.Tensor: ...


def register(name: str, experts: ExpertsFunction) -> None:
    """Make `experts` the experts implementation `name` of every model of transformers in this process.

    UsageValueError for a name of transformers' own, UsageTypeError for what cannot be called.
    """
    if not callable(experts):
        raise UsageTypeError(f"experts: {type(experts).__name__}, but should be a function as moe_ref.experts")
    if name in _TAKEN:
        raise UsageValueError(f"name {name!r}, but should be none of transformers' own: {', '.join(sorted(_TAKEN))}")

    def forward(module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor,
                top_k_weights: torch.Tensor) -> torch.Tensor:
        weights, spec = experts_weights(module), experts_spec(module, top_k_index.shape[1])
        return experts(hidden_states, Routing(top_k_index, top_k_weights), weights, spec).to(hidden_states.dtype)

    ALL_EXPERTS_FUNCTIONS.register(name, forward)


_TAKEN = frozenset({"eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()})


def experts_weights(module: nn.Module) -> MoEWeights:
    """The module's parameters as the contract's, differentiable views of them; the router's place holds zeros.

    By the marks of `use_experts_implementation`: with or without gate, transposed, gate and up one after the other or
    in turns, with biases.
    """
    held: Any = module
    w13_ENH = held.gate_up_proj if held.has_gate else held.up_proj
    w2_EHI = held.down_proj
    if held.is_transposed:
        w13_ENH, w2_EHI = w13_ENH.transpose(1, 2), w2_EHI.transpose(1, 2)
    bias_EN = None
    if held.has_bias:
        bias_EN = held.gate_up_proj_bias if held.has_gate else held.up_proj_bias
    return MoEWeights(w13_EGIH=_by_projection(held, w13_ENH), w2_EHI=w2_EHI,
                      w13_bias_EGI=None if bias_EN is None else _by_projection(held, bias_EN),
                      w2_bias_EH=held.down_proj_bias if held.has_bias else None,
                      router_EH=w2_EHI.new_zeros(()).expand(len(w2_EHI), w2_EHI.shape[1]))


def _by_projection(module: Any, tensor: torch.Tensor) -> torch.Tensor:
    """(E, N, ...) as (E, G, I, ...)."""
    if not module.has_gate:
        return tensor[:, None]
    if module.is_concatenated:
        return tensor.unflatten(1, (2, -1))
    return tensor.unflatten(1, (-1, 2)).transpose(1, 2)


def experts_spec(module: nn.Module, top_k: int) -> MoESpec:
    """What the module computes for a given routing; UsageValueError where that cannot be told."""
    weights = experts_weights(module)
    return MoESpec(hidden_size=weights.w2_EHI.shape[1], intermediate_size=weights.w2_EHI.shape[2],
                   router=Router(num_experts=len(weights.w2_EHI), top_k=top_k), experts=_mlp(module))


def _mlp(module: Any) -> MLP:
    whose = f"{type(module).__name__}"
    if module.has_post_expert_norm:
        raise UsageValueError(f"{whose}: a norm after every expert, but experts should end with down_proj")
    if not module.has_gate:
        return MLP(activation=_activation(module, whose), gated=False, bias=module.has_bias)
    gate = getattr(module._apply_gate, "__func__", None)
    known = GATES.get((getattr(gate, "__module__", ""), getattr(gate, "__qualname__", "")))
    if known is None:
        raise UsageValueError(f"{whose}: a gate of its own, {getattr(gate, '__qualname__', module._apply_gate)}, but "
                              f"should be one of {', '.join(name for _, name in GATES)}")
    return MLP(**{"bias": module.has_bias} | known(module, whose))


def _activation(module: Any, whose: str) -> Activation:
    """Our word for the module's act_fn, by its class."""
    found = type(module.act_fn)
    for word, name in ACTIVATIONS.items():
        if found is type(ACT2FN[name]):
            return word
    raise UsageValueError(f"{whose}: activation {found.__name__}, but should be one of {', '.join(ACTIVATIONS)}")


def _plain(module: Any, whose: str) -> dict[str, Any]:
    """act_fn(gate) * up."""
    return {"activation": _activation(module, whose)}


def _clamped(limit: str) -> Callable[[Any, str], dict[str, Any]]:
    """silu of the clamped gate times the clamped up."""
    return lambda module, whose: {"limit": getattr(module, limit)}


def _oai(limit: str, alpha: str) -> Callable[[Any, str], dict[str, Any]]:
    """The SwiGLU of gpt-oss: (up + 1) gate sigmoid(alpha gate), both clamped."""
    return lambda module, whose: {"limit": getattr(module, limit), "sigmoid_scale": getattr(module, alpha),
                                  "up_offset": 1.0}


def _of(module: str, name: str) -> tuple[str, str]:
    return f"transformers.models.{module}.modeling_{module}", f"{name}._apply_gate"


GATES: Mapping[tuple[str, str], Callable[[Any, str], dict[str, Any]]] = {
    ("transformers.integrations.moe", "_default_apply_gate"): _plain,
    _of("gpt_oss", "GptOssExperts"): _oai("limit", "alpha"),
    _of("openai_privacy_filter", "OpenAIPrivacyFilterExperts"): _oai("limit", "alpha"),
    _of("glm5_next", "Glm5NextTextExperts"): _clamped("swiglu_limit"),
    _of("hy_v4", "HYV4Experts"): _clamped("swiglu_limit"),
}
"""Gates that were read, by module and name of the function; subclasses inherit theirs, others are refused."""
