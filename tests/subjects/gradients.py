"""Layers with gradients: right ones with rounded rows, and mistakes of the backward direction; all right forward."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from moe_ref.contract.comm import Comm, Groups
from moe_ref.contract.features import Feature
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Direction
from moe_ref.contract.weights import ExpertWeights, MoEWeights
from tests.subjects.base import Call
from tests.subjects.whole import WholeSpec
from tests.subjects.whole_variants import BlackBox, EagerLoop, FP32Throughout, WeightedActivation

Change = Callable[[torch.Tensor], torch.Tensor]


class _Changed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor, change: Change) -> torch.Tensor:
        ctx.change = change
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):  # type: ignore[override]
        return ctx.change(gradient), None


def changed(tensor: torch.Tensor, change: Change) -> torch.Tensor:
    """The tensor itself, its gradient changed."""
    return _Changed.apply(tensor, change)


class _Leave(torch.autograd.Function):
    """An all-reduce whose result is everybody's, and so is its gradient."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, comm: Comm) -> torch.Tensor:
        return comm.all_reduce(tensor)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):  # type: ignore[override]
        return gradient, None


def enter(tensor: torch.Tensor, comm: Comm) -> torch.Tensor:
    """What every rank holds whole: the gradient is completed by an all-reduce in the tensor's own dtype."""
    return changed(tensor, comm.all_reduce) if comm.size > 1 else tensor


WHOLE = ("router_EH", "router_bias_E", "weight_scale_E", "shared_gate_SH", "output_bias_H", "w2_bias_EH",
         "shared_w2_bias_H")
"""Parameters that every rank holds."""


class Rounded(WholeSpec):
    """fp32 arithmetic. Autograd rounds gradients of rows where the forward pass rounds the rows.

    Every rank sends its part of the routing weights' gradient through the router, and what all ranks hold is completed
    by an all-reduce in its own dtype. Experts and partial sums are those of WholeSpec. Capacities are left out: where a
    token loses every slot, autograd divides 0 by 0.
    """

    features = tuple(feature for feature in Feature if feature is not Feature.CAPACITY)

    def __init__(self) -> None:
        super().__init__()
        self.CAPABILITIES = replace(self.CAPABILITIES, directions=tuple(Direction))

    def moe(self, x_TH: torch.Tensor, weights: MoEWeights, spec: MoESpec, parallel: Parallel | None = None,
            groups: Groups | None = None, *, routing: Routing | None = None, logits_TE: torch.Tensor | None = None,
            residual_TH: torch.Tensor | None = None, trace: Trace | None = None) -> torch.Tensor:
        groups = groups or Groups()
        whole = {name: enter(tensor, groups.tp) for name, tensor in weights.named_tensors() if name in WHOLE}
        logits_TE = None if logits_TE is None else enter(logits_TE, groups.tp)
        return super().moe(enter(x_TH, groups.tp), replace(weights, **whole), spec, parallel, groups,
                           routing=routing, logits_TE=logits_TE, residual_TH=residual_TH, trace=trace)

    def all_reduce(self, call: Call, merged_TH: torch.Tensor) -> torch.Tensor:
        return _Leave.apply(merged_TH, call.groups.tp) if call.size > 1 else merged_TH

    def rows(self, call: Call, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        # A rank without a row still takes part in the backward collectives.
        return super().rows(call, ids_TK, weights_TK) + 0 * (call.x_TH.sum() + weights_TK.sum())


class RoundedThroughout(Rounded, EagerLoop):
    """Every elementwise step is rounded, gate and up are stored, rows are weighted when they are merged."""


class RoundedLast(Rounded, FP32Throughout):
    """fp32 rows and partial sums; only what is returned is rounded."""


class RoundedWeightedActivation(Rounded, WeightedActivation):
    """The routing weight joins the activation."""


class RoundedHidden(Rounded, BlackBox):
    """Shows nothing but its output and its gradients."""


class WeightsDetached(Rounded):
    """No gradient reaches the router through the routing weights."""

    def rows(self, call: Call, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        return super().rows(call, ids_TK, weights_TK.detach())


class WeightTwice(Rounded):
    """The gradient of a row is multiplied by its weight twice."""

    def weighted(self, call: Call, down_RH: torch.Tensor, weight_R1: torch.Tensor) -> torch.Tensor:
        weight = weight_R1.detach()
        return super().weighted(call, changed(down_RH, lambda gradient: gradient * weight), weight_R1)


class RanksDiffer(Rounded):
    """The last rank's gradient of the router has other last bits: inside the bound, but declared equal."""

    def moe(self, x_TH: torch.Tensor, weights: MoEWeights, spec: MoESpec, parallel: Parallel | None = None,
            groups: Groups | None = None, **options: Any) -> torch.Tensor:
        if weights.router_EH is not None and groups is not None and groups.rank == groups.tp.size - 1:
            weights = replace(weights, router_EH=changed(weights.router_EH, lambda gradient: gradient * (1 + 2.0**-20)))
        return super().moe(x_TH, weights, spec, parallel, groups, **options)


class _NarrowSum(torch.autograd.Function):
    """act @ w2^T whose weight gradient is added up row by row in bf16."""

    @staticmethod
    def forward(ctx, act_RI: torch.Tensor, w2_HI: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(act_RI, w2_HI)
        return act_RI @ w2_HI.T

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):  # type: ignore[override]
        act_RI, w2_HI = ctx.saved_tensors
        total = torch.zeros_like(w2_HI, dtype=torch.bfloat16)
        for row_H, row_I in zip(gradient, act_RI, strict=True):
            total += torch.outer(row_H, row_I).to(torch.bfloat16)
        return gradient @ w2_HI, total.to(w2_HI.dtype)


class WeightGradientInBf16(Rounded):
    """Sums over rows in bf16."""

    def projected_back(self, call: Call, act_RI: torch.Tensor, expert: ExpertWeights) -> torch.Tensor:
        return _NarrowSum.apply(act_RI, expert.w2_HI.float())


rounded = Rounded()
rounded_hidden = RoundedHidden()
