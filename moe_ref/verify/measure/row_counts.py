"""Which usual mistake of a dispatch makes ranks serve as many rows as they did. Words for a message, no verdict."""

from collections.abc import Callable
from dataclasses import replace

import torch

from moe_ref.contract.case import Case
from moe_ref.contract.shares import RankShare
from moe_ref.contract.vocabulary import Hosting
from moe_ref.verify.measure.placing import servers


def likely_rows(case: Case, shares: tuple[RankShare, ...], ids_TK: torch.Tensor, shown: list[int]) -> str:
    """Words for it, where the rows that all ranks show are those of one mistake; otherwise nothing."""
    parallel = case.parallel
    served = [int((servers(ids_TK, case, shares) == share.ep_rank).sum()) for share in shares]
    other = Hosting.CONTIGUOUS if parallel.hosting is Hosting.ROUND_ROBIN else Hosting.ROUND_ROBIN
    otherwise = replace(case, parallel=replace(parallel, hosting=other))
    single = torch.isin(ids_TK, torch.tensor(parallel.redundant, dtype=ids_TK.dtype), invert=True)
    mistakes: dict[str, Callable[[RankShare], int]] = {
        f"hosting read as {other}": lambda share: int((servers(ids_TK, otherwise, shares) == share.ep_rank).sum())}
    if parallel.redundant:
        mistakes["every copy of a redundant expert serving"] = lambda share: int(torch.isin(
            ids_TK, torch.tensor(share.experts, dtype=ids_TK.dtype)).sum())
        mistakes["no copy of a redundant expert serving"] = lambda share: int(
            ((servers(ids_TK, case, shares) == share.ep_rank) & single).sum())
    most = max(shown)
    mistakes[f"rows beyond {most} on a rank dropped"] = lambda share: min(served[share.rank], most)
    fitting = [words for words, count in mistakes.items() if [count(share) for share in shares] == shown]
    return f"looks like {fitting[0]}" if fitting else ""
