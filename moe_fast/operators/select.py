"""moe_fast::select, from logits to expert ids and weights, and moe_fast::select_backward."""

import torch

from moe_fast.capabilities import CAPABILITIES
from moe_fast.kernels import select as kernels
from moe_fast.kernels.select_gradient import select_gradient
from moe_fast.operators.checks import check_dtypes, check_one_device, check_shapes, check_words
from moe_fast.operators.once import refuse_second_gradients
from moe_ref.contract.errors import raise_faults

SCORES = CAPABILITIES.scores


@torch.library.custom_op("moe_fast::select", mutates_args=())
def select(logits_TE: torch.Tensor, selection_bias_E: torch.Tensor | None, top_k: int, score: str, num_groups: int,
           num_groups_kept: int, group_score: str, renormalize: bool, renormalize_epsilon: float,
           scaling_factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """ids_TK (int32) and weights_TK (fp32) of fp32 logits; the options are those of moe_ref.contract.spec.Router.

    Raises UsageValueError / UsageTypeError on wrong shapes or dtypes.
    """
    _check(logits_TE, selection_bias_E, top_k, score, num_groups, num_groups_kept, group_score)
    return kernels.select(logits_TE, selection_bias_E, top_k, score, num_groups, num_groups_kept, group_score,
                          renormalize, renormalize_epsilon, scaling_factor)


@select.register_fake
def _(logits_TE: torch.Tensor, selection_bias_E: torch.Tensor | None, top_k: int, score: str, num_groups: int,
      num_groups_kept: int, group_score: str, renormalize: bool, renormalize_epsilon: float,
      scaling_factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    _check(logits_TE, selection_bias_E, top_k, score, num_groups, num_groups_kept, group_score)
    shape = (logits_TE.shape[0], top_k)
    return logits_TE.new_empty(shape, dtype=torch.int32), logits_TE.new_empty(shape)


@torch.library.custom_op("moe_fast::select_backward", mutates_args=())
def select_backward(grad_TK: torch.Tensor, logits_TE: torch.Tensor, ids_TK: torch.Tensor, score: str,
                    renormalize: bool, renormalize_epsilon: float, scaling_factor: float) -> torch.Tensor:
    """Gradient of logits_TE (fp32), from that of the weights (fp32), for the ids (int32) that were selected.

    The choice itself, and so the selection bias and the groups, have no gradient. Formulas:
    moe_ref.oracle.backward.weights. Raises UsageValueError / UsageTypeError on wrong shapes or dtypes.
    """
    _check_backward(grad_TK, logits_TE, ids_TK, score)
    return select_gradient(grad_TK, logits_TE, ids_TK, score, renormalize, renormalize_epsilon, scaling_factor)


@select_backward.register_fake
def _(grad_TK: torch.Tensor, logits_TE: torch.Tensor, ids_TK: torch.Tensor, score: str, renormalize: bool,
      renormalize_epsilon: float, scaling_factor: float) -> torch.Tensor:
    _check_backward(grad_TK, logits_TE, ids_TK, score)
    return logits_TE.new_empty(logits_TE.shape)


def _setup_context(ctx, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits_TE, _, _, score, _, _, _, *weighting = inputs
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(logits_TE, output[0])
    ctx.options = score, *weighting


def _backward(ctx, grad_ids: torch.Tensor | None, grad_TK: torch.Tensor):
    return select_backward(grad_TK, *ctx.saved_tensors, *ctx.options), *(None,) * 9


select.register_autograd(_backward, setup_context=_setup_context)
select_backward.register_autograd(refuse_second_gradients)


def _check_backward(grad_TK: torch.Tensor, logits_TE: torch.Tensor, ids_TK: torch.Tensor, score: str) -> None:
    operator = "moe_fast::select_backward"
    tensors = {"logits_TE": logits_TE, "ids_TK": ids_TK, "grad_TK": grad_TK}
    check_shapes(operator, tensors, {})
    check_one_device(operator, tensors)
    check_dtypes(operator, {"logits_TE": logits_TE, "grad_TK": grad_TK}, (torch.float32,))
    check_dtypes(operator, {"ids_TK": ids_TK}, (torch.int32,))
    check_words(operator, {"score": score}, SCORES)


def _check(logits_TE: torch.Tensor, selection_bias_E: torch.Tensor | None, top_k: int, score: str, num_groups: int,
           num_groups_kept: int, group_score: str) -> None:
    operator = "moe_fast::select"
    tensors = {"logits_TE": logits_TE, "selection_bias_E": selection_bias_E}
    check_shapes(operator, tensors, {})
    check_one_device(operator, tensors)
    check_dtypes(operator, {"logits_TE": logits_TE}, (torch.float32,))
    check_words(operator, {"score": score}, SCORES)
    check_words(operator, {"group_score": group_score}, ("max", "top2_sum"))
    num_experts, faults = logits_TE.shape[1], []
    if num_groups < 1 or num_experts % num_groups:
        faults.append(f"num_groups={num_groups}, but should divide the {num_experts} experts")
    elif not 1 <= num_groups_kept <= num_groups:
        faults.append(f"num_groups_kept={num_groups_kept}, but should be from 1 to num_groups={num_groups}")
    elif not 1 <= top_k <= (within := num_experts // num_groups * num_groups_kept):
        faults.append(f"top_k={top_k}, but should be from 1 to {within}, the experts to choose from")
    raise_faults(operator, faults)
