"""moe_fast::encoded_merged_down, the second half of encoded experts: down product and merge; forward only."""

import torch

from moe_fast.operators.encoded_down_arguments import EncodedDownArguments
from moe_fast.operators.encoded_parts import Numbers, Tensors, flattened, restored
from moe_fast.operators.merged_down import merged_down_forward
from moe_fast.operators.once import refuse_gradients_of_codes


@torch.library.custom_op("moe_fast::encoded_merged_down", mutates_args=())
def encoded_merged_down(scheme: str, act_RI: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor,
                        hosted_E: torch.Tensor, w2: Tensors, w2_numbers: Numbers, w2_bias_EH: torch.Tensor | None,
                        w2_input_scale_E: torch.Tensor | None, shared_act_TI: torch.Tensor | None, shared_w2: Tensors,
                        shared_w2_numbers: Numbers, shared_gate_T1: torch.Tensor | None,
                        shared_w2_bias_H: torch.Tensor | None, shared_w2_input_scale: torch.Tensor | None,
                        output_bias_H: torch.Tensor | None, mean: bool) -> torch.Tensor:
    """merged_TH in act's dtype, as moe_fast::merged_down, with the arguments of moe_fast::encoded_experts.

    Raises UsageValueError / UsageTypeError on wrong shapes or dtypes.
    """
    return merged_down_forward(restored(
        EncodedDownArguments, scheme, act_RI, ids_TK, weights_TK, hosted_E, w2, w2_numbers, w2_bias_EH,
        w2_input_scale_E, shared_act_TI, shared_w2, shared_w2_numbers, shared_gate_T1, shared_w2_bias_H,
        shared_w2_input_scale, output_bias_H, mean))


@encoded_merged_down.register_fake
def _(scheme: str, *arguments) -> torch.Tensor:
    given = restored(EncodedDownArguments, scheme, *arguments)
    given.check("moe_fast::encoded_merged_down")
    return given.act_RI.new_empty(given.ids_TK.shape[0], given.num_columns)


encoded_merged_down.register_autograd(refuse_gradients_of_codes)


def merged_down_by_codes(given: EncodedDownArguments) -> torch.Tensor:
    """What the operator returns."""
    return encoded_merged_down(*flattened(given.w2.scheme, given))
