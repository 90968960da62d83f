"""moe_fast::encoded_act_rows, the first half of encoded experts: gate, up and activation; forward only."""

import torch

from moe_fast.form import parse_form
from moe_fast.kernels.order import order
from moe_fast.kernels.take import take
from moe_fast.observe import record_codes
from moe_fast.operators.checks import check_shapes
from moe_fast.operators.encoded_arguments import EncodedGateUp, check_matrices, check_rows
from moe_fast.operators.encoded_family import encoded_gate_up_rows
from moe_fast.operators.encoded_parts import Numbers, Tensors, flattened, restored
from moe_fast.operators.once import refuse_gradients_of_codes
from moe_ref.contract.errors import raise_faults
from moe_ref.contract.trace import Trace


@torch.library.custom_op("moe_fast::encoded_act_rows", mutates_args=())
def encoded_act_rows(scheme: str, x_TH: torch.Tensor, ids_TK: torch.Tensor, hosted_E: torch.Tensor, w13: Tensors,
                     w13_numbers: Numbers, form: str, weights_TK: torch.Tensor | None,
                     w13_bias_EGI: torch.Tensor | None, w13_input_scale_E: torch.Tensor | None) -> torch.Tensor:
    """act_RI in x's dtype and (token, slot) order, R = T * K; zero for rows of no expert at hand.

    As moe_fast::act_rows, with the arguments of moe_fast::encoded_experts. Raises UsageValueError / UsageTypeError on
    wrong shapes, dtypes or words.
    """
    return encoded_act_forward(restored(EncodedGateUp, scheme, x_TH, ids_TK, hosted_E, w13, w13_numbers,
                                        parse_form(form), weights_TK, w13_bias_EGI, w13_input_scale_E))


@encoded_act_rows.register_fake
def _(scheme: str, x_TH: torch.Tensor, ids_TK: torch.Tensor, hosted_E: torch.Tensor, w13: Tensors,
      w13_numbers: Numbers, form: str, *others) -> torch.Tensor:
    given = restored(EncodedGateUp, scheme, x_TH, ids_TK, hosted_E, w13, w13_numbers, parse_form(form), *others)
    _check(given)
    return given.x_TH.new_empty(given.ids_TK.numel(), given.w13.shape[-2])


encoded_act_rows.register_autograd(refuse_gradients_of_codes)


def act_by_codes(given: EncodedGateUp, trace: Trace | None = None) -> torch.Tensor:
    """What the operator returns; with a trace it is not run as one, and shows codes."""
    if trace is None:
        return encoded_act_rows(*flattened(given.w13.scheme, given))
    return encoded_act_forward(given, trace)


def encoded_act_forward(given: EncodedGateUp, trace: Trace | None = None) -> torch.Tensor:
    """What the operator runs."""
    _check(given)
    rows = encoded_gate_up_rows(given, trace is not None)
    record_codes(trace, rows.alignment, rows.codes)
    return take(rows.act_RI, order(rows.alignment)[1])


def _check(given: EncodedGateUp) -> None:
    operator, form = "moe_fast::encoded_act_rows", given.form
    if form.weight_on_input != (given.weights_TK is not None):
        raise_faults(operator, [f"weights_TK are {'not ' * (given.weights_TK is None)}given, but the form is "
                                f"{form.words!r}"])
    check_shapes(operator, {"x_TH": given.x_TH, "ids_TK": given.ids_TK, "weights_TK": given.weights_TK}, {})
    check_rows(operator, {"x_TH": given.x_TH}, given.ids_TK, given.weights_TK, given.hosted_E)
    shape = (len(given.hosted_E), form.num_projections, given.w13.shape[-2], given.x_TH.shape[1])
    check_matrices(operator, "", given.w13, shape, given.x_TH, {"w13_bias_EGI": given.w13_bias_EGI},
                   given.w13_input_scale_E)
