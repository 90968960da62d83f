"""Layers of the whole specification with one mistake each in experts, shared expert or merge."""

from dataclasses import replace

import torch

from moe_ref.contract.parallel import Parallel
from moe_ref.contract.spec import MLP, SharedExpert
from moe_ref.contract.vocabulary import Stage
from moe_ref.contract.weights import ExpertWeights
from tests.subjects.base import Call
from tests.subjects.whole import WholeSpec


class NoClamp(WholeSpec):
    """Gate and up are not limited."""

    def activated(self, gate_up_RGI: torch.Tensor, mlp: MLP) -> torch.Tensor:
        return super().activated(gate_up_RGI, replace(mlp, limit=None, limit_at="before"))


class GateClampedFromBelow(WholeSpec):
    """The gate is clamped on both sides, as up is."""

    def limited_activation(self, gate_RI: torch.Tensor, mlp: MLP) -> torch.Tensor:
        return super().limited_activation(gate_RI if mlp.limit is None else gate_RI.clamp(min=-mlp.limit), mlp)


class ClampAfter(WholeSpec):
    """The activation is limited, not the gate."""

    def limited_activation(self, gate_RI: torch.Tensor, mlp: MLP) -> torch.Tensor:
        return super().limited_activation(gate_RI, replace(mlp, limit_at="after") if mlp.limit else mlp)


class ClampBefore(WholeSpec):
    """The gate is limited, not the activation."""

    def limited_activation(self, gate_RI: torch.Tensor, mlp: MLP) -> torch.Tensor:
        return super().limited_activation(gate_RI, replace(mlp, limit_at="before"))


class SharedClampedAsRouted(WholeSpec):
    """The shared expert takes the limit of the routed ones."""

    def with_shared(self, call: Call, routed_TH: torch.Tensor, shared_TS: torch.Tensor | None,
                    parallel: Parallel) -> torch.Tensor:
        assert call.spec.shared is not None
        spec = replace(call.spec, shared=replace(call.spec.shared, mlp=call.spec.experts))
        return super().with_shared(replace(call, spec=spec), routed_TH, shared_TS, parallel)


class SigmoidScaleOne(WholeSpec):
    """Plain silu where its sigmoid is scaled."""

    def activation(self, gate_RI: torch.Tensor, mlp: MLP) -> torch.Tensor:
        return super().activation(gate_RI, replace(mlp, sigmoid_scale=1.0))


class NoUpOffset(WholeSpec):
    """The activation is multiplied with up alone."""

    def up_factor(self, up_RI: torch.Tensor, mlp: MLP) -> torch.Tensor:
        return super().up_factor(up_RI, replace(mlp, up_offset=0.0))


class NoSoftcap(WholeSpec):
    """Gate and up are not soft-capped."""

    def activated(self, gate_up_RGI: torch.Tensor, mlp: MLP) -> torch.Tensor:
        return super().activated(gate_up_RGI, replace(mlp, gate_softcap=0.0, up_softcap=0.0))


class SigmoidSoftcapped(WholeSpec):
    """The sigmoid takes the soft-capped gate too."""

    def activation(self, gate_RI: torch.Tensor, mlp: MLP) -> torch.Tensor:
        capped_RI = mlp.gate_softcap * torch.tanh(gate_RI / mlp.gate_softcap)
        return super().activation(capped_RI, replace(mlp, gate_softcap=0.0))


class GeluErf(WholeSpec):
    """The erf form of gelu where the tanh form is asked for."""

    def activation(self, gate_RI: torch.Tensor, mlp: MLP) -> torch.Tensor:
        return super().activation(gate_RI, replace(mlp, activation="gelu"))


class ReluNotSquared(WholeSpec):
    """relu where its square is asked for."""

    def activation(self, gate_RI: torch.Tensor, mlp: MLP) -> torch.Tensor:
        return super().activation(gate_RI, replace(mlp, activation="relu"))


class GateUpSwapped(WholeSpec):
    """w1 and w3 exchanged, with their biases."""

    def project(self, x_RH: torch.Tensor, expert: ExpertWeights) -> torch.Tensor:
        return super().project(x_RH, expert).flip(1)


class UpBiasDropped(WholeSpec):
    """Gate and up come without their biases."""

    def project(self, x_RH: torch.Tensor, expert: ExpertWeights) -> torch.Tensor:
        return super().project(x_RH, expert._replace(w13_bias_GI=None))


