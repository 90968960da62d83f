"""torchtitan's whole layer, `torchtitan.models.common.moe.MoE` with its LocalTokenDispatcher (0.3.0).

The module is built without memory and called with the harness's tensors in place of its parameters, in eval mode, which
leaves its counts of tokens alone. Its experts are `GroupedExperts`, or `GptOssGroupedExperts` for clamped and scaled
SwiGLU with biases, whose gate and up rows take turns. Hooks stand at the borders of its parts:

gate      Its logits are meant to be fp32 (torch.autocast in TokenChoiceTopKRouter.forward), which a CPU refuses with a
          warning: tokens and router are cast here. Injected logits replace what it returns.
router    An injected routing replaces what it returns, with the ids as they are.
experts   Every rank of tp calls a layer of its columns. What torchtitan's plan redistributes (moe_sharding.py) is
          entered, and the partial sums are added by one all-reduce; the bias of w2 is that of rank 0.

Experts cast tokens and weights to bf16 whatever they are (GroupedExperts.forward), while router, shared expert and
merge keep fp32: no contract says so, and bf16 alone is declared.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functional_call
from torchtitan.models.common.moe import MoE  # type: ignore[missing-import]

from moe_ref.adapters.torchtitan_build import build, parameters
from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.collectives import enter, leave
from moe_ref.contract.comm import Groups
from moe_ref.contract.features import Feature
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Direction, Dtype, Format, Ranks, Stage
from moe_ref.contract.weights import MoEWeights

_ROWS = (Stage.GATE_UP, Stage.ACT, Stage.DOWN, Stage.SHARED, Stage.MERGED, Stage.REDUCED)

# Rows times weights are multiplied in fp32 and rounded, and scatter_add adds them up in the dtype of the tokens
# (LocalTokenDispatcher.combine); everything else is one call of torch after the other.
NUMERICS = Numerics(storage={Stage.LOGITS: Format.FP32, Stage.WEIGHTS: Format.FP32,
                             **dict.fromkeys(_ROWS, Format.BF16)},
                    activation=Format.BF16, merge=Format.BF16, reduce=Format.BF16, weight_at="merge")

CAPABILITIES = Capabilities(
    name="torchtitan.moe", version="0.3.0", numerics={Dtype.BF16: NUMERICS},
    stages=(Stage.LOGITS, Stage.IDS, Stage.WEIGHTS, Stage.ACT, Stage.DOWN, Stage.SHARED, Stage.MERGED),
    scores=("softmax", "sigmoid"), directions=tuple(Direction), max_tp=64, ranks=(Ranks.LOCAL, Ranks.GLOO),
    features=(Feature.LOGIT_BIAS, Feature.GROUPS, Feature.SELECTION_BIAS, Feature.MLP_BIAS, Feature.LIMIT,
              Feature.SCALED_SWIGLU, Feature.SHARED_EXPERT, Feature.RESIDUAL),
    devices=("cpu",), injected_routing=True, absent_ids=False, collectives_through_groups=True, hidden_multiple=8,
    intermediate_multiple=8)


class _Borders:
    """What hooks do on one call: tensors in and out of the parts of the module, and what is shown of them."""

    def __init__(self, groups: Groups, routing: Routing | None, logits_TE: torch.Tensor | None,
                 trace: Trace | None) -> None:
        self.tp, self.routing, self.logits_TE, self.trace = groups.tp, routing, logits_TE, trace
        self.slot_R = torch.empty(0, dtype=torch.int64)

    def install(self, module: MoE) -> None:
        """Hooks of the module and, where there is a trace, a recorder in its seam for grouped products."""
        module.router.gate.register_forward_pre_hook(lambda gate, args: (args[0].float(),))
        module.router.gate.register_forward_hook(self._logits)
        module.router.register_forward_hook(self._routed)
        module.routed_experts.register_forward_pre_hook(lambda part, args: (enter(args[0], self.tp), *args[1:]))
        if module.shared_experts is not None:
            module.shared_experts.register_forward_pre_hook(lambda part, args: (enter(args[0], self.tp),))
            module.shared_experts.register_forward_hook(lambda part, args, out: self._show(Stage.SHARED, out[0]))
        if self.trace is not None:
            self._watch(module.routed_experts.inner_experts)

    def _show(self, stage: Stage, tensor: torch.Tensor) -> None:
        if self.trace is not None:
            self.trace.record(stage, tensor.detach())

    def _logits(self, gate: Any, args: Any, out_BTE: torch.Tensor) -> torch.Tensor:
        out_BTE = out_BTE if self.logits_TE is None else self.logits_TE.float()[None]
        if self.routing is None:
            self._show(Stage.LOGITS, out_BTE[0])
        return out_BTE

    def _routed(self, router: Any, args: Any, out: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        weights_BTK, ids_BTK, scores_BTE = out
        if self.routing is not None:
            weights_BTK, ids_BTK = self.routing.weights_TK.float()[None], self.routing.ids_TK.long()[None]
        self._show(Stage.IDS, ids_BTK[0])
        self._show(Stage.WEIGHTS, weights_BTK[0])
        # Rows of experts come in this order (LocalTokenDispatcher._local_reorder).
        self.slot_R = torch.argsort(torch.argsort(ids_BTK.flatten(), stable=True))
        return enter(weights_BTK, self.tp), ids_BTK, scores_BTE

    def _watch(self, experts: Any) -> None:
        """The last product of GroupedExperts._grouped_mm takes the activation; what the module returns is `down`."""
        multiply, taken = experts._grouped_mm, []

        def recording(*, A: torch.Tensor, **others: Any) -> torch.Tensor:
            taken.append(A)
            return multiply(A=A, **others)

        def show(module: Any, args: Any, out_RH: torch.Tensor) -> None:
            self._show(Stage.ACT, taken[-1][self.slot_R])
            self._show(Stage.DOWN, out_RH[self.slot_R])

        experts._grouped_mm = recording
        experts.register_forward_hook(show)


@dataclass(frozen=True)
class TitanLayer:
    """torchtitan's MoE behind the contract's API."""

    CAPABILITIES: Capabilities

    def moe(self, x_TH: torch.Tensor, weights: MoEWeights, spec: MoESpec, parallel: Parallel | None = None,
            groups: Groups | None = None, *, routing: Routing | None = None, logits_TE: torch.Tensor | None = None,
            residual_TH: torch.Tensor | None = None, trace: Trace | None = None,
            check: str = "metadata") -> torch.Tensor:
        """The whole layer, (T, H) in bf16; UsageValueError for what torchtitan does not have."""
        groups = groups or Groups()
        shared_size = 0 if weights.shared_w2_HI is None else weights.shared_w2_HI.shape[1]
        module = build(spec, weights.w2_EHI.shape[2], shared_size)
        _Borders(groups, routing, logits_TE, trace).install(module)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "In CPU autocast, but the target dtype is not supported")
            merged_BTH = functional_call(module, parameters(weights, spec, groups.tp), (x_TH[None],))
        if trace is not None:
            trace.record(Stage.MERGED, merged_BTH[0])
        y_TH = leave(merged_BTH[0], groups.tp)
        return y_TH if residual_TH is None else y_TH + residual_TH


LAYER = TitanLayer(CAPABILITIES)
