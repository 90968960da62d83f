"""What each rank hands to collectives under every schedule: operations and elements, in order. Imports no torch."""

from dataclasses import dataclass

from moe_ref.contract.case import Case
from moe_ref.contract.parallel import Parallel, Range, cut
from moe_ref.contract.shares import RankShare
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.vocabulary import Schedule, SharedPlacement


def additions_between_ranks(parallel: Parallel) -> int:
    """Additions between ranks that one element of a partial sum, or of a row before the merge, goes through."""
    if parallel.schedule is Schedule.GATHER:
        return 0
    rows = parallel.schedule is Schedule.ALL_REDUCE_ROWS
    return (parallel.tp if parallel.tokens.over_ep or rows else parallel.size) - 1


@dataclass(frozen=True)
class Transfer:
    """One collective of one rank: its group, operation, elements handed over, and what they are.

    describes: ids, weights and gates that go with rows; an implementation may send those packed or otherwise.
    """

    group: str
    operation: str
    num_elements: int
    what: str
    describes: bool = False

    @property
    def name(self) -> str:
        """As records have it, "tp.all_reduce"."""
        return f"{self.group}.{self.operation}"


def transfers(case: Case, share: RankShare, rows_sent: int = 0, rows_served: int = 0) -> tuple[Transfer, ...]:
    """The collectives of one rank in a forward pass; groups of one rank have none.

    rows_sent: routed slots of the rank's tp group; rows_served: slots that its ep rank serves. Both only matter where
    rows travel to their experts (tokens sharded over ep).
    """
    spec, parallel = case.problem.spec, case.parallel
    planned = _entering(spec, case, share) + _dispatched(spec, case, rows_sent, rows_served, share)
    planned += _leaving(spec, case, share)
    sizes = {"tp": parallel.tp, "ep": parallel.ep}
    return tuple(one for one in planned if sizes[one.group] > 1)


def _length(part: Range) -> int:
    return part[1] - part[0]


def _entering(spec: MoESpec, case: Case, share: RankShare) -> list[Transfer]:
    if case.parallel.schedule is Schedule.GATHER:
        return [Transfer("tp", "broadcast", _length(share.tokens) * spec.hidden_size, "tokens of rank 0")]
    if not case.parallel.tokens.over_tp:
        return []
    own, gates = _length(share.tokens), spec.shared.num_gates if spec.shared else 0
    cut_gates = gates if case.parallel.shared is SharedPlacement.SHARDED else 0
    gathered = [Transfer("tp", "all_gather", own * spec.hidden_size, "tokens")]
    gathered += [Transfer("tp", "all_gather", own * spec.top_k, what, describes=True) for what in ("ids", "weights")]
    return gathered + [Transfer("tp", "all_gather", own * cut_gates, "shared gates", describes=True)] * (cut_gates > 0)


def _dispatched(spec: MoESpec, case: Case, sent: int, served: int, share: RankShare) -> list[Transfer]:
    if not case.parallel.tokens.over_ep:
        return []
    described = [Transfer("ep", "all_to_all", sent, what, describes=True) for what in ("experts", "weights")]
    return [Transfer("ep", "all_to_all", sent * spec.hidden_size, "rows to their experts"), *described,
            Transfer("ep", "all_to_all", served * spec.hidden_size, "rows back")]


def _leaving(spec: MoESpec, case: Case, share: RankShare) -> list[Transfer]:
    parallel, hidden, merged = case.parallel, spec.hidden_size, _length(share.merged_tokens)
    is_cut = spec.shared is not None and parallel.shared is SharedPlacement.SHARDED
    if parallel.schedule is Schedule.GATHER:
        columns = Transfer("tp", "all_gather", merged * spec.top_k * _length(share.columns), "activation")
        shared = Transfer("tp", "all_gather", merged * _length(share.shared_columns), "activation of the shared expert")
        output = Transfer("tp", "all_gather", merged * _length(share.outputs), "columns of the output")
        return [columns, *[shared] * is_cut, output]
    if parallel.schedule is Schedule.REDUCE_SCATTER:
        part = _length(share.tokens if parallel.tokens.over_tp else cut(merged, (1,) * parallel.tp)[share.tp_rank])
        steps = [Transfer("tp", "reduce_scatter", merged * hidden, "partial sums"),
                 Transfer("ep", "all_reduce", part * hidden, "partial sums of the rank's part")]
        back = Transfer("tp", "all_gather", part * hidden, "sums of the rank's part")
        return steps[:1 if parallel.tokens.over_ep else 2] + [back] * (not parallel.tokens.over_tp)
    rows = spec.top_k + is_cut if parallel.schedule is Schedule.ALL_REDUCE_ROWS else 1
    words = "rows before the merge" if parallel.schedule is Schedule.ALL_REDUCE_ROWS else "partial sums"
    steps = [Transfer(group, "all_reduce", merged * rows * hidden, words) for group in ("tp", "ep")]
    return steps[:1 if parallel.tokens.over_ep else 2]
