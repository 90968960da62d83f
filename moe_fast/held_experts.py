"""What the experts' operators take of the weights that a rank holds, plain or encoded; held_halves.py does it for two
halves.
"""

from dataclasses import replace

import torch

from moe_fast.form import form_of, routed_form
from moe_fast.held import Held, hosted, operands_of
from moe_fast.operators.arguments import ExpertsArguments
from moe_fast.operators.encoded_arguments import EncodedArguments, one_expert
from moe_fast.operators.encoded_experts import merged_by_codes
from moe_fast.operators.rows import every_token
from moe_fast.operators.saved_experts import experts_by_choice
from moe_fast.whole import routed_bias, shared_bias, takes_mean
from moe_ref.contract.collectives import enter
from moe_ref.contract.comm import Comm
from moe_ref.contract.parallel import Range
from moe_ref.contract.quantised import QuantisedWeights
from moe_ref.contract.rank import Rank
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.weights import SHARED_PARAMETERS

Arguments = ExpertsArguments | EncodedArguments


def merged(given: Arguments) -> torch.Tensor:
    """merged_TH by the operator for these arguments."""
    return merged_by_codes(given) if isinstance(given, EncodedArguments) else experts_by_choice(*given.values())


def routed_experts(x_TH: torch.Tensor, local_TK: torch.Tensor, weights_TK: torch.Tensor, weights: Held, spec: MoESpec,
                   rank: Rank) -> Arguments:
    """The arguments for the routed experts alone."""
    rows, form = (x_TH, local_TK, weights_TK, hosted(weights)), routed_form(spec)
    biases = weights.w13_bias_EGI, routed_bias(weights, rank)
    if isinstance(weights, QuantisedWeights):
        return EncodedArguments(*rows, weights.w13, weights.w2, form, *biases, weights.w13_input_scale_E,
                                weights.w2_input_scale_E)
    return ExpertsArguments(*rows, weights.w13_EGIH, weights.w2_EHI, None, None, None, form, form_of(spec.experts),
                            *biases, operands=operands_of(weights))


def with_shared(given: Arguments, gate_TS: torch.Tensor | None, weights: Held, spec: MoESpec, rank: Rank) -> Arguments:
    """The same with the shared expert that is part of the sum."""
    assert spec.shared is not None
    given = replace(given, shared_gate_T1=gate_TS, shared_form=form_of(spec.shared.mlp),
                    shared_w13_bias_GI=weights.shared_w13_bias_GI, shared_w2_bias_H=shared_bias(weights, rank),
                    mean=takes_mean(spec))
    if isinstance(given, EncodedArguments):
        assert isinstance(weights, QuantisedWeights)
        return replace(given, shared_w13=weights.shared_w13, shared_w2=weights.shared_w2,
                       shared_w13_input_scale=weights.shared_w13_input_scale,
                       shared_w2_input_scale=weights.shared_w2_input_scale)
    assert not isinstance(weights, QuantisedWeights)
    return replace(given, shared_w13_GIH=weights.shared_w13_GIH, shared_w2_HI=weights.shared_w2_HI)


def entered(weights: Held, holders: tuple[Comm, ...]) -> Held:
    """The weights, those of the shared expert with gradients added up over groups whose ranks have other tokens."""
    if isinstance(weights, QuantisedWeights) or not holders:
        return weights
    held = {name: getattr(weights, name) for name in SHARED_PARAMETERS[:3]}
    return replace(weights, **{name: enter(tensor, *holders) for name, tensor in held.items() if tensor is not None})


def shared_alone(x_TH: torch.Tensor, gate_T1: torch.Tensor | None, weights: Held, w2_bias_H: torch.Tensor | None,
                 spec: MoESpec, columns: Range | None = None) -> Arguments:
    """The arguments for the shared expert, or columns of it, as an expert that every token visits.

    w2_bias_H: as this rank adds it. Experts of which columns are asked for have no biases.
    """
    assert spec.shared is not None
    form, rows = form_of(spec.shared.mlp), (x_TH, *every_token(x_TH, gate_T1))
    w13_bias_EGI, w2_bias_EH = (None if tensor is None or columns is not None else tensor[None]
                                for tensor in (weights.shared_w13_bias_GI, w2_bias_H))
    if isinstance(weights, QuantisedWeights):
        assert weights.shared_w13 is not None
        assert weights.shared_w2 is not None
        w13, w2 = weights.shared_w13, weights.shared_w2
        if columns is not None:
            w13, w2 = w13.rows(columns), w2.columns(columns)
        w13_scale_E, w2_scale_E = (None if scale is None else scale[None]
                                   for scale in (weights.shared_w13_input_scale, weights.shared_w2_input_scale))
        return EncodedArguments(*rows, one_expert(w13), one_expert(w2), form, w13_bias_EGI, w2_bias_EH, w13_scale_E,
                                w2_scale_E)
    assert weights.shared_w13_GIH is not None
    assert weights.shared_w2_HI is not None
    w13_EGIH, w2_EHI = weights.shared_w13_GIH[None], weights.shared_w2_HI[None]
    if columns is not None:
        start, stop = columns
        w13_EGIH, w2_EHI = w13_EGIH[:, :, start:stop], w2_EHI[:, :, start:stop]
    return ExpertsArguments(*rows, w13_EGIH, w2_EHI, None, None, None, form, form, w13_bias_EGI, w2_bias_EH,
                            operands=operands_of(weights))
