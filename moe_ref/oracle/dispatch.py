"""Slots travel to the rank that hosts their expert, and their rows back: where ep ranks have tokens of their own.

Received rows are tokens with one slot each, so the loop over experts is the same for them.
"""

from dataclasses import dataclass

import torch

from moe_ref.contract.collectives import exchange
from moe_ref.contract.hosting import serving_copies
from moe_ref.contract.rank import Rank
from moe_ref.oracle.tokens import GroupTokens


@dataclass(frozen=True)
class Dispatch:
    """Rows that arrived, by source rank and then in (token, slot) order, and where those that left came from.

    local_R1: the expert's index in this rank's weights. counts: rows by source rank. slot_R: those sent, as token * K
    + slot, by the rank they went to.
    """

    x_RH: torch.Tensor
    local_R1: torch.Tensor
    weights_R1: torch.Tensor
    counts: tuple[int, ...]
    slot_R: torch.Tensor


def send(tokens: GroupTokens, num_experts: int, rank: Rank) -> Dispatch:
    """Three all-to-alls over ep: x rows, expert indices, routing weights. Slots without an expert stay at home."""
    host_TK, index_TK = serving_copies(tokens.ids_TK, rank.parallel, num_experts)
    slots = [(host_TK.flatten() == host).nonzero().flatten() for host in range(rank.ep.size)]
    top_k = tokens.ids_TK.shape[1]
    x_parts = exchange([tokens.x_TH[slot_R // top_k] for slot_R in slots], rank.ep)
    local_parts = rank.ep.all_to_all([index_TK.flatten()[slot_R] for slot_R in slots])
    weights_parts = exchange([tokens.weights_TK.flatten()[slot_R] for slot_R in slots], rank.ep)
    return Dispatch(torch.cat(x_parts), torch.cat(local_parts)[:, None], torch.cat(weights_parts)[:, None],
                    tuple(len(part) for part in x_parts), torch.cat(slots))


def send_back(rows_RH: torch.Tensor, dispatch: Dispatch, num_slots: int, rank: Rank) -> torch.Tensor:
    """One all-to-all: the rows of this rank's slots, (T * K, H), zero where a slot did not travel."""
    returned_RH = torch.cat(exchange(rows_RH.split(dispatch.counts), rank.ep))
    zeros_RH = torch.zeros(num_slots, rows_RH.shape[1], dtype=rows_RH.dtype, device=rows_RH.device)
    return zeros_RH.index_add(0, dispatch.slot_R, returned_RH)
