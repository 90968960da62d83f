"""moe_fast::encoded_experts, as moe_fast::experts, of experts whose matrices are codes with scales; forward only."""

import torch

from moe_fast.operators.encoded_arguments import EncodedArguments
from moe_fast.operators.encoded_parts import Numbers, Tensors, flattened, restored
from moe_fast.operators.experts import experts_forward
from moe_fast.operators.once import refuse_gradients_of_codes


@torch.library.custom_op("moe_fast::encoded_experts", mutates_args=())
def encoded_experts(scheme: str, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor,
                    hosted_E: torch.Tensor, w13: Tensors, w13_numbers: Numbers, w2: Tensors, w2_numbers: Numbers,
                    form: str, w13_bias_EGI: torch.Tensor | None, w2_bias_EH: torch.Tensor | None,
                    w13_input_scale_E: torch.Tensor | None, w2_input_scale_E: torch.Tensor | None, shared_w13: Tensors,
                    shared_w13_numbers: Numbers, shared_w2: Tensors, shared_w2_numbers: Numbers, shared_form: str,
                    shared_gate_T1: torch.Tensor | None, shared_w13_bias_GI: torch.Tensor | None,
                    shared_w2_bias_H: torch.Tensor | None, shared_w13_input_scale: torch.Tensor | None,
                    shared_w2_input_scale: torch.Tensor | None, output_bias_H: torch.Tensor | None,
                    mean: bool) -> torch.Tensor:
    """merged_TH of one rank in x's dtype; matrices as encoded_parts has them, the rest as in moe_fast::experts.

    Products accumulate in fp32. Weights are decoded in fp32 and rounded to x's dtype, or, where a scheme rounds rows
    as well, its codes are multiplied. Raises UsageValueError / UsageTypeError on wrong shapes, dtypes or words.
    """
    return experts_forward(restored(
        EncodedArguments, scheme, x_TH, ids_TK, weights_TK, hosted_E, w13, w13_numbers, w2, w2_numbers, form,
        w13_bias_EGI, w2_bias_EH, w13_input_scale_E, w2_input_scale_E, shared_w13, shared_w13_numbers, shared_w2,
        shared_w2_numbers, shared_form, shared_gate_T1, shared_w13_bias_GI, shared_w2_bias_H, shared_w13_input_scale,
        shared_w2_input_scale, output_bias_H, mean))


@encoded_experts.register_fake
def _(scheme: str, *arguments) -> torch.Tensor:
    given = restored(EncodedArguments, scheme, *arguments)
    given.check("moe_fast::encoded_experts")
    return given.x_TH.new_empty(given.x_TH.shape)


encoded_experts.register_autograd(refuse_gradients_of_codes)


def merged_by_codes(given: EncodedArguments) -> torch.Tensor:
    """What the operator returns."""
    return encoded_experts(*flattened(given.w13.scheme, given))
