"""Right layers of the whole specification under the rounding contracts of released code and fused kernels."""

import torch

from moe_ref.contract.parallel import Parallel
from moe_ref.contract.spec import MLP, Router, SharedExpert
from moe_ref.contract.vocabulary import Format, Stage
from moe_ref.contract.weights import ExpertWeights
from tests.subjects.base import MODEL, ROUND_EACH_STAGE, Call
from tests.subjects.whole import WholeSpec
from tests.subjects.whole_router import WholeRouter


class BlackBox(WholeSpec):
    """Shows nothing but its output."""

    shows = ()


class FP32Throughout(WholeSpec):
    """fp32 rows and partial sums, one rounding at the end."""

    stored = {**dict.fromkeys(ROUND_EACH_STAGE, Format.FP32), Stage.REDUCED: MODEL}
    reduce_in = Format.FP32


class WeightedActivation(WholeSpec):
    """The routing weight multiplies the activation, which is stored with it; the bias of w2 is weighted apart."""

    weight_at = "act"

    def expert_rows(self, call: Call, gate_up_RGI: torch.Tensor, expert: ExpertWeights,
                    weight_R1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if call.spec.weight_on == "input":
            return super().expert_rows(call, gate_up_RGI, expert, weight_R1)
        act_RI = call.round(Stage.ACT, self.activated(gate_up_RGI, call.spec.experts)).float()
        act_RI = call.round(Stage.ACT, act_RI * weight_R1).float()
        down_RH = act_RI @ expert.w2_HI.float().T
        if expert.w2_bias_H is not None:
            down_RH = down_RH + self.down_bias(call, expert.w2_bias_H.float()) * weight_R1
        return act_RI, down_RH


class EagerLoop(WholeSpec):
    """Every elementwise step rounded to the model's dtype: products first stored, then biased and weighted."""

    stored = {**ROUND_EACH_STAGE, Stage.GATE_UP: MODEL, Stage.PERMUTE: MODEL}
    weight_at = "merge"
    steps_in_model = True

    def step(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.dtype).float()

    def moe(self, x_TH, *arguments, **options):
        self.dtype = x_TH.dtype
        return super().moe(x_TH, *arguments, **options)

    def tokens(self, call: Call, x_RH: torch.Tensor, weight_R1: torch.Tensor) -> torch.Tensor:
        return self.step(super().tokens(call, x_RH, weight_R1))

    def project(self, x_RH: torch.Tensor, expert: ExpertWeights) -> torch.Tensor:
        gate_up = self.step(super().project(x_RH, expert._replace(w13_bias_GI=None)))
        return gate_up if expert.w13_bias_GI is None else self.step(gate_up + expert.w13_bias_GI.float())

    def activated(self, gate_up_RGI: torch.Tensor, mlp: MLP) -> torch.Tensor:
        act_RI = self.step(self.limited_activation(gate_up_RGI[:, 0], mlp))
        return self.step(act_RI * self.step(self.up_factor(gate_up_RGI[:, 1], mlp))) if mlp.gated else act_RI

    def activation(self, gate_RI: torch.Tensor, mlp: MLP) -> torch.Tensor:
        if mlp.activation != "silu":
            return self.step(super().activation(gate_RI, mlp))
        cap = mlp.gate_softcap
        factor = self.step(cap * self.step(torch.tanh(self.step(gate_RI / cap)))) if cap else gate_RI
        return self.step(factor * self.step(torch.sigmoid(self.step(mlp.sigmoid_scale * gate_RI))))

    def expert_rows(self, call: Call, gate_up_RGI: torch.Tensor, expert: ExpertWeights,
                    weight_R1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        act_RI = self.activated(gate_up_RGI, call.spec.experts)
        return act_RI, self.projected_back(call, act_RI, expert)

    def projected_back(self, call: Call, act_RI: torch.Tensor, expert: ExpertWeights) -> torch.Tensor:
        down_RH = self.step(super().projected_back(call, act_RI, expert._replace(w2_bias_H=None)))
        return down_RH if expert.w2_bias_H is None else self.step(
            down_RH + self.down_bias(call, expert.w2_bias_H.float()))

    def identity(self, call: Call, x_RH: torch.Tensor, weight_R1: torch.Tensor) -> torch.Tensor:
        return x_RH * (call.rank == 0)

    def sum_of_rows(self, call: Call, rows_TKH: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(rows_TKH[:, 0])
        for slot in range(rows_TKH.shape[1]):
            weight = 1.0 if call.spec.weight_on == "input" else weights_TK[:, slot, None]
            total = self.step(total + self.step(rows_TKH[:, slot] * weight))
        return total

    def merged_shared(self, routed_TH: torch.Tensor, shared_TH: torch.Tensor,
                      shared: SharedExpert) -> torch.Tensor:
        return self.step(super().merged_shared(routed_TH, shared_TH, shared))


class HiddenEagerLoop(EagerLoop):
    """The same, judged by its output alone."""

    shows = (Stage.IDS,)


class SharedOneByOne(WholeSpec):
    """Shared experts that the router weights, each stored as a row of its own before it is weighted and added."""

    def weighted_shared(self, call: Call, act_TI: torch.Tensor, expert: ExpertWeights, shared_TS: torch.Tensor,
                        parallel: Parallel) -> torch.Tensor:
        shared = call.spec.shared
        assert shared is not None
        start, stop = parallel.ranges(shared.intermediate_size)[call.rank]
        width, total_TH = shared.intermediate_size // shared.num_experts, torch.zeros(call.x_TH.shape)
        for s in range(shared.num_experts):
            low, high = (min(max(edge - start, 0), stop - start) for edge in (s * width, (s + 1) * width))
            rows = call.round(Stage.SHARED, act_TI[:, low:high] @ expert.w2_HI[:, low:high].float().T).float()
            total_TH = total_TH + call.round(Stage.SHARED, rows * shared_TS[:, s, None].float()).float()
        return total_TH


class LateBias(BlackBox):
    """The bias of the output is added by every rank to the complete sum."""

    def output_bias(self, call: Call) -> torch.Tensor | float:
        return 0.0

    def all_reduce(self, call: Call, merged_TH: torch.Tensor) -> torch.Tensor:
        total_TH, bias_H = super().all_reduce(call, merged_TH), call.weights.output_bias_H
        return total_TH if bias_H is None else (total_TH.float() + bias_H.float()).to(total_TH.dtype)


class NaiveSoftplus(WholeRouter):
    """log(1 + exp(l)), which loses the last digits of small scores."""

    def score(self, capped_TE: torch.Tensor, router: Router) -> torch.Tensor:
        if router.score != "sqrt_softplus":
            return super().score(capped_TE, router)
        return torch.log(1 + torch.exp(capped_TE)).sqrt()
