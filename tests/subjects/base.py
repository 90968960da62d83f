"""A readable torch layer whose every step can be replaced: variations of it are right, wrong or misbehaving.

It computes in fp32 and rounds where its rounding contract says so. A variation is a subclass that overrides
one step; `moe-ref verify tests.subjects.wrong:some_name` judges an instance.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.comm import Groups
from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.features import Feature
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MLP, MoESpec, Router
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Dtype, Format, Ranks, Stage, Storage
from moe_ref.contract.weights import MoEWeights

MODEL = None
"""In a table of storage formats: the dtype of the case."""

ROUND_EACH_STAGE: Mapping[Stage, Format | None] = {
    Stage.LOGITS: Format.FP32, Stage.WEIGHTS: Format.FP32, Stage.ACT: MODEL, Stage.DOWN: MODEL,
    Stage.SHARED: MODEL, Stage.MERGED: MODEL, Stage.REDUCED: MODEL}
"""The most usual contract: router in fp32, every row and partial sum in the dtype of the model."""

ALL_STAGES = (Stage.LOGITS, Stage.IDS, Stage.WEIGHTS, Stage.ACT, Stage.DOWN, Stage.SHARED, Stage.MERGED,
              Stage.REDUCED)


@dataclass(frozen=True)
class Call:
    """Arguments of one call and where its stages are stored and shown."""

    x_TH: torch.Tensor
    weights: MoEWeights
    spec: MoESpec
    groups: Groups
    trace: Trace | None
    numerics: Numerics
    shows: tuple[Stage, ...]

    @property
    def rank(self) -> int:
        return self.groups.tp.rank

    @property
    def size(self) -> int:
        return self.groups.tp.size

    def store(self, stage: Stage, tensor: torch.Tensor) -> torch.Tensor:
        """Round to the stage's storage format, show the result and return it."""
        stored = self.round(stage, tensor)
        if self.trace is not None and stage in self.shows:
            self.trace.record(stage, stored)
        return stored

    def round(self, stage: Stage, tensor: torch.Tensor) -> torch.Tensor:
        """Round to the stage's storage format without showing it."""
        stored = self.numerics.storage.get(stage)
        return tensor if stored is None else tensor.to(TORCH_DTYPES[stored])


