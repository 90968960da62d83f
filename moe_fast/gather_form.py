"""The gather schedule: the whole activation on every rank, and w2 cut by output."""

from dataclasses import replace

import torch

from moe_fast.form import form_of, routed_form
from moe_fast.operators.act_rows import act_rows
from moe_fast.operators.down_arguments import MergedDownArguments
from moe_fast.operators.merged_down import merged_down, merged_down_forward
from moe_fast.operators.rows import every_token
from moe_fast.slot_rows import has_blocks, has_identity, merged_slots, merges_slots, shared_blocks, sum_of_blocks
from moe_fast.tokens import GroupTokens
from moe_fast.whole import output_bias, routed_bias, shared_bias, takes_mean
from moe_ref.contract.collectives import gather
from moe_ref.contract.rank import Rank
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Stage
from moe_ref.contract.weights import MoEWeights


def merged_columns(tokens: GroupTokens, weights: MoEWeights, spec: MoESpec, rank: Rank,
                   trace: Trace | None) -> torch.Tensor:
    """merged_TH, complete in the columns that this rank makes; one all-gather of act, one of the shared expert's."""
    hosted_E = torch.arange(len(weights.w13_EGIH), device=tokens.x_TH.device)
    on_input, weights_TK = spec.weight_on == "input", tokens.weights_TK
    act_RI = act_rows(tokens.x_TH, tokens.ids_TK, hosted_E, weights.w13_EGIH, routed_form(spec),
                      weights_TK if on_input else None, weights.w13_bias_EGI)
    if trace is not None:
        trace.record(Stage.ACT, act_RI)
    given = MergedDownArguments(
        _all_columns(act_RI, rank), tokens.ids_TK, torch.ones_like(weights_TK) if on_input else weights_TK, hosted_E,
        weights.w2_EHI, None, None, None, routed_bias(weights, rank))
    shared_act_TI = None
    if spec.shared is not None and not rank.whole_shared:
        shared_act_TI = _shared_act(tokens, weights, spec, rank)
    if merges_slots(spec, rank):
        return _merged_slots(given, shared_act_TI, tokens, weights, spec, rank, trace)
    given = replace(given, output_bias_H=output_bias(weights, spec, rank))
    if shared_act_TI is not None:
        given = replace(given, shared_act_TI=shared_act_TI, shared_w2_HI=weights.shared_w2_HI,
                        shared_gate_T1=tokens.gate_TS, shared_w2_bias_H=shared_bias(weights, rank),
                        mean=takes_mean(spec))
    return merged_down(*given.values()) if trace is None else merged_down_forward(given, trace=trace)


def _shared_act(tokens: GroupTokens, weights: MoEWeights, spec: MoESpec, rank: Rank) -> torch.Tensor:
    """The shared expert's activation in all columns."""
    assert spec.shared is not None
    assert weights.shared_w13_GIH is not None
    ids_T1, _, hosted_1 = every_token(tokens.x_TH, None)
    bias_GI = weights.shared_w13_bias_GI
    return _all_columns(act_rows(tokens.x_TH, ids_T1, hosted_1, weights.shared_w13_GIH[None], form_of(spec.shared.mlp),
                                 None, None if bias_GI is None else bias_GI[None]), rank)


def _merged_slots(given: MergedDownArguments, shared_act_TI: torch.Tensor | None, tokens: GroupTokens,
                  weights: MoEWeights, spec: MoESpec, rank: Rank, trace: Trace | None) -> torch.Tensor:
    """The same from rows of every slot and of every block of the shared expert; see slot_rows.py."""
    given = replace(given, ids_TK=given.ids_TK.reshape(-1, 1), weights_TK=given.weights_TK.reshape(-1, 1))
    shared_TH, seen = None, Trace()
    rows_RH = merged_down(*given.values()) if trace is None else merged_down_forward(given, trace=seen)
    if spec.shared is not None and shared_act_TI is not None:
        assert weights.shared_w2_HI is not None
        gate_TS, bias_H = tokens.gate_TS, shared_bias(weights, rank)
        blocks = [(0, (0, spec.shared.intermediate_size))]
        if has_blocks(spec):
            blocks = shared_blocks(spec, blocks[0][1])
        shared_TH = sum_of_blocks([merged_down(
            shared_act_TI[:, start:stop],
            *every_token(tokens.x_TH, None if gate_TS is None else gate_TS[:, block:block + 1]),
            weights.shared_w2_HI[None, :, start:stop], None, None, None, None if bias_H is None else bias_H[None])
            for block, (start, stop) in blocks])
    if trace is not None:
        if not has_identity(spec):
            trace.record(Stage.DOWN, seen.tensors[Stage.DOWN])
        if shared_TH is not None:
            trace.record(Stage.SHARED, shared_TH)
    return merged_slots(rows_RH, shared_TH, tokens, weights, spec, rank, trace)


def _all_columns(act_RI: torch.Tensor, rank: Rank) -> torch.Tensor:
    """The activation's columns of every tp rank, in order; they travel as rows of its transpose."""
    return torch.cat(gather(act_RI.T, rank.tp)).T
