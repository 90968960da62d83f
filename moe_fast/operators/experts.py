"""moe_fast::experts, the routed and shared experts of one rank and their weighted merge."""

from dataclasses import dataclass

import torch

from moe_fast.kernels.align import align
from moe_fast.kernels.combine import combine
from moe_fast.kernels.down import down
from moe_fast.kernels.gate_up import gate_up, gate_up_tile
from moe_fast.memory import chunk_tokens
from moe_fast.observe import record_codes, record_routed_rows
from moe_fast.operators.arguments import ExpertsArguments, GroupedMLP
from moe_fast.operators.encoded_arguments import EncodedArguments, EncodedMLP
from moe_fast.operators.encoded_family import encoded_mlp_rows
from moe_fast.operators.encoded_rows import EncodedRows
from moe_fast.operators.experts_backward import experts_backward
from moe_fast.operators.fp8 import experts_in_fp8
from moe_fast.operators.rows import load_of
from moe_fast.tiles import gemm_tile
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Stage


@torch.library.custom_op("moe_fast::experts", mutates_args=())
def experts(x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, hosted_E: torch.Tensor,
            w13_EGIH: torch.Tensor, w2_EHI: torch.Tensor, shared_w13_GIH: torch.Tensor | None,
            shared_w2_HI: torch.Tensor | None, shared_gate_T1: torch.Tensor | None, form: str, shared_form: str,
            w13_bias_EGI: torch.Tensor | None = None, w2_bias_EH: torch.Tensor | None = None,
            shared_w13_bias_GI: torch.Tensor | None = None, shared_w2_bias_H: torch.Tensor | None = None,
            output_bias_H: torch.Tensor | None = None, mean: bool = False,
            operands: str = "exact") -> torch.Tensor:
    """merged_TH of one rank in x's dtype: sum of weighted expert rows, plus the shared expert times its gate.

    hosted_E (int64): the global id of the expert at each place of w13 and w2; any other id (int32 or int64)
    contributes nothing. weights_TK, shared_gate_T1: fp32; the other tensors in x's dtype. form, shared_form: the words
    of moe_fast.form.form_of. mean: half of that sum; output_bias_H is added at the end. Zero experts, columns or tokens
    are valid. Products accumulate in fp32; act, down, shared and merged rows are rounded to x's dtype. operands:
    "fp8_row" rounds those of every product to e4m3, forward and backward (docs/backward.md). Formulas:
    moe_ref.oracle. Raises UsageValueError / UsageTypeError on wrong shapes, dtypes or words.
    """
    return experts_forward(ExpertsArguments(
        x_TH, ids_TK, weights_TK, hosted_E, w13_EGIH, w2_EHI, shared_w13_GIH, shared_w2_HI, shared_gate_T1, form,
        shared_form, w13_bias_EGI, w2_bias_EH, shared_w13_bias_GI, shared_w2_bias_H, output_bias_H, mean, operands))


@experts.register_fake
def _(*arguments, **options) -> torch.Tensor:
    given = ExpertsArguments(*arguments, **options)
    given.check("moe_fast::experts")
    return given.x_TH.new_empty(given.x_TH.shape)


def _setup_context(ctx, inputs: tuple, output: torch.Tensor) -> None:
    ctx.plain = {place: value for place, value in enumerate(inputs) if isinstance(value, str | bool)}
    ctx.save_for_backward(*(None if place in ctx.plain else value for place, value in enumerate(inputs)))


def _backward(ctx, grad_TH: torch.Tensor):
    inputs = [ctx.plain.get(place, tensor) for place, tensor in enumerate(ctx.saved_tensors)]
    found = dict(zip(GRADIENT_PLACES, experts_backward(grad_TH, *inputs), strict=True))
    return tuple(found.get(place) if tensor is not None else None for place, tensor in enumerate(ctx.saved_tensors))


GRADIENT_PLACES = (0, 2, 4, 5, 6, 7, 8, 11, 12, 13, 14, 15)
"""Places among the arguments of what experts_backward returns gradients of, in its order."""