class TorchMoE:
    """The layer, one expert at a time. stored and reduce: formats, MODEL for the dtype of the case.

    steps_in_model: every step inside the activation and the merge is rounded to that dtype; merges_in_model: of the
    merge.
    """

    stored = ROUND_EACH_STAGE
    reduce_in: Format | None = MODEL
    steps_in_model: bool = False
    merges_in_model: bool = False
    shows: tuple[Stage, ...] = ALL_STAGES
    weight_at: Literal["down", "merge", "act"] = "down"
    activations: tuple[str, ...] = ("silu", "gelu", "gelu_tanh")
    scores: tuple[str, ...] = ("softmax", "sigmoid")
    features: tuple[Feature, ...] = (Feature.DENSE, Feature.GROUPS, Feature.SELECTION_BIAS, Feature.SHARED_EXPERT,
                                     Feature.RESIDUAL)
    promises: Mapping[str, object] = {"deterministic": True, "equal_ranks": True, "lower_id_ties": True,
                                      "collectives_through_groups": True}

    def __init__(self) -> None:
        def numerics(dtype: Dtype) -> Numerics:
            of_model = Format(dtype.value)
            inner = of_model if self.steps_in_model else None
            return Numerics(storage={stage: stored or of_model for stage, stored in self.stored.items()},
                            reduce=self.reduce_in or of_model, weight_at=self.weight_at, activation=inner,
                            merge=of_model if self.merges_in_model else inner)

        self.CAPABILITIES = Capabilities(
            name=type(self).__name__, version="1", numerics={dtype: numerics(dtype) for dtype in Dtype},
            stages=self.shows, activations=self.activations, scores=self.scores, features=self.features,
            max_tp=64, storages=tuple(Storage), ranks=(Ranks.LOCAL, Ranks.GLOO), devices=("cpu",),
            injected_routing=True, **self.promises)  # pyrefly: ignore

    def moe(self, x_TH: torch.Tensor, weights: MoEWeights, spec: MoESpec, parallel: Parallel | None = None,
            groups: Groups | None = None, *, routing: Routing | None = None, logits_TE: torch.Tensor | None = None,
            residual_TH: torch.Tensor | None = None, trace: Trace | None = None) -> torch.Tensor:
        """The contract's entry point, (T, H)."""
        call = Call(x_TH, weights, spec, groups or Groups(), trace, self.declared(x_TH, weights), self.shows)
        ids_TK, weights_TK = self.route(call, logits_TE) if routing is None else self.injected(call, routing)
        merged_TH = self.merge(call, ids_TK, weights_TK)
        return self.finish(call, merged_TH, residual_TH)

    def declared(self, x_TH: torch.Tensor, weights: MoEWeights) -> Numerics:
        """The contract for tokens of this dtype."""
        names = {torch_dtype: name for name, torch_dtype in TORCH_DTYPES.items()}
        return self.CAPABILITIES.numerics[Dtype(names[x_TH.dtype])]

    # Router: from logits to ids and weights.

    def route(self, call: Call, logits_TE: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        router = call.spec.router
        if router is None:
            ids_TK = torch.zeros(len(call.x_TH), 1, dtype=torch.int64)
            weights_TK = torch.ones(ids_TK.shape)
        else:
            logits_TE = call.store(Stage.LOGITS, self.logits(call) if logits_TE is None else logits_TE)
            score_TE = self.score(logits_TE.float(), router)
            selection_TE = self.selection_score(score_TE, call.weights.selection_bias_E, router)
            ids_TK = self.top(selection_TE, router.top_k)
            weights_TK = self.weigh(score_TE.gather(1, ids_TK), selection_TE.gather(1, ids_TK), router)
        if call.trace is not None and Stage.IDS in self.shows:
            call.trace.record(Stage.IDS, ids_TK)
        return ids_TK, call.store(Stage.WEIGHTS, weights_TK)

    def injected(self, call: Call, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
        if call.trace is not None and Stage.IDS in self.shows:
            call.trace.record(Stage.IDS, routing.ids_TK)
        return routing.ids_TK, call.store(Stage.WEIGHTS, routing.weights_TK)

    def logits(self, call: Call) -> torch.Tensor:
        return call.x_TH.float() @ call.weights.router_EH.float().T

    def score(self, logits_TE: torch.Tensor, router: Router) -> torch.Tensor:
        # 1 / (1 + exp(-l)) instead of torch.sigmoid, which rounds equal logits differently by position.
        return torch.softmax(logits_TE, -1) if router.score == "softmax" else 1 / (1 + torch.exp(-logits_TE))

    def selection_score(self, score_TE: torch.Tensor, bias_E: torch.Tensor | None,
                        router: Router) -> torch.Tensor:
        if bias_E is not None:
            score_TE = score_TE + bias_E
        if router.num_groups == 1:
            return score_TE
        score_TGE = score_TE.unflatten(1, (router.num_groups, -1))
        group_TG = score_TGE.topk(2 if router.group_score == "top2_sum" else 1, -1).values.sum(-1)
        kept_TG = torch.zeros_like(group_TG, dtype=torch.bool)
        kept_TG.scatter_(1, self.top(group_TG, router.num_groups_kept), True)
        return score_TGE.masked_fill(~kept_TG[..., None], -torch.inf).flatten(1)

    def top(self, values_TN: torch.Tensor, count: int) -> torch.Tensor:
        """Indices of the largest, ties to the lower one."""
        return torch.sort(values_TN, dim=-1, descending=True, stable=True).indices[:, :count]

    def weigh(self, score_TK: torch.Tensor, selection_TK: torch.Tensor, router: Router) -> torch.Tensor:
        if router.renormalize:
            score_TK = score_TK / (score_TK.sum(-1, keepdim=True) + router.renormalize_epsilon)
        return score_TK * router.scaling_factor

    # Experts: from tokens to a partial sum of this rank.

    def merge(self, call: Call, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        rows_TKH = self.routed_rows(call, ids_TK, weights_TK.float()).float().unflatten(0, ids_TK.shape)
        if self.weight_at == "merge":
            rows_TKH = rows_TKH * weights_TK.float()[..., None]
        merged_TH = self.sum_of_slots(rows_TKH)
        if call.spec.shared is not None:
            merged_TH = merged_TH + self.shared_rows(call).float()
        return call.store(Stage.MERGED, merged_TH)

    def sum_of_slots(self, rows_TKH: torch.Tensor) -> torch.Tensor:
        return rows_TKH.sum(1)

    def routed_rows(self, call: Call, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Expert outputs in (token, slot) order, weighted here or at the merge, (T*K, H)."""
        num_rows, intermediate = ids_TK.numel(), call.weights.w13_EGIH.shape[2]
        gate_up_RGI = torch.zeros(num_rows, 2, intermediate)
        act_RI, down_RH = torch.zeros(num_rows, intermediate), torch.zeros(num_rows, call.spec.hidden_size)
        for expert in range(call.spec.num_experts):
            token_R, slot_R = (ids_TK == expert).nonzero(as_tuple=True)
            row_R = token_R * ids_TK.shape[1] + slot_R
            w13_GIH, w2_HI, _, _ = call.weights.expert(expert)
            gate_up = self.gate_up(call, call.x_TH[token_R], w13_GIH, expert)
            gate_up_RGI[row_R] = call.round(Stage.GATE_UP, gate_up).float()
            act = self.activate(*gate_up_RGI[row_R].unbind(1), call.spec.experts)
            act_RI[row_R] = call.round(Stage.ACT, act).float()
            down_RH[row_R] = self.down(call, act_RI[row_R], w2_HI, expert)
            if self.weight_at == "down":
                down_RH[row_R] *= weights_TK[token_R, slot_R, None]
        call.store(Stage.GATE_UP, gate_up_RGI)
        call.store(Stage.ACT, act_RI)
        return call.store(Stage.DOWN, down_RH)

    def gate_up(self, call: Call, x_RH: torch.Tensor, w13_GIH: torch.Tensor, expert: int) -> torch.Tensor:
        """Both projections, (R, 2, I); expert is -1 for the shared expert."""
        return torch.stack([x_RH.float() @ w13_GIH[half].float().T for half in (0, 1)], 1)

    def activate(self, gate_RI: torch.Tensor, up_RI: torch.Tensor, mlp: MLP) -> torch.Tensor:
        if mlp.activation == "silu":
            return F.silu(gate_RI) * up_RI
        return F.gelu(gate_RI, approximate="tanh" if mlp.activation == "gelu_tanh" else "none") * up_RI

    def down(self, call: Call, act_RI: torch.Tensor, w2_HI: torch.Tensor, expert: int) -> torch.Tensor:
        """The projection back, unweighted, (R, H)."""
        return act_RI.float() @ w2_HI.float().T

    def shared_rows(self, call: Call) -> torch.Tensor:
        """The shared expert times its gate, (T, H)."""
        w13_GIH, w2_HI, _, _ = call.weights.shared_expert()
        gate_up = call.round(Stage.GATE_UP, self.gate_up(call, call.x_TH, w13_GIH, -1)).float()
        act_TI = call.round(Stage.ACT, self.activate(*gate_up.unbind(1), call.spec.shared.mlp))
        shared_TH = self.down(call, act_TI, w2_HI, -1)
        if call.weights.shared_gate_SH is not None:
            gate_logit = call.round(Stage.LOGITS, call.x_TH.float() @ call.weights.shared_gate_SH.float().T)
            gate = 1 / (1 + torch.exp(-gate_logit.float()))
            shared_TH = shared_TH * call.round(Stage.WEIGHTS, gate).float()
        return call.store(Stage.SHARED, shared_TH)

    # Ranks: from partial sums to the output.

    def finish(self, call: Call, merged_TH: torch.Tensor, residual_TH: torch.Tensor | None) -> torch.Tensor:
        total_TH = self.all_reduce(call, merged_TH)
        if residual_TH is not None:
            total_TH = self.add_residual(total_TH, residual_TH)
        return call.store(Stage.REDUCED, total_TH)

    def all_reduce(self, call: Call, merged_TH: torch.Tensor) -> torch.Tensor:
        return call.groups.tp.all_reduce(merged_TH) if call.size > 1 else merged_TH

    def add_residual(self, total_TH: torch.Tensor, residual_TH: torch.Tensor) -> torch.Tensor:
        return total_TH.float() + residual_TH.float()
