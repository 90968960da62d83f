"""moe_fast::experts, the routed and shared experts of one rank and their weighted merge."""

import torch

from moe_fast.kernels.align import Alignment, align
from moe_fast.kernels.combine import combine
from moe_fast.kernels.down import down
from moe_fast.kernels.gate_up import gate_up
from moe_fast.observe import record_routed_rows
from moe_fast.operators.checks import check_experts
from moe_fast.operators.experts_backward import experts_backward
from moe_fast.operators.rows import every_token, mean_rows
from moe_fast.tiles import gemm_tile
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Stage


@torch.library.custom_op("moe_fast::experts", mutates_args=())
def experts(x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, hosted_E: torch.Tensor,
            w13_EGIH: torch.Tensor, w2_EHI: torch.Tensor, shared_w13_GIH: torch.Tensor | None,
            shared_w2_HI: torch.Tensor | None, shared_gate_T1: torch.Tensor | None, activation: str,
            shared_activation: str) -> torch.Tensor:
    """merged_TH of one rank in x's dtype: sum of weighted expert rows, plus the shared expert times its gate.

    hosted_E (int64): the global id of the expert at each place of w13 and w2; any other id (int32 or int64)
    contributes nothing. weights_TK, shared_gate_T1: fp32; the other tensors in x's dtype. Zero experts, columns or
    tokens are valid. Products accumulate in fp32; act, down, shared and merged rows are rounded to x's dtype.
    Raises UsageValueError / UsageTypeError on wrong shapes or dtypes.
    """
    return experts_forward(x_TH, ids_TK, weights_TK, hosted_E, w13_EGIH, w2_EHI, shared_w13_GIH, shared_w2_HI,
                           shared_gate_T1, activation, shared_activation)


@experts.register_fake
def _(x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, hosted_E: torch.Tensor,
      w13_EGIH: torch.Tensor, w2_EHI: torch.Tensor, shared_w13_GIH: torch.Tensor | None,
      shared_w2_HI: torch.Tensor | None, shared_gate_T1: torch.Tensor | None, activation: str,
      shared_activation: str) -> torch.Tensor:
    check_experts("moe_fast::experts", x_TH, ids_TK, weights_TK, hosted_E, w13_EGIH, w2_EHI, shared_w13_GIH,
                  shared_w2_HI, shared_gate_T1, activation, shared_activation)
    return x_TH.new_empty(x_TH.shape)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
    *tensors, activation, shared_activation = inputs
    ctx.save_for_backward(*tensors)
    ctx.activations = activation, shared_activation  # type: ignore[attr-defined]


def _backward(ctx, grad_TH: torch.Tensor):
    x_TH, weights_TK, *parameters = experts_backward(grad_TH, *ctx.saved_tensors, *ctx.activations)
    has_shared, has_gate = (ctx.saved_tensors[place] is not None for place in (6, 8))
    w13_EGIH, w2_EHI, shared_w13_GIH, shared_w2_HI, shared_gate_T1 = parameters
    shared = (shared_w13_GIH, shared_w2_HI) if has_shared else (None, None)
    return (x_TH, None, weights_TK, None, w13_EGIH, w2_EHI, *shared, shared_gate_T1 if has_gate else None, None, None)


experts.register_autograd(_backward, setup_context=_setup_context)


def experts_forward(x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, hosted_E: torch.Tensor,
                    w13_EGIH: torch.Tensor, w2_EHI: torch.Tensor, shared_w13_GIH: torch.Tensor | None,
                    shared_w2_HI: torch.Tensor | None, shared_gate_T1: torch.Tensor | None, activation: str,
                    shared_activation: str, trace: Trace | None = None) -> torch.Tensor:
    """What the operator runs; called by itself it shows its stages to a trace, and has no gradient."""
    check_experts("moe_fast::experts", x_TH, ids_TK, weights_TK, hosted_E, w13_EGIH, w2_EHI, shared_w13_GIH,
                  shared_w2_HI, shared_gate_T1, activation, shared_activation)
    alignment, act_RI, down_RH = mlp_rows(x_TH, ids_TK, weights_TK, hosted_E, w13_EGIH, w2_EHI, activation)
    record_routed_rows(trace, alignment, act_RI, down_RH)
    shared_TH = None
    if shared_w13_GIH is not None and shared_w2_HI is not None:
        _, _, shared_TH = mlp_rows(x_TH, *every_token(x_TH, shared_gate_T1), shared_w13_GIH[None], shared_w2_HI[None],
                                   shared_activation)
    merged_TH = combine(down_RH, shared_TH, alignment.local_ids_R, *ids_TK.shape)
    if trace is not None:
        if shared_TH is not None:
            trace.record(Stage.SHARED, shared_TH)
        trace.record(Stage.MERGED, merged_TH)
    return merged_TH


def mlp_rows(x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, hosted_E: torch.Tensor,
             w13_EGIH: torch.Tensor, w2_EHI: torch.Tensor,
             activation: str) -> tuple[Alignment, torch.Tensor, torch.Tensor]:
    """The alignment, act_RI in expert order and weighted down_RH in (token, slot) order."""
    (num_experts, _, intermediate, hidden), top_k = w13_EGIH.shape, ids_TK.shape[1]
    rows_per_expert = mean_rows(ids_TK, num_experts)
    first = gemm_tile(x_TH.device, x_TH.dtype, rows_per_expert, intermediate, hidden, accumulators=2)
    second = gemm_tile(x_TH.device, x_TH.dtype, rows_per_expert, hidden, intermediate)
    assert first.block_m == second.block_m
    alignment = align(ids_TK, hosted_E, first.block_m)
    act_RI = gate_up(x_TH, w13_EGIH, alignment, top_k, activation, first)
    return alignment, act_RI, down(act_RI, w2_EHI, weights_TK.reshape(-1), alignment, second)