experts.register_autograd(_backward, setup_context=_setup_context)


@dataclass(frozen=True)
class Products:
    """Where gate and up of routed and shared rows are written (fp32), as they are before anything is added to them.

    routed_RGI: in (token, slot) order. shared_TGI: of a shared expert, if there is one.
    """

    routed_RGI: torch.Tensor
    shared_TGI: torch.Tensor | None

    def tokens(self, start: int, stop: int, top_k: int) -> "Products":
        """The part of some tokens."""
        shared_TGI = self.shared_TGI
        return Products(self.routed_RGI[start * top_k:stop * top_k],
                        None if shared_TGI is None else shared_TGI[start:stop])


def experts_forward(given: ExpertsArguments | EncodedArguments, trace: Trace | None = None,
                    products: Products | None = None) -> torch.Tensor:
    """What the operator runs, over encoded experts too; called by itself it shows its stages to a trace, and has no
    gradient.
    """
    given.check("moe_fast::experts" if isinstance(given, ExpertsArguments) else "moe_fast::encoded_experts")
    if isinstance(given, ExpertsArguments) and given.operands == "fp8_row":
        given = experts_in_fp8(given)
    merged_TH = given.x_TH.new_empty(given.x_TH.shape)
    num_tokens, top_k = given.ids_TK.shape
    step = max(1, num_tokens if trace is not None else chunk_tokens(top_k))
    for start in range(0, max(1, num_tokens), step):
        stop = min(num_tokens, start + step)
        _merge(given.tokens(start, stop), merged_TH[start:stop], trace,
               None if products is None else products.tokens(start, stop, top_k))
    if trace is not None:
        trace.record(Stage.MERGED, merged_TH)
    return merged_TH


def _merge(given: ExpertsArguments | EncodedArguments, merged_TH: torch.Tensor, trace: Trace | None,
           products: Products | None) -> None:
    rows = mlp_rows(given.routed(), None if products is None else products.routed_RGI, trace is not None)
    alignment, down_RH = rows.alignment, rows.down_RH
    record_routed_rows(trace, alignment, rows.act_RI, down_RH)
    record_codes(trace, alignment, rows.codes)
    del rows  # or act would be held while the shared expert is computed
    shared, shared_TH = given.shared(), None
    if shared is not None:
        shared_TH = mlp_rows(shared, None if products is None else products.shared_TGI).down_RH
        if trace is not None:
            trace.record(Stage.SHARED, shared_TH)
    combine(down_RH, shared_TH, alignment.local_ids_R, *given.ids_TK.shape, bias_H=given.output_bias_H,
            mean=given.mean, merged_TH=merged_TH)


def mlp_rows(mlp: GroupedMLP | EncodedMLP, products_RGI: torch.Tensor | None, traced: bool = False) -> EncodedRows:
    """Rows of both products; products_RGI is filled, if given, where weights are not encoded."""
    if isinstance(mlp, EncodedMLP):
        return encoded_mlp_rows(mlp, traced)
    (num_experts, _, intermediate, hidden), top_k = mlp.w13_EGIH.shape, mlp.ids_TK.shape[1]
    load, device, dtype = load_of(mlp.ids_TK, num_experts), mlp.x_TH.device, mlp.x_TH.dtype
    first = gate_up_tile(device, dtype, load, mlp.w13_EGIH, mlp.form, mlp.w13_bias_EGI is not None)
    second = gemm_tile(device, dtype, load, hidden, intermediate, kernel="down", block_m=first.block_m)
    alignment = align(mlp.ids_TK, mlp.hosted_E, first.block_m)
    act_RI = gate_up(mlp.x_TH, mlp.w13_EGIH, mlp.w13_bias_EGI, mlp.weights_TK.reshape(-1), alignment, top_k, mlp.form,
                     first, products_RGI)
    return EncodedRows(alignment, act_RI, down(act_RI, mlp.w2_EHI, mlp.w2_bias_EH, mlp.output_weights_R, alignment,
                                               second))
