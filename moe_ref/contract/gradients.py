"""What a backward pass returns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch


class ExpertGradients(NamedTuple):
    """Gradients of one expert's w13_GIH, w2_HI and of their biases where it has them, as in ExpertWeights."""

    w13_GIH: torch.Tensor
    w2_HI: torch.Tensor
    w13_bias_GI: torch.Tensor | None = None
    w2_bias_H: torch.Tensor | None = None


OnExpert = Callable[[int, ExpertGradients], None]
"""Takes one routed expert's gradients as soon as they are complete, so that nobody holds E of them."""


@dataclass(frozen=True, kw_only=True)
class RouterGradients:
    """What reaches the router and its inputs through the routing weights; None where nothing does.

    x_TH is the routing's share of the tokens' gradient. logits_TE: of x @ router^T + bias, before scale and cap.
    """

    x_TH: torch.Tensor
    logits_TE: torch.Tensor | None = None
    router_EH: torch.Tensor | None = None
    router_bias_E: torch.Tensor | None = None
    weight_scale_E: torch.Tensor | None = None
    shared_gate_SH: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Gradients of every input of a layer; parameters under their names in MoEWeights, shards as shards.

    None: the spec has no such tensor, an injected tensor took its place, or on_expert received it. weights_TK and
    shared_TS: of the routing weights and of the shared gates as the experts get them; exactly 0 where the id is no
    expert. selection_bias_E has no gradient: it only selects. residual_TH is the gradient of the output itself.
    """

    x_TH: torch.Tensor
    weights_TK: torch.Tensor
    shared_TS: torch.Tensor | None = None
    logits_TE: torch.Tensor | None = None
    residual_TH: torch.Tensor | None = None
    w13_EGIH: torch.Tensor | None = None
    w2_EHI: torch.Tensor | None = None
    w13_bias_EGI: torch.Tensor | None = None
    w2_bias_EH: torch.Tensor | None = None
    router_EH: torch.Tensor | None = None
    router_bias_E: torch.Tensor | None = None
    weight_scale_E: torch.Tensor | None = None
    shared_w13_GIH: torch.Tensor | None = None
    shared_w2_HI: torch.Tensor | None = None
    shared_w13_bias_GI: torch.Tensor | None = None
    shared_w2_bias_H: torch.Tensor | None = None
    shared_gate_SH: torch.Tensor | None = None
    output_bias_H: torch.Tensor | None = None
