"""How tokens enter the work of a tp group, and how its partial sums become the result.

    tokens                in                                  out
    on every rank         as they are                         all-reduce, or reduce-scatter and all-gather
    sharded over tp       all-gather                          reduce-scatter
    and on every ep rank  as they are, see dispatch.py else   all-reduce over ep
"""

from dataclasses import dataclass, replace

import torch

from moe_fast.held import Held
from moe_ref.contract.collectives import assemble, copy, enter, gather, leave, scatter
from moe_ref.contract.parallel import cut
from moe_ref.contract.quantised import QuantisedWeights
from moe_ref.contract.rank import Rank
from moe_ref.contract.routing import Routing
from moe_ref.contract.vocabulary import Schedule


@dataclass(frozen=True)
class GroupTokens:
    """All tokens of a tp group, the same on each of its ranks; weights and gates in fp32.

    gate_TS: of a shared expert that is part of the sum. counts: how many tokens each rank brought.
    """

    x_TH: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    gate_TS: torch.Tensor | None
    counts: tuple[int, ...]


def agreed_tokens(x_TH: torch.Tensor, rank: Rank) -> torch.Tensor:
    """The tokens, those of tp rank 0 under the gather schedule."""
    return copy(x_TH, rank.tp) if rank.by_output else x_TH


def router_over_tokens(weights: Held, rank: Rank) -> Held:
    """The weights, those of router and gates with gradients from all tokens, wherever those are.

    Each rank routes its own. Beside encoded experts nothing has gradients.
    """
    if isinstance(weights, QuantisedWeights) or not rank.with_other_tokens:
        return weights
    held = {name: getattr(weights, name) for name in ("router_EH", "router_bias_E", "weight_scale_E", "shared_gate_SH")}
    return replace(weights, **{name: enter(tensor, *rank.with_other_tokens)
                               for name, tensor in held.items() if tensor is not None})


def enter_tokens(x_TH: torch.Tensor, routing: Routing, gate_TS: torch.Tensor | None, rank: Rank) -> GroupTokens:
    """Tokens and routing of the whole tp group, their gradients completed on the way back.

    Without sharding over tp there is nothing to fetch; gates stay behind where the shared expert is whole.
    """
    gates = () if gate_TS is None or rank.whole_shared else _entered(gate_TS.to(torch.float32), rank)
    weights = _entered(routing.weights_TK.to(torch.float32), rank)
    ids = rank.tp.all_gather(routing.ids_TK.contiguous()) if len(weights) > 1 else (routing.ids_TK,)
    x = _entered(x_TH, rank)
    return GroupTokens(_joined(x), _joined(ids), _joined(weights), _joined(gates) if gates else None,
                       tuple(len(part) for part in x))


def _entered(tensor: torch.Tensor, rank: Rank) -> tuple[torch.Tensor, ...]:
    """By the tp rank that brought it; one part where all brought the same."""
    tensor = tensor if rank.over_ep else enter(tensor, rank.ep)
    return gather(tensor, rank.tp) if rank.over_tp else (enter(tensor, rank.tp),)


def _joined(parts: tuple[torch.Tensor, ...] | list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(tuple(parts)) if len(parts) > 1 else parts[0]


def complete(part_TH: torch.Tensor, counts: tuple[int, ...], rank: Rank) -> torch.Tensor:
    """This rank's tokens of the result from its partial sum, or from its columns under the gather schedule."""
    if rank.by_output:
        return assemble(part_TH.T, rank.tp).T.contiguous()
    if rank.parallel.schedule is not Schedule.REDUCE_SCATTER:
        return leave(part_TH, *rank.with_other_parts)
    if not rank.over_tp:
        counts = tuple(stop - start for start, stop in cut(len(part_TH), (1,) * rank.tp.size))
    y_TH = leave(scatter(part_TH, counts, rank.tp), *rank.with_other_parts[1:])
    return y_TH if rank.over_tp else assemble(y_TH, rank.tp)
