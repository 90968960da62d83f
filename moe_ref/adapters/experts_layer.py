"""A whole layer around a function of experts: routing before it, the ranks' sum after it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from moe_ref.adapters.routed import routed
from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.collectives import enter, leave, once
from moe_ref.contract.comm import Groups
from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Dtype, Format, Stage
from moe_ref.contract.weights import MoEWeights

_NAMES = {TORCH_DTYPES[dtype]: dtype for dtype in Dtype}


@dataclass(frozen=True)
class ExpertsCall:
    """What a function of experts is handed.

    x_TH; ids_TK int64, every id in [0, E) or naming no expert; weights_TK in the format declared for them, fp32 else;
    weights: this tp rank's shard of all experts, w13_EGIH and w2_EHI, and their biases, that of w2 zero on all ranks
    but the first. record: shows a stage (rows of the slots served, in (token, slot) order) where there is a trace, else
    does nothing.
    """

    x_TH: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    weights: MoEWeights
    spec: MoESpec
    record: Callable[[Stage, torch.Tensor], None]


@dataclass(frozen=True)
class ExpertsLayer:
    """An implementation made of a function `experts`: call -> this rank's weighted sum (T, H), in the dtype of x.

    Its tp ranks hold columns of the activation, as the contract's shards are cut, and the sum is completed by one
    all-reduce. Differentiable where `experts` is.
    """

    CAPABILITIES: Capabilities
    experts: Callable[[ExpertsCall], torch.Tensor]

    def moe(self, x_TH: torch.Tensor, weights: MoEWeights, spec: MoESpec, parallel: Parallel | None = None,
            groups: Groups | None = None, *, routing: Routing | None = None, logits_TE: torch.Tensor | None = None,
            residual_TH: torch.Tensor | None = None, trace: Trace | None = None,
            check: str = "metadata") -> torch.Tensor:
        """The whole layer, (T, H) in x's dtype, as the contract's `moe`; raises what `experts` raises."""
        groups = groups or Groups()
        chosen = routed(x_TH, weights, spec, routing, logits_TE)
        stored = self.CAPABILITIES.numerics[_NAMES[x_TH.dtype]].storage.get(Stage.WEIGHTS, Format.FP32)
        weights_TK = enter(chosen.weights_TK.to(TORCH_DTYPES[stored]), groups.tp)
        if weights.w2_bias_EH is not None:
            # Whole on every rank, and once in the sum over ranks.
            weights = replace(weights, w2_bias_EH=once(enter(weights.w2_bias_EH, groups.tp), groups.tp.rank == 0))
        call = ExpertsCall(enter(x_TH, groups.tp), chosen.ids_TK.long(), weights_TK, weights, spec,
                           trace.record if trace is not None else lambda stage, tensor: None)
        if Stage.LOGITS in self.CAPABILITIES.stages and routing is None and chosen.logits_TE is not None:
            call.record(Stage.LOGITS, chosen.logits_TE.detach())
        call.record(Stage.IDS, call.ids_TK)
        call.record(Stage.WEIGHTS, weights_TK.detach())
        merged_TH = self.experts(call)
        call.record(Stage.MERGED, merged_TH.detach())
        y_TH = leave(merged_TH, groups.tp)
        return y_TH if residual_TH is None else y_TH + residual_TH
