"""The merge of rows that stand slot by slot: where they are reduced so, and where more than experts make rows.

Identity experts return the token: their rows take the places of their slots. Shared experts that the router weights are
blocks of the shared expert's width, each an expert with a weight of its own.
"""

import torch

from moe_fast.held import Held
from moe_fast.operators.moved_rows import sum_rows
from moe_fast.tokens import GroupTokens
from moe_fast.whole import output_bias, takes_mean
from moe_ref.contract.collectives import leave, once
from moe_ref.contract.parallel import Range
from moe_ref.contract.rank import Rank
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Stage


def merges_slots(spec: MoESpec, rank: Rank) -> bool:
    """Whether the layer cannot be merged inside the experts' operator."""
    return rank.by_slot or has_identity(spec) or has_blocks(spec)


def has_identity(spec: MoESpec) -> bool:
    """Whether some slots return their token."""
    return spec.num_choices > spec.num_experts


def has_blocks(spec: MoESpec) -> bool:
    """Whether there are several shared experts with weights of their own."""
    return spec.shared is not None and spec.shared.num_gates > 1


def slots(shape_TK: torch.Size, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """source_R and place_TK, as moved_rows has them, where rows are slots in order."""
    slot_R = torch.arange(shape_TK.numel(), device=device)
    return slot_R // shape_TK[1], slot_R.view(shape_TK)


def merged_slots(rows_RH: torch.Tensor, shared_TH: torch.Tensor | None, tokens: GroupTokens, weights: Held,
                 spec: MoESpec, rank: Rank, trace: Trace | None) -> torch.Tensor:
    """Rows of every slot, the shared expert's as one more, added up over slots, and over ranks before where they are.

    With identity experts a trace gets the routed rows here, but for expert parallelism, where some belong to no rank.
    """
    rows_TKH = rows_RH.view(*tokens.ids_TK.shape, rows_RH.shape[1])
    if has_identity(spec):
        rows_TKH = _with_identity(rows_TKH, tokens, spec, rank)
        if trace is not None and rank.ep.size == 1:
            trace.record(Stage.DOWN, rows_TKH.flatten(0, 1))
    if shared_TH is not None:
        rows_TKH = torch.cat([rows_TKH, shared_TH[:, None]], dim=1)
    if rank.by_slot:
        rows_TKH = leave(rows_TKH, *rank.with_other_parts)
    return sum_rows(rows_TKH.flatten(0, 1), *slots(rows_TKH.shape[:2], rows_TKH.device),
                    output_bias(weights, spec, rank), takes_mean(spec) and not rank.whole_shared)


def _with_identity(rows_TKH: torch.Tensor, tokens: GroupTokens, spec: MoESpec, rank: Rank) -> torch.Tensor:
    """Weighted tokens in the slots of identity experts: from one of the ranks with partial sums, or its own columns."""
    start, stop = rank.outputs(spec.hidden_size)
    weighted_TKH = tokens.weights_TK[..., None] * tokens.x_TH[:, None, start:stop].to(torch.float32)
    identity_TKH = weighted_TKH.to(rows_TKH.dtype)
    if not rank.by_output:
        identity_TKH = once(identity_TKH, rank.adds_what_is_whole)
    is_identity_TK = (tokens.ids_TK >= spec.num_experts) & (tokens.ids_TK < spec.num_choices)
    return torch.where(is_identity_TK[..., None], identity_TKH, rows_TKH)


def shared_blocks(spec: MoESpec, held: Range) -> list[tuple[int, Range]]:
    """Number and columns of the shared experts of which a rank has a part, counted from its first column `held`[0].

    One without columns where it has none.
    """
    assert spec.shared is not None
    (start, stop), width = held, spec.shared.intermediate_size // spec.shared.num_experts
    cuts = [(block, (max(start, block * width) - start, min(stop, (block + 1) * width) - start))
            for block in range(spec.shared.num_experts)]
    return [(block, cut) for block, cut in cuts if cut[0] < cut[1]] or [(0, (0, 0))]


def sum_of_blocks(blocks: list[torch.Tensor]) -> torch.Tensor:
    """(T, H): rows of each block added up in fp32, rounded once."""
    if len(blocks) == 1:
        return blocks[0]
    row_R = torch.arange(len(blocks) * len(blocks[0]), device=blocks[0].device)
    place_TK = row_R.view(len(blocks), len(blocks[0])).T
    return sum_rows(torch.cat(blocks), row_R % max(len(blocks[0]), 1), place_TK)
