"""moe_fast::merged_down, the second half of the experts: down product and merge; and moe_fast::merged_down_backward."""

from typing import NamedTuple

import torch

from moe_fast.kernels.align import Alignment, align
from moe_fast.kernels.combine import combine
from moe_fast.kernels.down import down
from moe_fast.kernels.down_gradient import down_gradient
from moe_fast.kernels.order import order
from moe_fast.kernels.take import take
from moe_fast.kernels.weight_gradient import weight_gradient
from moe_fast.operators.checks import check_dtypes, check_shapes
from moe_fast.operators.once import refuse_second_gradients
from moe_fast.operators.rows import every_token, mean_rows
from moe_fast.tiles import gemm_tile
from moe_ref.contract.errors import raise_faults
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Stage

Six = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@torch.library.custom_op("moe_fast::merged_down", mutates_args=())
def merged_down(act_RI: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, hosted_E: torch.Tensor,
                w2_EHI: torch.Tensor, shared_act_TI: torch.Tensor | None, shared_w2_HI: torch.Tensor | None,
                shared_gate_T1: torch.Tensor | None) -> torch.Tensor:
    """merged_TH in act's dtype: sum of weighted expert rows of act_RI, which is in (token, slot) order, R = T * K.

    Plus the shared expert's rows times its gate. The other arguments are those of moe_fast::experts. Products
    accumulate in fp32; down, shared and merged rows are rounded to act's dtype. Raises UsageValueError /
    UsageTypeError on wrong shapes or dtypes.
    """
    return merged_down_forward(act_RI, ids_TK, weights_TK, hosted_E, w2_EHI, shared_act_TI, shared_w2_HI,
                               shared_gate_T1)


@merged_down.register_fake
def _(act_RI: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, hosted_E: torch.Tensor,
      w2_EHI: torch.Tensor, shared_act_TI: torch.Tensor | None, shared_w2_HI: torch.Tensor | None,
      shared_gate_T1: torch.Tensor | None) -> torch.Tensor:
    _check("moe_fast::merged_down", act_RI, ids_TK, weights_TK, hosted_E, w2_EHI, shared_act_TI, shared_w2_HI,
           shared_gate_T1)
    return act_RI.new_empty(ids_TK.shape[0], w2_EHI.shape[1])


def merged_down_forward(act_RI: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, hosted_E: torch.Tensor,
                        w2_EHI: torch.Tensor, shared_act_TI: torch.Tensor | None, shared_w2_HI: torch.Tensor | None,
                        shared_gate_T1: torch.Tensor | None, trace: Trace | None = None) -> torch.Tensor:
    """What the operator runs; called by itself it shows its stages to a trace, and has no gradient."""
    _check("moe_fast::merged_down", act_RI, ids_TK, weights_TK, hosted_E, w2_EHI, shared_act_TI, shared_w2_HI,
           shared_gate_T1)
    alignment, down_RH = _down_rows(act_RI, ids_TK, weights_TK, hosted_E, w2_EHI)
    shared_TH = None
    if shared_act_TI is not None and shared_w2_HI is not None:
        _, shared_TH = _down_rows(shared_act_TI, *every_token(shared_act_TI, shared_gate_T1), shared_w2_HI[None])
    if trace is not None:
        trace.record(Stage.DOWN, down_RH.masked_fill(alignment.local_ids_R[:, None] < 0, 0.0))
        if shared_TH is not None:
            trace.record(Stage.SHARED, shared_TH)
    return combine(down_RH, shared_TH, alignment.local_ids_R, *ids_TK.shape)


def _down_rows(act_RI: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, hosted_E: torch.Tensor,
               w2_EHI: torch.Tensor) -> tuple[Alignment, torch.Tensor]:
    """The alignment, and weighted down_RH in (token, slot) order."""
    num_experts, hidden, intermediate = w2_EHI.shape
    tile = gemm_tile(act_RI.device, act_RI.dtype, mean_rows(ids_TK, num_experts), hidden, intermediate)
    alignment = align(ids_TK, hosted_E, tile.block_m)
    sorted_act_RI = take(act_RI, order(alignment)[0])
    return alignment, down(sorted_act_RI, w2_EHI, weights_TK.reshape(-1), alignment, tile)


@torch.library.custom_op("moe_fast::merged_down_backward", mutates_args=())
def merged_down_backward(grad_TH: torch.Tensor, act_RI: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor,
                         hosted_E: torch.Tensor, w2_EHI: torch.Tensor, shared_act_TI: torch.Tensor | None,
                         shared_w2_HI: torch.Tensor | None, shared_gate_T1: torch.Tensor | None) -> Six:
    """Gradients of act_RI, weights_TK, w2_EHI, shared_act_TI, shared_w2_HI and shared_gate_T1, in this order.

    grad_TH is that of merged_TH. Each gradient has the shape and dtype of its tensor; of those that are not given,
    shape (0,). Sums are in fp32 and in fixed order. Formulas: moe_ref.oracle.backward.mlp. Raises UsageValueError /
    UsageTypeError on wrong shapes or dtypes.
    """
    _check("moe_fast::merged_down_backward", act_RI, ids_TK, weights_TK, hosted_E, w2_EHI, shared_act_TI, shared_w2_HI,
           shared_gate_T1, grad_TH)
    routed, shared = _gradients(grad_TH, act_RI, ids_TK, weights_TK, hosted_E, w2_EHI), None
    if shared_act_TI is not None and shared_w2_HI is not None:
        shared = _gradients(grad_TH, shared_act_TI, *every_token(shared_act_TI, shared_gate_T1), shared_w2_HI[None])
    return (routed.act_RI, routed.weights_TK, routed.w2_EHI,
            act_RI.new_empty(0) if shared is None else shared.act_RI,
            act_RI.new_empty(0) if shared is None else shared.w2_EHI[0],
            act_RI.new_empty(0) if shared is None or shared_gate_T1 is None else shared.weights_TK)


