"""What every rank of a case starts from, holds and returns. Imports no torch."""

from dataclasses import dataclass

from moe_ref.contract.case import Case
from moe_ref.contract.parallel import Parallel, Range, cut
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.vocabulary import Schedule


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """One rank of the grid.

    tokens: those it is handed and returns. merged_tokens: those its partial sum is made of, all tokens of its tp
    group. columns, shared_columns: of the intermediate axes. outputs: columns of the output that its w2 makes.
    experts: those it hosts, in the order of its weights.
    """

    rank: int
    ep_rank: int
    tp_rank: int
    tokens: Range
    merged_tokens: Range
    columns: Range
    shared_columns: Range
    outputs: Range
    experts: tuple[int, ...]


def rank_shares(case: Case) -> tuple[RankShare, ...]:
    """Every rank of a case's grid, in order."""
    return spread(case.problem.spec, case.problem.num_tokens, case.parallel, case.token_shares)


def spread(spec: MoESpec, num_tokens: int, parallel: Parallel,
           token_shares: tuple[int, ...] | None = None) -> tuple[RankShare, ...]:
    """Every rank of the grid, in order; token_shares as in Case."""
    over_tp, over_ep = parallel.tokens.over_tp, parallel.tokens.over_ep
    per_shard = parallel.tp if over_tp else 1
    parts = cut(num_tokens, token_shares or (1,) * (per_shard * (parallel.ep if over_ep else 1)))
    columns, hosted = parallel.ranges(spec.intermediate_size), parallel.hosted(spec.num_experts)
    shared_columns = parallel.shared_ranges(spec.shared.intermediate_size if spec.shared else 0)
    by_output = parallel.schedule is Schedule.GATHER
    outputs = parallel.ranges(spec.hidden_size) if by_output else ((0, spec.hidden_size),) * parallel.tp
    shares = []
    for rank in range(parallel.size):
        ep_rank, tp_rank = parallel.coordinates(rank)
        first = ep_rank * per_shard if over_ep else 0
        shares.append(RankShare(
            rank=rank, ep_rank=ep_rank, tp_rank=tp_rank, tokens=parts[first + (tp_rank if over_tp else 0)],
            merged_tokens=(parts[first][0], parts[first + per_shard - 1][1]), columns=columns[tp_rank],
            shared_columns=shared_columns[rank], outputs=outputs[tp_rank], experts=hosted[ep_rank]))
    return tuple(shares)
