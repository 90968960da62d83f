"""A whole layer around a function of experts: routing before it, the ranks' sum after it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from moe_ref.adapters.routed import routed
from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.collectives import enter, leave, once
from moe_ref.contract.comm import Groups
from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.quantised import QuantisedWeights
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Dtype, Format, Stage
from moe_ref.contract.weights import MoEWeights

_NAMES = {TORCH_DTYPES[dtype]: dtype for dtype in Dtype}


@dataclass(frozen=True)
class _Call:
    """What every function of experts is handed.

    x_TH; ids_TK int64, every id in [0, E) or naming no expert; weights_TK in the format declared for them, fp32 else.
    record: shows a stage (rows of the slots served, in (token, slot) order) where there is a trace, else does nothing.
    """

    x_TH: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    spec: MoESpec
    record: Callable[[Stage, torch.Tensor], None]

    @property
    def served_TK(self) -> torch.Tensor:
        """Which slots name an expert."""
        return (self.ids_TK >= 0) & (self.ids_TK < self.spec.num_experts)


@dataclass(frozen=True)
class ExpertsCall(_Call):
    """With weights that are numbers: this tp rank's shard of all experts, w13_EGIH and w2_EHI, and their biases, that
    of w2 zero on all ranks but the first.
    """

    weights: MoEWeights

    @property
    def num_columns(self) -> int:
        """How many columns of the activation this rank has."""
        return self.weights.w2_EHI.shape[2]


@dataclass(frozen=True)
class EncodedCall(_Call):
    """The same with weights that are codes and scales, w13 and w2."""

    weights: QuantisedWeights

    @property
    def num_columns(self) -> int:
        """How many columns of the activation this rank has."""
        return self.weights.w2.num_columns


def _nothing(call: ExpertsCall | EncodedCall, weighted: bool, stages: tuple[Stage, ...]) -> torch.Tensor:
    """What a rank without columns adds: zeros, or the bias of w2; functions of experts refuse such a share.

    In the graph of everything it is handed, so that the backward pass communicates on every rank. weighted: rows are
    shown with their routing weight.
    """
    weights, dtype, served_TK = call.weights, call.x_TH.dtype, call.served_TK
    rows_TKH = torch.zeros_like(call.x_TH)[:, None].expand(-1, call.ids_TK.shape[1], -1)
    if weights.w2_bias_EH is not None:
        rows_TKH = weights.w2_bias_EH[torch.where(served_TK, call.ids_TK, 0)]
    weights_TK1 = torch.where(served_TK, call.weights_TK, 0.0).float()[..., None]
    shown_TKH = rows_TKH * weights_TK1.to(dtype) if weighted else rows_TKH
    gate_up_RGI = call.x_TH.new_zeros(int(served_TK.sum()), call.spec.experts.num_projections, 0)
    shown = {Stage.GATE_UP: gate_up_RGI, Stage.ACT: gate_up_RGI[:, 0], Stage.DOWN: shown_TKH[served_TK]}
    for stage in set(shown) & set(stages):
        call.record(stage, shown[stage].detach())
    matrices = () if isinstance(weights, QuantisedWeights) else (weights.w13_EGIH, weights.w2_EHI)
    held = [tensor.sum() for tensor in (*matrices, weights.w13_bias_EGI) if tensor is not None]
    return once(call.x_TH, False) + ((rows_TKH.float() * weights_TK1).sum(1) + sum(held)).to(dtype)


@dataclass(frozen=True)
class ExpertsLayer:
    """An implementation made of a function `experts`: call -> this rank's weighted sum (T, H), in the dtype of x.

    Its tp ranks hold columns of the activation, as the contract's shards are cut, and the sum is completed by one
    all-reduce. Differentiable where `experts` is, which is not called where a rank has no columns. encoded: the
    function of the schemes that are declared.
    """

    CAPABILITIES: Capabilities
    experts: Callable[[ExpertsCall], torch.Tensor]
    encoded: Callable[[EncodedCall], torch.Tensor] | None = None

    def moe(self, x_TH: torch.Tensor, weights: MoEWeights | QuantisedWeights, spec: MoESpec,
            parallel: Parallel | None = None, groups: Groups | None = None, *, routing: Routing | None = None,
            logits_TE: torch.Tensor | None = None, residual_TH: torch.Tensor | None = None,
            trace: Trace | None = None, check: str = "metadata") -> torch.Tensor:
        """The whole layer, (T, H) in x's dtype, as the contract's `moe`; raises what `experts` raises."""
        groups = groups or Groups()
        chosen = routed(x_TH, weights, spec, routing, logits_TE)
        numerics, stages = self._numerics(weights, _NAMES[x_TH.dtype]), self.CAPABILITIES.stages
        stored = numerics.storage.get(Stage.WEIGHTS, Format.FP32)
        weights_TK = enter(chosen.weights_TK.to(TORCH_DTYPES[stored]), groups.tp)
        if weights.w2_bias_EH is not None:
            # Whole on every rank, and once in the sum over ranks.
            weights = replace(weights, w2_bias_EH=once(enter(weights.w2_bias_EH, groups.tp), groups.tp.rank == 0))
        handed = (enter(x_TH, groups.tp), chosen.ids_TK.long(), weights_TK, spec,
                  trace.record if trace is not None else lambda stage, tensor: None)
        call = EncodedCall(*handed, weights) if isinstance(weights, QuantisedWeights) else ExpertsCall(*handed, weights)
        if Stage.LOGITS in stages and routing is None and chosen.logits_TE is not None:
            call.record(Stage.LOGITS, chosen.logits_TE.detach())
        call.record(Stage.IDS, call.ids_TK)
        call.record(Stage.WEIGHTS, weights_TK.detach())
        merged_TH = self._merged(call) if call.num_columns else _nothing(call, numerics.weight_at == "down", stages)
        call.record(Stage.MERGED, merged_TH.detach())
        y_TH = leave(merged_TH, groups.tp)
        return y_TH if residual_TH is None else y_TH + residual_TH

    def _numerics(self, weights: MoEWeights | QuantisedWeights, dtype: Dtype) -> Numerics:
        if not isinstance(weights, QuantisedWeights):
            return self.CAPABILITIES.numerics[dtype]
        declared = (one.schemes.get(weights.scheme, {}) for one in (self.CAPABILITIES, *self.CAPABILITIES.others))
        return next(of_dtype[dtype] for of_dtype in declared if dtype in of_dtype)

    def _merged(self, call: ExpertsCall | EncodedCall) -> torch.Tensor:
        if isinstance(call, ExpertsCall):
            return self.experts(call)
        assert self.encoded is not None
        return self.encoded(call)
