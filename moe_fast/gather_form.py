"""The gather schedule: the whole activation on every rank, and w2 cut by output."""

import torch

from moe_fast.operators.act_rows import act_rows
from moe_fast.operators.merged_down import merged_down, merged_down_forward
from moe_fast.operators.rows import every_token
from moe_fast.tokens import GroupTokens
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
    act_RI = act_rows(tokens.x_TH, tokens.ids_TK, hosted_E, weights.w13_EGIH, spec.experts.activation)
    if trace is not None:
        trace.record(Stage.ACT, act_RI)
    act_RI = _all_columns(act_RI, rank)
    shared_act_TI, shared_w2_HI = None, None
    if spec.shared is not None and not rank.whole_shared:
        assert weights.shared_w13_GIH is not None
        ids_T1, _, hosted_1 = every_token(tokens.x_TH, None)
        act_TI = act_rows(tokens.x_TH, ids_T1, hosted_1, weights.shared_w13_GIH[None], spec.shared.mlp.activation)
        shared_act_TI, shared_w2_HI = _all_columns(act_TI, rank), weights.shared_w2_HI
    arguments = (act_RI, tokens.ids_TK, tokens.weights_TK, hosted_E, weights.w2_EHI, shared_act_TI, shared_w2_HI,
                 tokens.gate_TS)
    return merged_down(*arguments) if trace is None else merged_down_forward(*arguments, trace=trace)


def _all_columns(act_RI: torch.Tensor, rank: Rank) -> torch.Tensor:
    """The activation's columns of every tp rank, in order; they travel as rows of its transpose."""
    return torch.cat(gather(act_RI.T, rank.tp)).T
