"""As held.py, for the two halves of experts under the gather schedule."""

from dataclasses import replace

import torch

from moe_fast.form import form_of, parse_form, routed_form
from moe_fast.held import Held, hosted, operands_of
from moe_fast.operators.act_rows import act_rows
from moe_fast.operators.down_arguments import MergedDownArguments
from moe_fast.operators.encoded_act_rows import act_by_codes, encoded_act_forward
from moe_fast.operators.encoded_arguments import EncodedGateUp, one_expert
from moe_fast.operators.encoded_down_arguments import EncodedDownArguments
from moe_fast.operators.encoded_merged_down import merged_down_by_codes
from moe_fast.operators.fp8 import gate_up_in_fp8
from moe_fast.operators.merged_down import merged_down
from moe_fast.operators.rows import every_token
from moe_fast.tokens import GroupTokens
from moe_fast.whole import routed_bias, shared_bias, takes_mean
from moe_ref.contract.parallel import Range
from moe_ref.contract.quantised import QuantisedWeights
from moe_ref.contract.rank import Rank
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.trace import Trace

DownArguments = MergedDownArguments | EncodedDownArguments


def merged_rows(given: DownArguments) -> torch.Tensor:
    """merged_TH by the operator for these arguments."""
    return merged_down_by_codes(given) if isinstance(given, EncodedDownArguments) else merged_down(*given.values())


def routed_act(tokens: GroupTokens, weights: Held, spec: MoESpec, trace: Trace | None) -> torch.Tensor:
    """act_RI of the routed experts; a trace gets the codes of the rows that they took."""
    weights_TK, form = tokens.weights_TK if spec.weight_on == "input" else None, routed_form(spec)
    rows = tokens.x_TH, tokens.ids_TK, hosted(weights)
    if isinstance(weights, QuantisedWeights):
        return act_by_codes(EncodedGateUp(*rows, weights.w13, parse_form(form), weights_TK, weights.w13_bias_EGI,
                                          weights.w13_input_scale_E), trace)
    given = *rows, weights.w13_EGIH, form, weights_TK, weights.w13_bias_EGI
    if trace is not None and operands_of(weights) == "fp8_row":
        return encoded_act_forward(gate_up_in_fp8(*given), trace)
    return act_rows(*given, operands_of(weights))


def shared_act(x_TH: torch.Tensor, weights: Held, spec: MoESpec) -> torch.Tensor:
    """act_TI of the shared expert."""
    assert spec.shared is not None
    (ids_T1, _, hosted_1), form = every_token(x_TH, None), form_of(spec.shared.mlp)
    bias_EGI = None if weights.shared_w13_bias_GI is None else weights.shared_w13_bias_GI[None]
    if isinstance(weights, QuantisedWeights):
        assert weights.shared_w13 is not None
        scale = weights.shared_w13_input_scale
        return act_by_codes(EncodedGateUp(x_TH, ids_T1, hosted_1, one_expert(weights.shared_w13), parse_form(form),
                                          None, bias_EGI, None if scale is None else scale[None]))
    assert weights.shared_w13_GIH is not None
    return act_rows(x_TH, ids_T1, hosted_1, weights.shared_w13_GIH[None], form, None, bias_EGI,
                    operands_of(weights))


def routed_down(act_RI: torch.Tensor, tokens: GroupTokens, weights: Held, spec: MoESpec, rank: Rank) -> DownArguments:
    """The arguments for the routed experts alone."""
    weights_TK = torch.ones_like(tokens.weights_TK) if spec.weight_on == "input" else tokens.weights_TK
    rows, bias_EH = (act_RI, tokens.ids_TK, weights_TK, hosted(weights)), routed_bias(weights, rank)
    if isinstance(weights, QuantisedWeights):
        return EncodedDownArguments(*rows, weights.w2, bias_EH, weights.w2_input_scale_E)
    return MergedDownArguments(*rows, weights.w2_EHI, None, None, None, bias_EH, operands=operands_of(weights))


def with_shared_down(given: DownArguments, act_TI: torch.Tensor, gate_TS: torch.Tensor | None, weights: Held,
                     spec: MoESpec, rank: Rank) -> DownArguments:
    """The same with the shared expert that is part of the sum."""
    given = replace(given, shared_act_TI=act_TI, shared_gate_T1=gate_TS, shared_w2_bias_H=shared_bias(weights, rank),
                    mean=takes_mean(spec))
    if isinstance(given, EncodedDownArguments):
        assert isinstance(weights, QuantisedWeights)
        return replace(given, shared_w2=weights.shared_w2, shared_w2_input_scale=weights.shared_w2_input_scale)
    assert not isinstance(weights, QuantisedWeights)
    return replace(given, shared_w2_HI=weights.shared_w2_HI)


def shared_down(act_TI: torch.Tensor, gate_T1: torch.Tensor | None, weights: Held, rank: Rank,
                columns: Range | None = None) -> DownArguments:
    """The arguments for the shared expert, or columns of it, as an expert that every token visits."""
    start, stop = (0, act_TI.shape[1]) if columns is None else columns
    act_TI, bias_H = act_TI[:, start:stop], shared_bias(weights, rank)
    rows, bias_EH = (act_TI, *every_token(act_TI, gate_T1)), None if bias_H is None else bias_H[None]
    if isinstance(weights, QuantisedWeights):
        assert weights.shared_w2 is not None
        w2, scale = weights.shared_w2 if columns is None else weights.shared_w2.columns(columns), \
            weights.shared_w2_input_scale
        return EncodedDownArguments(*rows, one_expert(w2), bias_EH, None if scale is None else scale[None])
    assert weights.shared_w2_HI is not None
    return MergedDownArguments(*rows, weights.shared_w2_HI[None, :, start:stop], None, None, None, bias_EH,
                               operands=operands_of(weights))
