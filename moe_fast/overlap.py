"""The ranks' sum of some tokens beside the experts of the next ones: a long prefill pays for the slower of both.

Every element is summed once and over the same ranks as without it, so the order of additions is what the schedule
declares. Only where no gradient is recorded: gradients of weights are sums over all tokens, rounded once.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache

import torch

from moe_fast.held import Held
from moe_fast.tokens import GroupTokens
from moe_ref.contract.collectives import leave
from moe_ref.contract.rank import Rank
from moe_ref.contract.vocabulary import Schedule

CHUNK_TOKENS = 4096
"""Tokens of a chunk; their experts read every weight once more. To be timed: no GPU has run it."""


def overlaps(tokens: GroupTokens, weights: Held, rank: Rank) -> bool:
    """Whether there is a sum over ranks of at least two chunks, all tokens are here, and nothing records gradients."""
    if rank.parallel.schedule is not Schedule.ALL_REDUCE or rank.over_tp or rank.over_ep:
        return False
    if len(tokens.x_TH) < 2 * CHUNK_TOKENS or all(comm.size == 1 for comm in rank.with_other_parts):
        return False
    # torch.compile orders a graph by itself.
    return not torch.compiler.is_compiling() and not (torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (tokens.x_TH, tokens.weights_TK, *dict(weights.named_tensors()).values())))


def summed_in_chunks(tokens: GroupTokens, part_of: Callable[[GroupTokens], torch.Tensor], rank: Rank) -> torch.Tensor:
    """(T, H): the sum over ranks of part_of(tokens), chunk by chunk; on a GPU sums run on a stream of their own."""
    y_TH = torch.empty_like(tokens.x_TH)
    side = _side_stream(y_TH.device) if y_TH.device.type == "cuda" else None
    for start in range(0, len(y_TH), CHUNK_TOKENS):
        stop = min(len(y_TH), start + CHUNK_TOKENS)
        part_TH = part_of(_chunk(tokens, start, stop))
        with _after_this(side):
            y_TH[start:stop] = leave(part_TH, *rank.with_other_parts)
        if side is not None:
            part_TH.record_stream(side)  # or its memory could be given to the next chunk while it is summed
    if side is not None:
        torch.cuda.current_stream(y_TH.device).wait_stream(side)
    return y_TH


def _chunk(tokens: GroupTokens, start: int, stop: int) -> GroupTokens:
    gate_TS = tokens.gate_TS
    return replace(tokens, x_TH=tokens.x_TH[start:stop], ids_TK=tokens.ids_TK[start:stop],
                   weights_TK=tokens.weights_TK[start:stop], gate_TS=None if gate_TS is None else gate_TS[start:stop],
                   counts=(stop - start,))


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _after_this(side: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    """Within it work goes to `side`, after all that was started until now."""
    if side is None:
        return nullcontext()
    side.wait_stream(torch.cuda.current_stream(side.device))
    return torch.cuda.stream(side)
