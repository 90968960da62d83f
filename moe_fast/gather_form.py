"""The gather schedule: the whole activation on every rank, and w2 cut by output."""

from dataclasses import replace

import torch

from moe_fast.held import Held
from moe_fast.held_halves import (
    DownArguments,
    merged_rows,
    routed_act,
    routed_down,
    shared_act,
    shared_down,
    with_shared_down,
)
from moe_fast.operators.merged_down import merged_down_forward
from moe_fast.slot_rows import has_blocks, has_identity, merged_slots, merges_slots, shared_blocks, sum_of_blocks
from moe_fast.tokens import GroupTokens
from moe_fast.whole import output_bias
from moe_ref.contract.collectives import gather
from moe_ref.contract.rank import Rank
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Stage


def merged_columns(tokens: GroupTokens, weights: Held, spec: MoESpec, rank: Rank,
                   trace: Trace | None) -> torch.Tensor:
    """merged_TH, complete in the columns that this rank makes; one all-gather of act, one of the shared expert's."""
    act_RI = routed_act(tokens, weights, spec, trace)
    if trace is not None:
        trace.record(Stage.ACT, act_RI)
    given = routed_down(_all_columns(act_RI, rank), tokens, weights, spec, rank)
    shared_act_TI = None
    if spec.shared is not None and not rank.whole_shared:
        shared_act_TI = _all_columns(shared_act(tokens.x_TH, weights, spec), rank)
    if merges_slots(spec, rank):
        return _merged_slots(given, shared_act_TI, tokens, weights, spec, rank, trace)
    given = replace(given, output_bias_H=output_bias(weights, spec, rank))
    if shared_act_TI is not None:
        given = with_shared_down(given, shared_act_TI, tokens.gate_TS, weights, spec, rank)
    return merged_rows(given) if trace is None else merged_down_forward(given, trace=trace)


def _merged_slots(given: DownArguments, shared_act_TI: torch.Tensor | None, tokens: GroupTokens, weights: Held,
                  spec: MoESpec, rank: Rank, trace: Trace | None) -> torch.Tensor:
    """The same from rows of every slot and of every block of the shared expert; see slot_rows.py."""
    given = replace(given, ids_TK=given.ids_TK.reshape(-1, 1), weights_TK=given.weights_TK.reshape(-1, 1))
    shared_TH, seen = None, Trace()
    rows_RH = merged_rows(given) if trace is None else merged_down_forward(given, trace=seen)
    if spec.shared is not None and shared_act_TI is not None:
        shared_TH = _shared_columns(shared_act_TI, tokens.gate_TS, weights, spec, rank)
    if trace is not None:
        for stage, tensor in seen.tensors.items():
            if stage is not Stage.DOWN or not has_identity(spec):
                trace.record(stage, tensor)
        if shared_TH is not None:
            trace.record(Stage.SHARED, shared_TH)
    return merged_slots(rows_RH, shared_TH, tokens, weights, spec, rank, trace)


def _shared_columns(act_TI: torch.Tensor, gate_TS: torch.Tensor | None, weights: Held, spec: MoESpec,
                    rank: Rank) -> torch.Tensor:
    """The shared expert's rows from its activation, block by block where blocks have weights of their own."""
    assert spec.shared is not None
    if gate_TS is None or not has_blocks(spec):
        return merged_rows(shared_down(act_TI, gate_TS, weights, rank))
    return sum_of_blocks([merged_rows(shared_down(act_TI, gate_TS[:, block:block + 1], weights, rank, columns))
                          for block, columns in shared_blocks(spec, (0, spec.shared.intermediate_size))])


def _all_columns(act_RI: torch.Tensor, rank: Rank) -> torch.Tensor:
    """The activation's columns of every tp rank, in order; they travel as rows of its transpose."""
    return torch.cat(gather(act_RI.T, rank.tp)).T
