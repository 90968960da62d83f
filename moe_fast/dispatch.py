"""Slots travel to the rank that hosts their expert, and their rows back: where ep ranks have tokens of their own.

Received rows are tokens with one slot each, so the same operator computes them.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch

from moe_fast.operators.moved_rows import order_rows, take_rows
from moe_fast.tokens import GroupTokens
from moe_ref.contract.collectives import exchange
from moe_ref.contract.hosting import serving_copies
from moe_ref.contract.rank import Rank


@dataclass(frozen=True)
class Dispatch:
    """Rows that arrived, by source rank and then in (token, slot) order, and where those that left came from.

    local_R1: the expert's index in this rank's weights. counts: rows by source rank. slot_R: those sent, as token * K
    + slot, by the rank they went to. place_TK: which of those a slot is, -1 where it stayed at home.
    """

    x_RH: torch.Tensor
    local_R1: torch.Tensor
    weights_R1: torch.Tensor
    counts: tuple[int, ...]
    slot_R: torch.Tensor
    place_TK: torch.Tensor


def send(tokens: GroupTokens, num_experts: int, rank: Rank) -> Dispatch:
    """Three all-to-alls over ep: x rows, expert indices, routing weights. Slots without an expert stay at home.

    How many rows go where is the one thing the host waits for.
    """
    host_TK, index_TK = serving_copies(tokens.ids_TK, rank.parallel, num_experts)
    slot_R, place_TK, ends_N = order_rows(host_TK, rank.ep.size)
    ends = [0, *ends_N.tolist()]
    slot_R, sizes = slot_R[:ends[-1]], [stop - start for start, stop in pairwise(ends)]
    x_RH = take_rows(tokens.x_TH, slot_R // host_TK.shape[1], place_TK)
    weights_R1 = take_rows(tokens.weights_TK.reshape(-1, 1), slot_R, place_TK.view(-1, 1))
    x_parts = exchange(x_RH.split(sizes), rank.ep)
    local_parts = rank.ep.all_to_all(index_TK.view(-1, 1)[slot_R].split(sizes))
    weights_parts = exchange(weights_R1.split(sizes), rank.ep)
    return Dispatch(torch.cat(x_parts), torch.cat(local_parts), torch.cat(weights_parts),
                    tuple(len(part) for part in x_parts), slot_R, place_TK)


def send_back(rows_RH: torch.Tensor, dispatch: Dispatch, rank: Rank) -> torch.Tensor:
    """One all-to-all: the rows of this rank's slots, (R, H), in the order of dispatch.slot_R."""
    return torch.cat(exchange(rows_RH.split(dispatch.counts), rank.ep))