class _Gradients(NamedTuple):
    """Of one grouped down product."""

    act_RI: torch.Tensor
    weights_TK: torch.Tensor
    w2_EHI: torch.Tensor


def _gradients(grad_TH: torch.Tensor, act_RI: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor,
               hosted_E: torch.Tensor, w2_EHI: torch.Tensor) -> _Gradients:
    (num_experts, hidden, intermediate), top_k = w2_EHI.shape, ids_TK.shape[1]
    tile = gemm_tile(act_RI.device, act_RI.dtype, mean_rows(ids_TK, num_experts), intermediate, hidden, accumulators=4)
    alignment = align(ids_TK, hosted_E, tile.block_m)
    grad_act_RI, weighted_act_RI, grad_weights_R = down_gradient(grad_TH, act_RI, w2_EHI, weights_TK.reshape(-1),
                                                                 alignment, top_k, tile)
    grad_w2_EHI = torch.empty_like(w2_EHI)
    # Of w2 the features of the token are H, so that its gradient is written through a transposed view.
    weight_gradient(weighted_act_RI[:, None], grad_TH, grad_w2_EHI.transpose(1, 2)[:, None], alignment, top_k)
    return _Gradients(grad_act_RI, grad_weights_R.reshape(ids_TK.shape), grad_w2_EHI)


@merged_down_backward.register_fake
def _(grad_TH: torch.Tensor, act_RI: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor,
      hosted_E: torch.Tensor, w2_EHI: torch.Tensor, shared_act_TI: torch.Tensor | None,
      shared_w2_HI: torch.Tensor | None, shared_gate_T1: torch.Tensor | None) -> Six:
    _check("moe_fast::merged_down_backward", act_RI, ids_TK, weights_TK, hosted_E, w2_EHI, shared_act_TI, shared_w2_HI,
           shared_gate_T1, grad_TH)

    def like(tensor: torch.Tensor | None) -> torch.Tensor:
        return act_RI.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    return (like(act_RI), like(weights_TK), torch.empty_like(w2_EHI), like(shared_act_TI),
            act_RI.new_empty(0) if shared_w2_HI is None else torch.empty_like(shared_w2_HI), like(shared_gate_T1))


def _setup_context(ctx, inputs: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_TH: torch.Tensor):
    act_RI, weights_TK, w2_EHI, *shared = merged_down_backward(grad_TH, *ctx.saved_tensors)
    given = [gradient if tensor is not None else None
             for gradient, tensor in zip(shared, ctx.saved_tensors[5:], strict=True)]
    return act_RI, None, weights_TK, None, w2_EHI, *given


merged_down.register_autograd(_backward, setup_context=_setup_context)
merged_down_backward.register_autograd(refuse_second_gradients)


def _check(operator: str, act_RI: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, hosted_E: torch.Tensor,
           w2_EHI: torch.Tensor, shared_act_TI: torch.Tensor | None, shared_w2_HI: torch.Tensor | None,
           shared_gate_T1: torch.Tensor | None, grad_TH: torch.Tensor | None = None) -> None:
    if (shared_act_TI is None) != (shared_w2_HI is None) or (shared_act_TI is None and shared_gate_T1 is not None):
        raise_faults(operator, ["shared_act_TI, shared_w2_HI and shared_gate_T1 are given in part, but a shared expert "
                                "needs the first two"])
    routed = {"ids_TK": ids_TK, "weights_TK": weights_TK, "act_RI": act_RI, "hosted_E": hosted_E, "w2_EHI": w2_EHI}
    check_shapes(operator, routed | {"grad_TH": grad_TH}, {"R": ids_TK.numel()} if ids_TK.dim() == 2 else {})
    shared = {"shared_act_TI": shared_act_TI, "shared_w2_HI": shared_w2_HI, "shared_gate_T1": shared_gate_T1}
    check_shapes(operator, {"ids_TK": ids_TK} | shared, {"H": w2_EHI.shape[1], "1": 1})
    kinds = {"w2_EHI": w2_EHI, "shared_act_TI": shared_act_TI, "shared_w2_HI": shared_w2_HI, "grad_TH": grad_TH}
    check_dtypes(operator, kinds, (act_RI.dtype,))
    check_dtypes(operator, {"weights_TK": weights_TK, "shared_gate_T1": shared_gate_T1}, (torch.float32,))
    check_dtypes(operator, {"ids_TK": ids_TK}, (torch.int32, torch.int64))
    check_dtypes(operator, {"hosted_E": hosted_E}, (torch.int64,))
