"""The experts of one rank and the merge: routed rows where their schedule computes them, and the shared expert.

    tokens on every ep rank     the operator over this rank's experts, merged inside it
    rows reduced by themselves  the operator over every slot as a token of its own, all-reduce, then the merge; without
                                the all-reduce for what is in slot_rows.py
    tokens sharded over ep      the operator over the rows that arrive, and the merge of those that come back
    gather                      see gather_form.py
"""

from dataclasses import replace

import torch

from moe_fast.dispatch import send, send_back
from moe_fast.gather_form import merged_columns
from moe_fast.held import Held
from moe_fast.held_experts import Arguments, entered, merged, routed_experts, shared_alone, with_shared
from moe_fast.operators.experts import experts_forward
from moe_fast.operators.moved_rows import sum_rows, take_rows
from moe_fast.slot_rows import has_blocks, has_identity, merged_slots, merges_slots, shared_blocks, slots, sum_of_blocks
from moe_fast.tokens import GroupTokens
from moe_fast.whole import output_bias, shared_bias, takes_mean
from moe_ref.contract.collectives import enter
from moe_ref.contract.comm import Comm
from moe_ref.contract.parallel import Range
from moe_ref.contract.rank import Rank
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Stage


def merged_tokens(tokens: GroupTokens, weights: Held, spec: MoESpec, rank: Rank,
                  trace: Trace | None) -> torch.Tensor:
    """merged_TH of the tp group: a partial sum, columns under gather, the whole where rows are reduced before it.

    A shared expert that is whole on every rank is no part of it.
    """
    if rank.by_output:
        return merged_columns(tokens, weights, spec, rank, trace)
    if rank.over_ep:
        return _travelled(tokens, weights, spec, rank, trace)
    served_TK = rank.served(tokens.ids_TK, spec.num_experts)
    compact = rank.ep.size > 1
    if merges_slots(spec, rank):
        source_R, place_TK = slots(served_TK.shape, served_TK.device)
        x_RH, weights_R1 = take_rows(tokens.x_TH, source_R, place_TK), tokens.weights_TK.reshape(-1, 1)
        given = routed_experts(x_RH, served_TK.reshape(-1, 1), weights_R1, weights, spec, rank)
        rows_RH = _run(given, trace, compact, with_down=compact or not has_identity(spec))
        return merged_slots(rows_RH, _shared_in_sum(tokens, weights, spec, rank, trace), tokens, weights, spec, rank,
                            trace)
    given = routed_experts(tokens.x_TH, served_TK, tokens.weights_TK, weights, spec, rank)
    if spec.shared is not None and not rank.whole_shared:
        given = with_shared(given, tokens.gate_TS, weights, spec, rank)
    return _run(replace(given, output_bias_H=output_bias(weights, spec, rank)), trace, compact)


def _run(given: Arguments, trace: Trace | None, compact: bool, with_down: bool = True) -> torch.Tensor:
    """The operator; compact: a trace gets only the rows of slots that have an expert here."""
    if trace is None:
        return merged(given)
    seen = Trace()
    merged_TH = experts_forward(given, trace=seen)
    for stage, tensor in seen.tensors.items():
        if stage is Stage.SHARED:
            trace.record(stage, tensor)
        elif stage is not Stage.MERGED and (with_down or stage is not Stage.DOWN):
            trace.record(stage, tensor[given.ids_TK.reshape(-1) >= 0] if compact else tensor)
    return merged_TH


def _travelled(tokens: GroupTokens, weights: Held, spec: MoESpec, rank: Rank,
               trace: Trace | None) -> torch.Tensor:
    """Rows of every slot computed where the expert is, and merged at home."""
    sent = send(tokens, spec.num_experts, rank)
    given = routed_experts(sent.x_RH, sent.local_R1, sent.weights_R1, weights, spec, rank)
    rows_RH = send_back(_run(given, trace, compact=False), sent, rank)
    source_R, place_TK = sent.slot_R // tokens.ids_TK.shape[1], sent.place_TK
    shared_TH = _shared_in_sum(tokens, weights, spec, rank, trace)
    if merges_slots(spec, rank):
        rows_RH = take_rows(rows_RH, place_TK.reshape(-1), sent.slot_R[:, None])
        return merged_slots(rows_RH, shared_TH, tokens, weights, spec, rank, trace)
    if shared_TH is not None:
        token_T = torch.arange(len(shared_TH), device=shared_TH.device)
        place_TK = torch.cat([place_TK, len(rows_RH) + token_T[:, None]], dim=1)
        rows_RH, source_R = torch.cat([rows_RH, shared_TH]), torch.cat([source_R, token_T])
    return sum_rows(rows_RH, source_R, place_TK, output_bias(weights, spec, rank),
                    takes_mean(spec) and not rank.whole_shared)


def _shared_in_sum(tokens: GroupTokens, weights: Held, spec: MoESpec, rank: Rank,
                   trace: Trace | None) -> torch.Tensor | None:
    """This rank's part of the shared expert's rows, None without one that is cut; ep ranks may hold the same part."""
    if spec.shared is None or rank.whole_shared:
        return None
    shared_TH = shared_rows(tokens.x_TH, tokens.gate_TS, weights, shared_bias(weights, rank), spec,
                            (rank.ep,) * rank.over_ep, rank.parallel.shared_ranges(
                                spec.shared.intermediate_size)[rank.groups.rank])
    if trace is not None:
        trace.record(Stage.SHARED, shared_TH)
    return shared_TH


def shared_rows(x_TH: torch.Tensor, gate_TS: torch.Tensor | None, weights: Held, w2_bias_H: torch.Tensor | None,
                spec: MoESpec, holders: tuple[Comm, ...], held: Range) -> torch.Tensor:
    """(T, H) of the shared expert that this rank holds, by the operator: an expert that every token visits.

    w2_bias_H: as this rank adds it. holders: the groups whose ranks hold the same weights and other tokens, so that the
    gradient is added up. held: its columns of the shared expert; blocks of them may have weights of their own.
    """
    weights, bias_H = entered(weights, holders), None if w2_bias_H is None else enter(w2_bias_H, *holders)
    if gate_TS is None or not has_blocks(spec):
        return merged(shared_alone(x_TH, gate_TS, weights, bias_H, spec))
    return sum_of_blocks([
        merged(shared_alone(x_TH, gate_TS[:, block:block + 1], weights, bias_H, spec, columns))
        for block, columns in shared_blocks(spec, held)])
