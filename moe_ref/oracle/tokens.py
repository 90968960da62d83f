"""How tokens enter the work of a tp group, and how its partial sums become the result.

    tokens                in                                  out
    on every rank         as they are                         all-reduce, or reduce-scatter and all-gather
    sharded over tp       all-gather                          reduce-scatter
    and on every ep rank  as they are, see dispatch.py else   all-reduce over ep
"""

from dataclasses import dataclass, replace

import torch

from moe_ref.contract.collectives import assemble, copy, enter, gather, leave, once, scatter
from moe_ref.contract.parallel import cut
from moe_ref.contract.rank import Rank
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.vocabulary import Schedule
from moe_ref.contract.weights import ExpertWeights, WeightSource
from moe_ref.oracle.router import shared_gates


@dataclass(frozen=True)
class GroupTokens:
    """All tokens of a tp group, the same on each of its ranks; numbers in fp64. counts: how many each rank brought."""

    x_TH: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    shared_TS: torch.Tensor | None
    counts: tuple[int, ...]


class RouterOverTokens:
    """A source whose router and gates get their gradients from all tokens, wherever those are.

    Each rank routes its own tokens, so the gradients of ranks with other tokens are added up.
    """

    def __init__(self, weights: WeightSource, rank: Rank) -> None:
        def over_tokens(parameter: torch.Tensor | None) -> torch.Tensor | None:
            return None if parameter is None else enter(parameter.double(), *rank.with_other_tokens)

        self.router_EH, self.router_bias_E = over_tokens(weights.router_EH), over_tokens(weights.router_bias_E)
        self.selection_bias_E, self.weight_scale_E = weights.selection_bias_E, over_tokens(weights.weight_scale_E)
        self.shared_gate_SH, self.output_bias_H = over_tokens(weights.shared_gate_SH), weights.output_bias_H
        self._weights = weights

    def expert(self, e: int) -> ExpertWeights:
        return self._weights.expert(e)

    def shared_expert(self) -> ExpertWeights | None:
        return self._weights.shared_expert()


def agreed_tokens(x_TH: torch.Tensor, rank: Rank) -> torch.Tensor:
    """The tokens, those of tp rank 0 under the gather schedule."""
    return copy(x_TH, rank.tp) if rank.by_output else x_TH


def with_gates(routing: Routing, x_TH: torch.Tensor, weights: WeightSource, spec: MoESpec, rank: Rank) -> Routing:
    """The routing with the shared expert's sigmoid gates, computed here where it does not carry them."""
    if routing.shared_TS is not None:
        return routing
    return replace(routing, shared_TS=shared_gates(x_TH, RouterOverTokens(weights, rank), spec))


def enter_tokens(x_TH: torch.Tensor, routing: Routing, spec: MoESpec, rank: Rank) -> GroupTokens:
    """Tokens and routing of the whole tp group, their gradients completed on the way back.

    Without sharding over tp there is nothing to fetch; gates stay behind where the shared expert is whole.
    """
    over_tp, over_ep = rank.parallel.tokens.over_tp, rank.parallel.tokens.over_ep

    def entered(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tensor = tensor.double() if over_ep else enter(tensor.double(), rank.ep)
        return gather(tensor, rank.tp) if over_tp else (enter(tensor, rank.tp),)

    parts, ids_TK, shared_TS = entered(x_TH), routing.ids_TK, routing.shared_TS
    if over_tp and rank.tp.size > 1:
        ids_TK = torch.cat(rank.tp.all_gather(ids_TK.contiguous()))
    weights_TK = torch.cat(entered(routing.weights_TK))
    gates_TS = None
    if shared_TS is not None and spec.shared is not None and not rank.whole_shared:
        gates_TS = torch.cat(entered(shared_TS))
    return GroupTokens(torch.cat(parts), ids_TK, weights_TK, gates_TS, tuple(len(part) for part in parts))


def whole_in_sum(parameter_H: torch.Tensor, rank: Rank) -> torch.Tensor:
    """A parameter (H,) that every rank holds whole, as this rank's part of the sum; its gradient is complete."""
    whole_H = enter(parameter_H.double(), rank.tp, rank.ep)
    start, stop = rank.outputs(len(whole_H))
    return whole_H[start:stop] if rank.by_output else once(whole_H, rank.adds_what_is_whole)


def complete(part_TH: torch.Tensor, counts: tuple[int, ...], rank: Rank) -> torch.Tensor:
    """This rank's tokens of the result from its partial sum, or from its columns under the gather schedule."""
    if rank.by_output:
        return assemble(part_TH.T, rank.tp).T.contiguous()
    if rank.parallel.schedule is not Schedule.REDUCE_SCATTER:
        return leave(part_TH, *rank.with_other_parts)
    over_tp = rank.parallel.tokens.over_tp
    if not over_tp:
        counts = tuple(stop - start for start, stop in cut(len(part_TH), (1,) * rank.tp.size))
    y_TH = leave(scatter(part_TH, counts, rank.tp), *rank.with_other_parts[1:])
    return y_TH if over_tp else assemble(y_TH, rank.tp)
