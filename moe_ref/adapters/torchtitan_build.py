"""A spec as torchtitan's configuration, and the harness's tensors under the names of its parameters."""

import torch
from torchtitan.models.common.feed_forward import FeedForward, SigmoidGatedFeedForward  # type: ignore[missing-import]
from torchtitan.models.common.linear import Linear  # type: ignore[missing-import]
from torchtitan.models.common.moe import (  # type: ignore[missing-import]
    GroupedExperts,
    MoE,
    RoutedExperts,
    TokenChoiceTopKRouter,
)
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher  # type: ignore[missing-import]
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts  # type: ignore[missing-import]

from moe_ref.contract.collectives import enter, once
from moe_ref.contract.comm import Comm
from moe_ref.contract.errors import raise_faults
from moe_ref.contract.spec import MLP, MoESpec, Router
from moe_ref.contract.weights import MoEWeights

EPSILON = 1e-20
"""What TokenChoiceTopKRouter.forward adds to the sum that it divides by; beside a sum of scores it is 0."""


def build(spec: MoESpec, intermediate_size: int, shared_size: int) -> MoE:
    """The module in eval mode, without memory, for a rank's columns of routed and shared experts.

    UsageValueError for options that it does not have.
    """
    router, shared, hidden = spec.router, spec.shared, spec.hidden_size
    assert router is not None
    raise_faults("adapters.torchtitan", _faults(spec, router))
    experts: GroupedExperts.Config
    if spec.experts.limit is None:
        experts = GroupedExperts.Config(dim=hidden, hidden_dim=intermediate_size, num_experts=router.num_experts)
    else:
        experts = GptOssGroupedExperts.Config(dim=hidden, hidden_dim=intermediate_size, num_experts=router.num_experts,
                                              swiglu_limit=spec.experts.limit)
    feed_forward = None
    if shared is not None:
        matrices = {"w1": _linear(hidden, shared_size), "w2": _linear(shared_size, hidden),
                    "w3": _linear(hidden, shared_size)}
        feed_forward = (SigmoidGatedFeedForward.Config(**matrices, gate=_linear(hidden, 1))
                        if shared.gate == "sigmoid" else FeedForward.Config(**matrices))
    groups = (router.num_groups, router.num_groups_kept) if router.num_groups > 1 else (None, None)
    dispatcher = LocalTokenDispatcher.Config(num_experts=router.num_experts, top_k=router.top_k)
    config = MoE.Config(
        num_experts=router.num_experts, shared_experts=feed_forward,
        load_balance_coeff=1e-3 if router.selection_bias else None,
        routed_experts=RoutedExperts.Config(inner_experts=experts, token_dispatcher=dispatcher),
        router=TokenChoiceTopKRouter.Config(
            num_experts=router.num_experts, gate=_linear(hidden, router.num_experts, router.logit_bias),
            num_expert_groups=groups[0], num_limited_groups=groups[1], top_k=router.top_k, score_func=router.score,
            route_norm=router.renormalize, route_scale=router.scaling_factor))
    with torch.device("meta"):
        return config.build().eval()


def _linear(inputs: int, outputs: int, bias: bool = False) -> Linear.Config:
    return Linear.Config(in_features=inputs, out_features=outputs, bias=bias)


def _faults(spec: MoESpec, router: Router) -> list[str]:
    """What it has no option for and what no feature of the contract says."""
    experts, shared = spec.experts, spec.shared
    plain, oai = MLP(), MLP(bias=True, limit=experts.limit, sigmoid_scale=1.702, up_offset=1.0)
    found = [(experts != plain and (experts.limit is None or experts != oai), f"experts {experts}"),
             (shared is not None and shared.mlp != plain, "a shared expert that is no plain SwiGLU"),
             (router.num_groups > 1 and router.group_score != "top2_sum", f"group_score {router.group_score}"),
             (router.renormalize and router.renormalize_epsilon not in (0.0, EPSILON),
              f"renormalize_epsilon {router.renormalize_epsilon}")]
    return [f"{what}, which torchtitan does not have" for is_there, what in found if is_there]


def parameters(weights: MoEWeights, spec: MoESpec, tp: Comm) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the module by name, those of the router in fp32: views as far as its layout allows."""
    w13_EGIH, w2_EHI = weights.w13_EGIH, weights.w2_EHI
    if weights.w13_bias_EGI is None:
        routed = {"w1_EFD": w13_EGIH[:, 0], "w3_EFD": w13_EGIH[:, 1], "w2_EDF": w2_EHI}
    else:
        assert weights.w2_bias_EH is not None
        routed = {"mlp1_weight_EGD": w13_EGIH.transpose(1, 2).flatten(1, 2), "mlp2_weight_EDF": w2_EHI,
                  "mlp1_bias_EG": weights.w13_bias_EGI.transpose(1, 2).flatten(1, 2),
                  "mlp2_bias_ED": once(enter(weights.w2_bias_EH, tp), tp.rank == 0)}
    named: dict[str, torch.Tensor | None] = {
        f"routed_experts.inner_experts.{name}": tensor for name, tensor in routed.items()}
    assert weights.router_EH is not None
    named |= {"router.gate.weight": weights.router_EH.float(), "expert_bias_E": weights.selection_bias_E}
    if weights.router_bias_E is not None:
        named["router.gate.bias"] = weights.router_bias_E.float()
    if weights.shared_w13_GIH is not None:
        named |= {"shared_experts.w1.weight": weights.shared_w13_GIH[0],
                  "shared_experts.w3.weight": weights.shared_w13_GIH[1],
                  "shared_experts.w2.weight": weights.shared_w2_HI}
    if weights.shared_gate_SH is not None:
        named["shared_experts.gate.weight"] = enter(weights.shared_gate_SH, tp)
    named["tokens_per_expert_E"] = torch.zeros(spec.num_experts)
    return {name: tensor for name, tensor in named.items() if tensor is not None}
