"""Plain experts whose products take codes: weights are rounded to e4m3 as they are used, a scale for each row.

The forward pass is that of experts encoded so.
"""

import torch

from moe_fast.form import parse_form
from moe_fast.kernels.round_matrix import rounded_rows
from moe_fast.operators.arguments import ExpertsArguments
from moe_fast.operators.down_arguments import MergedDownArguments
from moe_fast.operators.encoded_arguments import EncodedArguments, EncodedGateUp
from moe_fast.operators.encoded_down_arguments import EncodedDownArguments
from moe_ref.contract.encoded import Encoded


def experts_in_fp8(given: ExpertsArguments) -> EncodedArguments:
    """The same arguments with encoded matrices."""
    shared_w13, shared_w2 = given.shared_w13_GIH, given.shared_w2_HI
    return EncodedArguments(
        given.x_TH, given.ids_TK, given.weights_TK, given.hosted_E, rounded_rows(given.w13_EGIH), of_down(given.w2_EHI),
        given.form, given.w13_bias_EGI, given.w2_bias_EH,
        shared_w13=None if shared_w13 is None else rounded_rows(shared_w13[None]).at(0),
        shared_w2=None if shared_w2 is None else of_down(shared_w2[None]).at(0),
        **{name: getattr(given, name) for name in ("shared_form", "shared_gate_T1", "shared_w13_bias_GI",
                                                   "shared_w2_bias_H", "output_bias_H", "mean")})


def gate_up_in_fp8(x_TH: torch.Tensor, ids_TK: torch.Tensor, hosted_E: torch.Tensor, w13_EGIH: torch.Tensor, form: str,
                   weights_TK: torch.Tensor | None, w13_bias_EGI: torch.Tensor | None) -> EncodedGateUp:
    """The arguments of moe_fast::act_rows with an encoded matrix."""
    return EncodedGateUp(x_TH, ids_TK, hosted_E, rounded_rows(w13_EGIH), parse_form(form), weights_TK, w13_bias_EGI)


def down_in_fp8(given: MergedDownArguments) -> EncodedDownArguments:
    """The same arguments with encoded matrices."""
    shared_w2 = given.shared_w2_HI
    return EncodedDownArguments(
        given.act_RI, given.ids_TK, given.weights_TK, given.hosted_E, of_down(given.w2_EHI), given.w2_bias_EH,
        shared_w2=None if shared_w2 is None else of_down(shared_w2[None]).at(0),
        **{name: getattr(given, name) for name in ("shared_act_TI", "shared_gate_T1", "shared_w2_bias_H",
                                                   "output_bias_H", "mean")})


def of_down(w2_EHI: torch.Tensor) -> Encoded:
    """Codes of w2 as the down product takes them."""
    return rounded_rows(w2_EHI[:, None]).mapped(lambda one: one[:, 0])
