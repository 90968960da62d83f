"""What a failing stage looks like: the usual mistake with such numbers, in one line, or nothing; not a verdict."""

from moe_ref.contract.case import Case
from moe_ref.contract.shares import RankShare, rank_shares
from moe_ref.contract.vocabulary import Schedule, Stage
from moe_ref.records.schema import StageResult, from_number

_NEAR = 0.02
"""How far from a whole multiple a best-fit scale may be: roundings and a residual move it."""
_ORDER_TOO = "; or parts of the ranks in another order beside a right residual"
_SHOWN_ONLY = (Stage.GATE_UP, Stage.ACT, Stage.DOWN, Stage.SHARED, Stage.MERGED)
_ROUNDINGS = 4.0
"""What is off by a few times its rigorous bound is off by a few roundings; other mistakes are off by much more."""
_UNRELATED = 0.2
"""Below this scale got and want have little in common; numbers of another rank have about 0."""


def likely(stage: StageResult, case: Case, output: StageResult | None = None) -> str:
    """Words for it; empty where numbers fit no known mistake. output: how the whole layer compares."""
    if (stage.exact and not stage.is_probe) or not stage.num_bad:
        return ""
    if not stage.is_probe and from_number(stage.bound_ratio) <= _ROUNDINGS < from_number(stage.ratio):
        return _arithmetic(stage)
    if output is not None and stage.stage in _SHOWN_ONLY and from_number(output.ratio) <= 1:
        return ("a stage shown or declared otherwise than it is computed, if the output, within its wider bound, is "
                "right: rows in (token, slot) order? weight_at? a store left out?")
    if case.parallel.size == 1:
        return ""
    shares = rank_shares(case)
    return (_of_scale(stage, case) or _of_ranks(stage, case, shares) or _of_tokens(stage, case, shares)
            or _of_order(stage, case))


def _arithmetic(stage: StageResult) -> str:
    """Every element is near its rigorous bound or inside, but not as the declared arithmetic makes it."""
    sigmas = from_number(stage.sigmas)
    return (f"other arithmetic than declared, {sigmas:.3g} sigmas off: fewer bits in a sum or in its operands, a "
            "rounding more or less, or a store that truncates; a factor near 1")


def _of_scale(stage: StageResult, case: Case) -> str:
    if stage.stage != Stage.REDUCED:
        return ""
    scale, parallel = from_number(stage.scale), case.parallel
    by_parts = parallel.schedule in (Schedule.GATHER, Schedule.REDUCE_SCATTER)
    for size in sorted({parallel.tp, parallel.ep, parallel.size} - {1}):
        if abs(scale / size - 1) < _NEAR:
            return f"{size} times the sum: reduced twice, or added by {size} ranks"
        if abs(scale * size - 1) < _NEAR:
            return f"1/{size} of the sum: not reduced, or a mean" + _ORDER_TOO * (by_parts and case.problem.residual)
    if case.problem.residual and 1 + _NEAR < scale < parallel.size:
        return "a residual that more than one rank adds"
    return ""


def _of_ranks(stage: StageResult, case: Case, shares: tuple[RankShare, ...]) -> str:
    """Ranks that fail tell what they do and the others do not."""
    bad, spec = set(stage.bad_ranks), case.problem.spec
    adds_once = spec.experts.bias or any(e >= spec.num_experts for e in stage.bad_experts)
    if stage.stage == Stage.DOWN and adds_once and bad == {share.rank for share in shares if share.tp_rank > 0}:
        return "a bias of w2, or an identity expert, that rank 0 of tp should add alone"
    elsewhere = {share.rank for share in shares if share.ep_rank > 0}
    if stage.stage in (Stage.GATE_UP, Stage.ACT) and elsewhere and bad == elsewhere:
        return "expert numbers of the layer used where weights hold the rank's own experts from 0 on"
    even = spec.intermediate_size // case.parallel.tp
    wider = {share.rank for share in shares if share.columns[1] - share.columns[0] > even}
    if stage.stage in (Stage.ACT, Stage.DOWN) and wider and bad == wider and len(wider) < len(shares):
        return f"{even} columns assumed on every rank, where these have more"
    return ""


def _of_tokens(stage: StageResult, case: Case, shares: tuple[RankShare, ...]) -> str:
    """Where all bad tokens are known: whether they are one rank's of several."""
    if not 1 < stage.num_bad_tokens == len(stage.bad_tokens):
        return ""
    parts = {share.tokens: share.rank for share in reversed(shares)}
    holders = [rank for (start, stop), rank in parts.items() if all(start <= t < stop for t in stage.bad_tokens)]
    if len(parts) == 1 or len(holders) != 1:
        return ""
    empty = [share.rank for share in shares if share.tokens[0] == share.tokens[1] and share.rank < holders[0]]
    after = f", which follow those of rank {empty[-1]}, who has none" if empty else ""
    return f"something about the tokens of rank {holders[0]} alone{after}"


def _of_order(stage: StageResult, case: Case) -> str:
    """Numbers that have nothing to do with those wanted are usually somebody else's."""
    parallel = case.parallel
    # Of rows that travel between few ranks some come back to their place by chance.
    some_in_place = stage.stage == Stage.MERGED and parallel.tokens.over_ep
    if abs(from_number(stage.scale)) > (0.5 if some_in_place else _UNRELATED):
        return ""
    if stage.stage == Stage.REDUCED and parallel.schedule in (Schedule.GATHER, Schedule.REDUCE_SCATTER):
        return "parts of the ranks in another order"
    if stage.stage == Stage.MERGED and parallel.tokens.over_ep:
        return "rows that came back in another order"
    if stage.stage == Stage.DOWN and parallel.schedule is Schedule.GATHER:
        return "columns of the gathered activation in another order"
    if stage.stage == Stage.ACT and parallel.tp > 1 and case.problem.spec.experts.gated:
        return "gate and up rows that do not belong together, or to this rank"
    return ""
