"""The gather schedule: the whole activation on every rank, and w2 cut by output."""

from dataclasses import replace

import torch

from moe_fast.form import form_of, routed_form
from moe_fast.operators.act_rows import act_rows
from moe_fast.operators.down_arguments import MergedDownArguments
from moe_fast.operators.merged_down import merged_down, merged_down_forward
from moe_fast.operators.rows import every_token
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
        weights.w2_EHI, None, None, None, routed_bias(weights, rank), None, output_bias(weights, spec, rank))
    if spec.shared is not None and not rank.whole_shared:
        assert weights.shared_w13_GIH is not None
        ids_T1, _, hosted_1 = every_token(tokens.x_TH, None)
        bias_GI = weights.shared_w13_bias_GI
        act_TI = act_rows(tokens.x_TH, ids_T1, hosted_1, weights.shared_w13_GIH[None], form_of(spec.shared.mlp), None,
                          None if bias_GI is None else bias_GI[None])
        given = replace(given, shared_act_TI=_all_columns(act_TI, rank), shared_w2_HI=weights.shared_w2_HI,
                        shared_gate_T1=tokens.gate_TS, shared_w2_bias_H=shared_bias(weights, rank),
                        mean=takes_mean(spec))
    return merged_down(*given.values()) if trace is None else merged_down_forward(given, trace=trace)


def _all_columns(act_RI: torch.Tensor, rank: Rank) -> torch.Tensor:
    """The activation's columns of every tp rank, in order; they travel as rows of its transpose."""
    return torch.cat(gather(act_RI.T, rank.tp)).T
