"""A right layer under every form of parallelism in plain torch, every step on its own so that it can be replaced."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from moe_ref.contract.comm import Comm, Groups
from moe_ref.contract.features import Feature
from moe_ref.contract.parallel import Parallel, cut
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec, SharedExpert
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Hosting, Schedule, SharedPlacement, Stage, Tokens
from moe_ref.contract.weights import ExpertWeights, MoEWeights
from tests.subjects.base import Call
from tests.subjects.parallel_call import ParallelCall, Routed, Served
from tests.subjects.whole import WholeSpec


def is_identity(ids: torch.Tensor, spec: MoESpec) -> torch.Tensor:
    """Whether ids name an identity expert; beyond those they name none."""
    return (ids >= spec.num_experts) & (ids < spec.num_choices)


class ParallelMoE(WholeSpec):
    """fp32 arithmetic, rows and partial sums in the dtype of the model, the weight in the down product."""

    features = tuple(feature for feature in Feature if feature is not Feature.WEIGHT_ON_INPUT)

    def __init__(self) -> None:
        super().__init__()
        self.CAPABILITIES = replace(
            self.CAPABILITIES, max_ep=64, tokens=tuple(Tokens), hostings=tuple(Hosting), redundant=True,
            shared_placements=tuple(SharedPlacement), schedules=tuple(Schedule))

    def agreed(self, tp: Comm, x_TH: torch.Tensor) -> torch.Tensor:
        """The tokens of rank 0, for the gather schedule."""
        return tp.broadcast(x_TH)

    def moe(self, x_TH: torch.Tensor, weights: MoEWeights, spec: MoESpec, parallel: Parallel | None = None,
            groups: Groups | None = None, *, routing: Routing | None = None, logits_TE: torch.Tensor | None = None,
            residual_TH: torch.Tensor | None = None, trace: Trace | None = None) -> torch.Tensor:
        call = ParallelCall(x_TH, weights, spec, groups or Groups(), trace, self.declared(x_TH, weights), self.shows,
                            parallel or Parallel())
        if call.by_output and call.size > 1:
            call = replace(call, x_TH=self.agreed(call.groups.tp, x_TH))
        call = self.loaded(call)
        ids_TK, weights_TK, shared_TS = (
            self.routing(call, logits_TE) if routing is None else (routing.ids_TK, routing.weights_TK, None))
        if trace is not None and Stage.IDS in self.shows:
            trace.record(Stage.IDS, ids_TK)
        shared_TS = None if shared_TS is None else call.round(Stage.WEIGHTS, shared_TS)
        own = Routed(call.x_TH, ids_TK, call.store(Stage.WEIGHTS, weights_TK), shared_TS)
        group = self.gathered(call, own) if call.parallel.tokens.over_tp and call.size > 1 else own
        rows_TKH = self.slots(call, group)
        schedule = self.reduced_rows if call.parallel.schedule is Schedule.ALL_REDUCE_ROWS else self.reduced_sums
        total_TH = self.with_whole(call, own, schedule(call, group, rows_TKH, residual_TH))
        if residual_TH is not None:
            total_TH = self.with_residual(call, total_TH, residual_TH)
        return call.store(Stage.REDUCED, total_TH)

    def loaded(self, call: ParallelCall) -> ParallelCall:
        """The call with the weights that the rank computes with."""
        return call

    # Tokens and rows on their way to the experts.

    def gathered(self, call: ParallelCall, own: Routed) -> Routed:
        """Tokens of the whole tp group, in rank order."""
        shared_TS = own.shared_TS
        if shared_TS is not None and call.cuts_shared:
            shared_TS = torch.cat(call.groups.tp.all_gather(shared_TS))
        x_parts = call.groups.tp.all_gather(own.x_TH)
        ids_TK, weights_TK = self.gathered_routing(call, own)
        return Routed(torch.cat(x_parts), ids_TK, weights_TK, shared_TS, tuple(len(part) for part in x_parts))

    def gathered_routing(self, call: ParallelCall, own: Routed) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat(call.groups.tp.all_gather(own.ids_TK)), torch.cat(call.groups.tp.all_gather(own.weights_TK))

    def slots(self, call: ParallelCall, group: Routed) -> torch.Tensor:
        """Rows of every slot as this rank's sum takes them, zero where others serve, (T, K, H) fp32."""
        served = self.dispatched(call, group)
        down_RH = self.expert_rows_of(call, served)
        rows_RH = torch.zeros(group.ids_TK.numel(), down_RH.shape[1])
        if call.travels:
            rows_RH[torch.cat(served.homes)] = torch.cat(self.returned(call, down_RH, served)).float()
        else:
            rows_RH[served.homes[call.groups.ep.rank]] = down_RH.float()
        rows_TKH = rows_RH.unflatten(0, group.ids_TK.shape)
        if call.groups.ep.size > 1 and call.adds_uncut:
            token_R, slot_R = is_identity(group.ids_TK, call.spec).nonzero(as_tuple=True)
            weight_R1 = group.weights_TK[token_R, slot_R, None].float()
            identity_RH = self.weighted(call, group.x_TH[token_R].float(), weight_R1)
            rows_TKH[token_R, slot_R] = call.round(Stage.DOWN, identity_RH).float()
        if self.weight_at == "merge":
            rows_TKH = rows_TKH * group.weights_TK.float()[..., None]
        return rows_TKH

    def hosted(self, call: ParallelCall) -> tuple[tuple[int, ...], ...]:
        return call.parallel.hosted(call.spec.num_experts)

    def copy_of(self, token: int, copies: list[tuple[int, int]]) -> tuple[int, int]:
        """Which (ep rank, index there) of an expert's copies serves a token."""
        return copies[token % len(copies)]

    def places(self, call: ParallelCall, ids_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The ep rank that serves each slot, and the expert's index there; -1 for none."""
        copies: list[list[tuple[int, int]]] = [[] for _ in range(call.spec.num_experts)]
        for rank, experts in enumerate(self.hosted(call)):
            for index, expert in enumerate(experts):
                copies[expert].append((rank, index))
        rank_TK, index_TK = torch.full_like(ids_TK, -1), torch.full_like(ids_TK, -1)
        for token, ids in enumerate(ids_TK.tolist()):
            for slot, expert in enumerate(ids):
                if 0 <= expert < len(copies):
                    rank_TK[token, slot], index_TK[token, slot] = self.copy_of(token, copies[expert])
        return rank_TK, index_TK

    def dispatched(self, call: ParallelCall, group: Routed) -> Served:
        """The rows that this rank serves, in the order of tokens and slots."""
        x_RH, weight_R1 = group.x_TH.repeat_interleave(group.ids_TK.shape[1], 0), group.weights_TK.reshape(-1, 1)
        if call.groups.ep.size == 1:
            everything = torch.arange(group.ids_TK.numel())
            return Served(x_RH, group.ids_TK.flatten(), weight_R1, [len(everything)], [everything])
        rank_TK, index_TK = self.places(call, group.ids_TK)
        homes = [(rank_TK.flatten() == rank).nonzero().flatten() for rank in range(call.groups.ep.size)]
        index_R = index_TK.flatten()
        if not call.travels:
            mine = homes[call.groups.ep.rank]
            return Served(x_RH[mine], index_R[mine], weight_R1[mine], [len(mine)], homes)
        x_parts = call.groups.ep.all_to_all([x_RH[home] for home in homes])
        index_parts, weight_parts = self.described(call, [index_R[home] for home in homes],
                                                   [weight_R1[home] for home in homes])
        return Served(torch.cat(x_parts), torch.cat(index_parts), torch.cat(weight_parts),
                      [len(part) for part in x_parts], homes)

    def described(self, call: ParallelCall, index_parts: list[torch.Tensor], weight_parts: list[torch.Tensor]
                  ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Experts and weights of the rows, sent after them."""
        return call.groups.ep.all_to_all(index_parts), call.groups.ep.all_to_all(weight_parts)

    def returned(self, call: ParallelCall, down_RH: torch.Tensor, served: Served) -> list[torch.Tensor]:
        """Rows back from every ep rank, in the order in which they were sent."""
        return call.groups.ep.all_to_all(list(down_RH.split(served.counts)))

    # Experts.

    def expert_rows_of(self, call: ParallelCall, served: Served) -> torch.Tensor:
        """Rows of the served slots as they are stored, weighted here or at the merge, (R, H)."""
        spec, weights, num_rows = call.spec, call.weights, len(served.x_RH)
        x_RH, weight_R1 = served.x_RH.float(), served.weight_R1.float()
        gate_up_RGI = torch.zeros(num_rows, spec.experts.num_projections, weights.w13_EGIH.shape[2])
        act_RI = torch.zeros(num_rows, weights.w13_EGIH.shape[2])
        rows = [(served.expert_R == e).nonzero().flatten() for e in range(len(weights.w2_EHI))]
        for e, row_R in enumerate(rows):
            gate_up = self.project(self.tokens(call, x_RH[row_R], weight_R1[row_R]), weights.expert(e))
            gate_up_RGI[row_R] = call.round(Stage.GATE_UP, gate_up).float()
            act_RI[row_R] = call.round(Stage.ACT, self.activated(gate_up_RGI[row_R], spec.experts)).float()
        call.store(Stage.GATE_UP, gate_up_RGI)
        act_RI = call.store(Stage.ACT, act_RI)
        act_RI = (self.act_of_all(call, act_RI) if call.by_output and call.size > 1 else act_RI).float()
        down_RH = torch.zeros(num_rows, weights.w2_EHI.shape[1])
        for e, row_R in enumerate(rows):
            back = self.projected_back(call, act_RI[row_R], weights.expert(e))
            down_RH[row_R] = self.weighted(call, back, weight_R1[row_R])
        if call.groups.ep.size == 1 and call.adds_uncut:
            row_R = is_identity(served.expert_R, spec).nonzero().flatten()
            columns = slice(*call.parallel.ranges(spec.hidden_size)[call.rank]) if call.by_output else slice(None)
            down_RH[row_R] = self.weighted(call, x_RH[row_R, columns], weight_R1[row_R])
        return call.store(Stage.DOWN, down_RH)

    def weighted(self, call: Call, down_RH: torch.Tensor, weight_R1: torch.Tensor) -> torch.Tensor:
        return down_RH if self.weight_at == "merge" else down_RH * weight_R1

    def act_of_all(self, call: ParallelCall, act_RI: torch.Tensor) -> torch.Tensor:
        """Activations of the whole width, whose columns lie on the tp ranks."""
        return self.joined(call.groups.tp.all_gather(act_RI.T.contiguous())).T

    def joined(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """What ranks gathered, in rank order."""
        return torch.cat(parts)

    def down_bias(self, call: Call, bias_H: torch.Tensor) -> torch.Tensor:
        assert isinstance(call, ParallelCall)
        return bias_H * (call.by_output or call.groups.tp.rank == 0)

    # Shared expert.

    def shared_of(self, call: ParallelCall, tokens: Routed) -> torch.Tensor:
        """Rows of the shared expert as they are stored, with this rank's columns of it, (T, H) fp32."""
        shared, expert = call.spec.shared, call.weights.shared_expert()
        assert shared is not None
        assert expert is not None
        gate_up = call.round(Stage.GATE_UP, self.project(tokens.x_TH.float(), expert)).float()
        act_TI = call.round(Stage.ACT, self.activated(gate_up, shared.mlp)).float()
        if shared.gate == "router" and tokens.shared_TS is not None:
            columns_TI = self.of_columns(tokens.shared_TS, shared, call, call.parallel)
            act_TI = call.round(Stage.ACT, act_TI * columns_TI).float()
        if call.by_output and call.cuts_shared and call.size > 1:
            act_TI = self.act_of_all(call, act_TI)
        shared_TH = self.product_back(act_TI, expert.w2_HI) + self.shared_bias(call, expert)
        if shared.gate == "sigmoid" and tokens.shared_TS is not None:
            shared_TH = shared_TH * tokens.shared_TS.float()
        return call.store(Stage.SHARED, shared_TH).float()

    def shared_bias(self, call: ParallelCall, expert: ExpertWeights) -> torch.Tensor | float:
        adds = call.adds_uncut or not call.cuts_shared
        return 0.0 if expert.w2_bias_H is None or not adds else expert.w2_bias_H.float()

    def of_columns(self, shared_TS: torch.Tensor, shared: SharedExpert, call: Call, parallel: Parallel) -> torch.Tensor:
        start, stop = parallel.shared_ranges(shared.intermediate_size)[call.groups.rank]
        width = shared.intermediate_size // shared.num_experts
        return shared_TS.float().repeat_interleave(width, 1)[:, start:stop]

    # Ranks: from rows to the output.

    def reduced_rows(self, call: ParallelCall, group: Routed, rows_TKH: torch.Tensor,
                     residual_TH: torch.Tensor | None) -> torch.Tensor:
        """Every slot summed between ranks, then the slots."""
        if call.cuts_shared:
            rows_TKH = torch.cat([rows_TKH, self.shared_of(call, group)[:, None]], 1)
        rows_TKH = self.all_reduced(call, call.travelling(rows_TKH)).float()
        top_k = group.ids_TK.shape[1]
        merged_TH = self.sum_of_slots(rows_TKH[:, :top_k])
        if call.spec.shared is not None and call.cuts_shared:
            merged_TH = self.merged_shared(merged_TH, rows_TKH[:, top_k], call.spec.shared)
        if call.parallel.shared is SharedPlacement.SHARDED and call.weights.output_bias_H is not None:
            merged_TH = merged_TH + call.weights.output_bias_H.float()
        return call.store(Stage.MERGED, merged_TH)

    def reduced_sums(self, call: ParallelCall, group: Routed, rows_TKH: torch.Tensor,
                     residual_TH: torch.Tensor | None) -> torch.Tensor:
        """Slots summed on every rank, then the ranks' sums."""
        merged_TH = self.sum_of_slots(rows_TKH)
        if call.spec.shared is not None and call.cuts_shared:
            merged_TH = self.merged_shared(merged_TH, self.shared_of(call, group), call.spec.shared)
        merged_TH = self.with_output_bias(call, merged_TH)
        merged_TH = call.store(Stage.MERGED, self.last_addend(call, merged_TH, residual_TH))
        if call.by_output:
            return self.of_all_columns(call, merged_TH) if call.size > 1 else merged_TH
        if call.parallel.schedule is Schedule.REDUCE_SCATTER:
            return self.scattered(call, group, call.travelling(merged_TH))
        return self.all_reduced(call, call.travelling(merged_TH))

    def with_output_bias(self, call: ParallelCall, merged_TH: torch.Tensor) -> torch.Tensor:
        bias_H, late = call.weights.output_bias_H, call.parallel.shared is SharedPlacement.REPLICATED
        if bias_H is None or late or not call.adds_uncut:
            return merged_TH
        columns = slice(*call.parallel.ranges(call.spec.hidden_size)[call.rank]) if call.by_output else slice(None)
        return merged_TH + bias_H[columns].float()

    def last_addend(self, call: ParallelCall, merged_TH: torch.Tensor,
                    residual_TH: torch.Tensor | None) -> torch.Tensor:
        """The rank's sum before it is stored."""
        return merged_TH

    def all_reduced(self, call: ParallelCall, tensor: torch.Tensor) -> torch.Tensor:
        tensor = self.sum_over(call, call.groups.tp, tensor)
        return tensor if call.parallel.tokens.over_ep else self.sum_over(call, call.groups.ep, tensor)

    def sum_over(self, call: ParallelCall, comm: Comm, tensor: torch.Tensor) -> torch.Tensor:
        return comm.all_reduce(tensor) if comm.size > 1 else tensor

    def scattered(self, call: ParallelCall, group: Routed, merged_TH: torch.Tensor) -> torch.Tensor:
        """The rank's tokens of the sum; gathered again where every rank of tp returns all of them."""
        tp, over_tp, part_TH = call.groups.tp, call.parallel.tokens.over_tp, merged_TH
        if tp.size > 1:
            equal = [stop - start for start, stop in cut(len(merged_TH), (1,) * tp.size)]
            part_TH = self.scatter(call, merged_TH, group.counts if over_tp else equal)
        if not call.parallel.tokens.over_ep:
            part_TH = self.sum_over(call, call.groups.ep, part_TH)
        return part_TH if over_tp or tp.size == 1 else self.joined(tp.all_gather(part_TH))

    def scatter(self, call: ParallelCall, merged_TH: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        return call.groups.tp.reduce_scatter(merged_TH, rows)

    def of_all_columns(self, call: ParallelCall, merged_TH: torch.Tensor) -> torch.Tensor:
        return self.joined(call.groups.tp.all_gather(merged_TH.T.contiguous())).T.contiguous()

    def with_whole(self, call: ParallelCall, own: Routed, total_TH: torch.Tensor) -> torch.Tensor:
        """What every rank adds to the sum of its own tokens: a whole shared expert, and the output bias with it."""
        if call.parallel.shared is SharedPlacement.SHARDED:
            return total_TH
        if call.spec.shared is not None:
            total_TH = self.merged_shared(total_TH.float(), self.shared_of(call, own), call.spec.shared)
        return total_TH if call.weights.output_bias_H is None else total_TH.float() + call.weights.output_bias_H.float()

    def with_residual(self, call: ParallelCall, total_TH: torch.Tensor, residual_TH: torch.Tensor) -> torch.Tensor:
        return total_TH.float() + residual_TH.float()


parallel_moe = ParallelMoE()
