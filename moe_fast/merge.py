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
from moe_fast.form import form_of, routed_form
from moe_fast.gather_form import merged_columns
from moe_fast.operators.arguments import ExpertsArguments
from moe_fast.operators.experts import experts_forward
from moe_fast.operators.moved_rows import sum_rows, take_rows
from moe_fast.operators.rows import every_token
from moe_fast.operators.saved_experts import experts_by_choice
from moe_fast.slot_rows import has_blocks, has_identity, merged_slots, merges_slots, shared_blocks, slots, sum_of_blocks
from moe_fast.tokens import GroupTokens
from moe_fast.whole import output_bias, routed_bias, shared_bias, takes_mean
from moe_ref.contract.collectives import enter
from moe_ref.contract.comm import Comm
from moe_ref.contract.parallel import Range
from moe_ref.contract.rank import Rank
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Stage
from moe_ref.contract.weights import MoEWeights


def merged_tokens(tokens: GroupTokens, weights: MoEWeights, spec: MoESpec, rank: Rank,
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
        given = _routed(x_RH, served_TK.reshape(-1, 1), weights_R1, weights, spec, rank)
        rows_RH = _run(given, trace, compact, with_down=compact or not has_identity(spec))
        return merged_slots(rows_RH, _shared_in_sum(tokens, weights, spec, rank, trace), tokens, weights, spec, rank,
                            trace)
    given = _routed(tokens.x_TH, served_TK, tokens.weights_TK, weights, spec, rank)
    if spec.shared is not None and not rank.whole_shared:
        given = replace(given, shared_w13_GIH=weights.shared_w13_GIH, shared_w2_HI=weights.shared_w2_HI,
                        shared_gate_T1=tokens.gate_TS, shared_form=form_of(spec.shared.mlp),
                        shared_w13_bias_GI=weights.shared_w13_bias_GI, shared_w2_bias_H=shared_bias(weights, rank),
                        mean=takes_mean(spec))
    return _run(replace(given, output_bias_H=output_bias(weights, spec, rank)), trace, compact)


def _routed(x_TH: torch.Tensor, local_TK: torch.Tensor, weights_TK: torch.Tensor, weights: MoEWeights, spec: MoESpec,
            rank: Rank) -> ExpertsArguments:
    """The operator's arguments for the routed experts alone."""
    hosted_E, form = torch.arange(len(weights.w13_EGIH), device=x_TH.device), routed_form(spec)
    return ExpertsArguments(x_TH, local_TK, weights_TK, hosted_E, weights.w13_EGIH, weights.w2_EHI, None, None, None,
                            form, form_of(spec.experts), weights.w13_bias_EGI, routed_bias(weights, rank))


def _run(given: ExpertsArguments, trace: Trace | None, compact: bool, with_down: bool = True) -> torch.Tensor:
    """The operator; compact: a trace gets only the rows of slots that have an expert here."""
    if trace is None:
        return experts_by_choice(*given.values())
    seen = Trace()
    merged_TH = experts_forward(given, trace=seen)
    for stage in (Stage.ACT, Stage.DOWN)[:1 + with_down]:
        trace.record(stage, seen.tensors[stage][given.ids_TK.reshape(-1) >= 0] if compact else seen.tensors[stage])
    if Stage.SHARED in seen.tensors:
        trace.record(Stage.SHARED, seen.tensors[Stage.SHARED])
    return merged_TH


def _travelled(tokens: GroupTokens, weights: MoEWeights, spec: MoESpec, rank: Rank,
               trace: Trace | None) -> torch.Tensor:
    """Rows of every slot computed where the expert is, and merged at home."""
    sent = send(tokens, spec.num_experts, rank)
    given = _routed(sent.x_RH, sent.local_R1, sent.weights_R1, weights, spec, rank)
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


def _shared_in_sum(tokens: GroupTokens, weights: MoEWeights, spec: MoESpec, rank: Rank,
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


def shared_rows(x_TH: torch.Tensor, gate_TS: torch.Tensor | None, weights: MoEWeights, w2_bias_H: torch.Tensor | None,
                spec: MoESpec, holders: tuple[Comm, ...], held: Range) -> torch.Tensor:
    """(T, H) of the shared expert that this rank holds, by the operator: an expert that every token visits.

    w2_bias_H: as this rank adds it. holders: the groups whose ranks hold the same weights and other tokens, so that the
    gradient is added up. held: its columns of the shared expert; blocks of them may have weights of their own.
    """
    assert spec.shared is not None
    w13_EGIH, w2_EHI, w13_bias_EGI, w2_bias_EH = (
        None if tensor is None else enter(tensor, *holders)[None]
        for tensor in (weights.shared_w13_GIH, weights.shared_w2_HI, weights.shared_w13_bias_GI, w2_bias_H))
    assert w13_EGIH is not None
    assert w2_EHI is not None
    form = form_of(spec.shared.mlp)
    if gate_TS is None or not has_blocks(spec):
        return experts_by_choice(x_TH, *every_token(x_TH, gate_TS), w13_EGIH, w2_EHI, None, None, None, form, form,
                                 w13_bias_EGI, w2_bias_EH)
    return sum_of_blocks([
        experts_by_choice(x_TH, *every_token(x_TH, gate_TS[:, block:block + 1]), w13_EGIH[:, :, start:stop],
                          w2_EHI[:, :, start:stop], None, None, None, form, form, None, None)
        for block, (start, stop) in shared_blocks(spec, held)])