class DownBiasDropped(WholeSpec):
    """No rank adds the bias of the second product."""

    def down_bias(self, call: Call, bias_H: torch.Tensor) -> torch.Tensor:
        return bias_H * 0


class DownBiasPerRank(WholeSpec):
    """Every rank adds the bias of the second product."""

    def down_bias(self, call: Call, bias_H: torch.Tensor) -> torch.Tensor:
        return bias_H


class OutputBiasPerRank(WholeSpec):
    """Every rank adds the bias of the output."""

    def output_bias(self, call: Call) -> torch.Tensor | float:
        assert call.weights.output_bias_H is not None
        return call.weights.output_bias_H.float()


class WeightOnOutput(WholeSpec):
    """The routing weight multiplies the rows that come out."""

    def tokens(self, call: Call, x_RH: torch.Tensor, weight_R1: torch.Tensor) -> torch.Tensor:
        return x_RH

    def weighted(self, call: Call, down_RH: torch.Tensor, weight_R1: torch.Tensor) -> torch.Tensor:
        return down_RH * weight_R1


class IdentityPerRank(WholeSpec):
    """Every rank adds the rows of identity experts."""

    def identity(self, call: Call, x_RH: torch.Tensor, weight_R1: torch.Tensor) -> torch.Tensor:
        return x_RH * weight_R1


class IdentityUnweighted(WholeSpec):
    """Identity experts return the token as it is."""

    def identity(self, call: Call, x_RH: torch.Tensor, weight_R1: torch.Tensor) -> torch.Tensor:
        return x_RH * (call.rank == 0)


class MeanAsSum(WholeSpec):
    """Routed and shared rows are added, not averaged."""

    def merged_shared(self, routed_TH: torch.Tensor, shared_TH: torch.Tensor,
                      shared: SharedExpert) -> torch.Tensor:
        return routed_TH + shared_TH


class ScaleOnShared(WholeSpec):
    """The factor of the routing weights multiplies the shared expert too."""

    def merged_shared(self, routed_TH: torch.Tensor, shared_TH: torch.Tensor,
                      shared: SharedExpert) -> torch.Tensor:
        return routed_TH + 2.5 * shared_TH


class SharedGatesSwapped(WholeSpec):
    """The weights of two shared experts change places."""

    def of_columns(self, shared_TS: torch.Tensor, shared: SharedExpert, call: Call,
                   parallel: Parallel) -> torch.Tensor:
        return super().of_columns(shared_TS.flip(1), shared, call, parallel)


class SharedColumnsOfRankZero(WholeSpec):
    """Every rank weights its columns as if they were the first."""

    def of_columns(self, shared_TS: torch.Tensor, shared: SharedExpert, call: Call,
                   parallel: Parallel) -> torch.Tensor:
        start, stop = parallel.ranges(shared.intermediate_size)[call.rank]
        width = shared.intermediate_size // shared.num_experts
        return shared_TS.repeat_interleave(width, 1)[:, :stop - start].float()


class NaNSpreads(WholeSpec):
    """A sum over all tokens, zero when all is well, is added to every row: padding that is multiplied by zero."""

    def sum_of_slots(self, rows_TKH: torch.Tensor) -> torch.Tensor:
        return super().sum_of_slots(rows_TKH) + 0 * rows_TKH.sum()


class NaNBecomesZero(WholeSpec):
    """max(g, 0) of a NaN is 0 where the hardware's maximum prefers numbers."""

    def activated(self, gate_up_RGI: torch.Tensor, mlp: MLP) -> torch.Tensor:
        return super().activated(gate_up_RGI, mlp).nan_to_num(nan=0.0)


class NaNTokensVanish(WholeSpec):
    """A token whose logits are not numbers is sent to no expert."""

    def routing(self, call: Call, logits_TE: torch.Tensor | None
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        ids_TK, weights_TK, shared_TS = super().routing(call, logits_TE)
        lost_T1 = torch.isnan(weights_TK).any(-1, keepdim=True)
        return ids_TK.masked_fill(lost_T1, -1), weights_TK.masked_fill(lost_T1, 0.0), shared_TS


class NaNEndsInStore(WholeSpec):
    """Right stages, but the last store writes 0 for what is not finite."""

    def finish(self, call: Call, merged_TH: torch.Tensor, residual_TH: torch.Tensor | None) -> torch.Tensor:
        total_TH = self.all_reduce(call, merged_TH).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return call.store(Stage.REDUCED, total_TH)
