"""A right layer of the whole specification in plain torch, every step on its own so that it can be replaced."""

from typing import get_args

import torch
import torch.nn.functional as F

from moe_ref.contract.comm import Groups
from moe_ref.contract.features import Feature
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.router_spec import Score
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MLP, Activation, MoESpec, SharedExpert
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Stage
from moe_ref.contract.weights import ExpertWeights, MoEWeights
from tests.subjects.base import Call, TorchMoE
from tests.subjects.whole_router import WholeRouter, sigmoid_gate


class WholeSpec(TorchMoE):
    """fp32 arithmetic, rows and partial sums in the dtype of the model, the weight in the down product."""

    activations = get_args(Activation)
    scores = get_args(Score)
    features = tuple(Feature)

    def __init__(self, router: WholeRouter | None = None) -> None:
        super().__init__()
        self.router = router or WholeRouter()

    def moe(self, x_TH: torch.Tensor, weights: MoEWeights, spec: MoESpec, parallel: Parallel | None = None,
            groups: Groups | None = None, *, routing: Routing | None = None, logits_TE: torch.Tensor | None = None,
            residual_TH: torch.Tensor | None = None, trace: Trace | None = None) -> torch.Tensor:
        call = Call(x_TH, weights, spec, groups or Groups(), trace, self.declared(x_TH, weights), self.shows)
        ids_TK, weights_TK, shared_TS = (
            self.routing(call, logits_TE) if routing is None else (routing.ids_TK, routing.weights_TK, None))
        if trace is not None and Stage.IDS in self.shows:
            trace.record(Stage.IDS, ids_TK)
        weights_TK = call.store(Stage.WEIGHTS, weights_TK)
        shared_TS = None if shared_TS is None else call.round(Stage.WEIGHTS, shared_TS)
        rows_TKH = self.rows(call, ids_TK, weights_TK.float()).unflatten(0, ids_TK.shape)
        routed_TH = self.sum_of_rows(call, rows_TKH, weights_TK.float())
        merged_TH = self.with_shared(call, routed_TH, shared_TS, parallel or Parallel())
        return self.finish(call, call.store(Stage.MERGED, merged_TH + self.output_bias(call)), residual_TH)

    def sum_of_rows(self, call: Call, rows_TKH: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """The routed sum of every token, (T, H)."""
        return self.sum_of_slots(rows_TKH)

    def routing(self, call: Call, logits_TE: torch.Tensor | None
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        router, shared, shared_TS = call.spec.router, call.spec.shared, None
        if router is None:
            ids_TK = torch.zeros(len(call.x_TH), 1, dtype=torch.int64)
            result = ids_TK, torch.ones(ids_TK.shape), None
        else:
            shared_logits_TS = None
            if shared is not None and shared.gate == "router":
                gate_SH = call.weights.shared_gate_SH.float()
                shared_logits_TS = call.round(Stage.LOGITS, call.x_TH.float() @ gate_SH.T)
            logits_TE = self.router.logits(call.x_TH, call.weights) if logits_TE is None else logits_TE
            result = self.router.route(call.x_TH, call.store(Stage.LOGITS, logits_TE), call.weights, router,
                                       shared_logits_TS)
        if shared is not None and shared.gate == "sigmoid":
            shared_TS = sigmoid_gate(call.x_TH, call.weights)
        return result[0], result[1], result[2] if shared_TS is None else shared_TS

    # Experts.

    def rows(self, call: Call, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Weighted rows in (token, slot) order as fp32, (T*K, H)."""
        spec, num_rows, top_k = call.spec, ids_TK.numel(), ids_TK.shape[1]
        intermediate = call.weights.w13_EGIH.shape[2]
        gate_up_RGI = torch.zeros(num_rows, spec.experts.num_projections, intermediate)
        act_RI, down_RH = torch.zeros(num_rows, intermediate), torch.zeros(num_rows, spec.hidden_size)
        for e in range(spec.num_choices):
            token_R, slot_R = (ids_TK == e).nonzero(as_tuple=True)
            row_R, weight_R1 = token_R * top_k + slot_R, weights_TK[token_R, slot_R, None]
            if e >= spec.num_experts:
                down_RH[row_R] = self.identity(call, call.x_TH[token_R].float(), weight_R1)
                continue
            expert = call.weights.expert(e)
            gate_up = self.project(self.tokens(call, call.x_TH[token_R].float(), weight_R1), expert)
            gate_up_RGI[row_R] = call.round(Stage.GATE_UP, gate_up).float()
            act_RI[row_R], down_RH[row_R] = self.expert_rows(call, gate_up_RGI[row_R], expert, weight_R1)
        call.store(Stage.GATE_UP, gate_up_RGI)
        call.store(Stage.ACT, act_RI)
        return call.store(Stage.DOWN, down_RH).float()

    def expert_rows(self, call: Call, gate_up_RGI: torch.Tensor, expert: ExpertWeights,
                    weight_R1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """act as it is stored, and weighted down rows before they are."""
        act_RI = call.round(Stage.ACT, self.activated(gate_up_RGI, call.spec.experts)).float()
        return act_RI, self.weighted(call, self.projected_back(call, act_RI, expert), weight_R1)

    def tokens(self, call: Call, x_RH: torch.Tensor, weight_R1: torch.Tensor) -> torch.Tensor:
        return x_RH * weight_R1 if call.spec.weight_on == "input" else x_RH

    def weighted(self, call: Call, down_RH: torch.Tensor, weight_R1: torch.Tensor) -> torch.Tensor:
        return down_RH if call.spec.weight_on == "input" else down_RH * weight_R1

    def identity(self, call: Call, x_RH: torch.Tensor, weight_R1: torch.Tensor) -> torch.Tensor:
        """Rows of an identity expert: rank 0 alone adds them."""
        return x_RH * weight_R1 * (call.rank == 0)

    def project(self, x_RH: torch.Tensor, expert: ExpertWeights) -> torch.Tensor:
        """(R, G, I)."""
        gate_up = torch.stack([x_RH @ w_IH.float().T for w_IH in expert.w13_GIH], 1)
        return gate_up if expert.w13_bias_GI is None else gate_up + expert.w13_bias_GI.float()

    def projected_back(self, call: Call, act_RI: torch.Tensor, expert: ExpertWeights) -> torch.Tensor:
        """(R, H); the bias is added by rank 0 alone."""
        down_RH = self.product_back(act_RI, expert.w2_HI)
        return down_RH if expert.w2_bias_H is None else down_RH + self.down_bias(call, expert.w2_bias_H.float())

    def product_back(self, act_RI: torch.Tensor, w2_HI: torch.Tensor) -> torch.Tensor:
        return act_RI @ w2_HI.float().T

    def down_bias(self, call: Call, bias_H: torch.Tensor) -> torch.Tensor:
        return bias_H * (call.rank == 0)

    def activated(self, gate_up_RGI: torch.Tensor, mlp: MLP) -> torch.Tensor:
        """activation(gate) * (up + offset)."""
        act_RI = self.limited_activation(gate_up_RGI[:, 0], mlp)
        return act_RI * self.up_factor(gate_up_RGI[:, 1], mlp) if mlp.gated else act_RI

    def limited_activation(self, gate_RI: torch.Tensor, mlp: MLP) -> torch.Tensor:
        if mlp.limit is None:
            return self.activation(gate_RI, mlp)
        if mlp.limit_at == "before":
            return self.activation(gate_RI.clamp(max=mlp.limit), mlp)
        return self.activation(gate_RI, mlp).clamp(max=mlp.limit)

    def activation(self, gate_RI: torch.Tensor, mlp: MLP) -> torch.Tensor:
        if mlp.activation == "silu":
            factor = mlp.gate_softcap * torch.tanh(gate_RI / mlp.gate_softcap) if mlp.gate_softcap else gate_RI
            return factor * torch.sigmoid(mlp.sigmoid_scale * gate_RI)
        if mlp.activation.startswith("gelu"):
            return F.gelu(gate_RI, approximate="tanh" if mlp.activation == "gelu_tanh" else "none")
        return torch.relu(gate_RI) if mlp.activation == "relu" else torch.relu(gate_RI).square()

    def up_factor(self, up_RI: torch.Tensor, mlp: MLP) -> torch.Tensor:
        if mlp.limit is not None:
            up_RI = up_RI.clamp(-mlp.limit, mlp.limit)
        if mlp.up_softcap:
            up_RI = mlp.up_softcap * torch.tanh(up_RI / mlp.up_softcap)
        return up_RI + mlp.up_offset

    # Shared expert and merge.

    def with_shared(self, call: Call, routed_TH: torch.Tensor, shared_TS: torch.Tensor | None,
                    parallel: Parallel) -> torch.Tensor:
        shared, expert = call.spec.shared, call.weights.shared_expert()
        if shared is None or expert is None:
            return routed_TH
        gate_up = call.round(Stage.GATE_UP, self.project(call.x_TH.float(), expert)).float()
        act_TI = call.round(Stage.ACT, self.activated(gate_up, shared.mlp)).float()
        if shared.gate == "router" and shared_TS is not None:
            shared_TH = self.weighted_shared(call, act_TI, expert, shared_TS, parallel)
        else:
            shared_TH = self.projected_back(call, act_TI, expert)
        if shared.gate == "sigmoid" and shared_TS is not None:
            shared_TH = shared_TH * shared_TS.float()
        shared_TH = call.store(Stage.SHARED, shared_TH).float()
        return self.merged_shared(routed_TH, shared_TH, shared)

    def weighted_shared(self, call: Call, act_TI: torch.Tensor, expert: ExpertWeights, shared_TS: torch.Tensor,
                        parallel: Parallel) -> torch.Tensor:
        """Rows of shared experts that the router weights: on their activations, in one product."""
        assert call.spec.shared is not None
        columns_TI = self.of_columns(shared_TS, call.spec.shared, call, parallel)
        return self.projected_back(call, call.round(Stage.ACT, act_TI * columns_TI).float(), expert)

    def of_columns(self, shared_TS: torch.Tensor, shared: SharedExpert, call: Call,
                   parallel: Parallel) -> torch.Tensor:
        """The weight of every column that this rank holds, (T, I)."""
        start, stop = parallel.ranges(shared.intermediate_size)[call.rank]
        width = shared.intermediate_size // shared.num_experts
        return shared_TS.repeat_interleave(width, 1)[:, start:stop].float()

    def merged_shared(self, routed_TH: torch.Tensor, shared_TH: torch.Tensor,
                      shared: SharedExpert) -> torch.Tensor:
        total_TH = routed_TH + shared_TH
        return total_TH / 2 if shared.merge == "mean" else total_TH

    def output_bias(self, call: Call) -> torch.Tensor | float:
        bias_H = call.weights.output_bias_H
        return 0.0 if bias_H is None else bias_H.float() * (call.rank == 0)


whole_spec = WholeSpec()
