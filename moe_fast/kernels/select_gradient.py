"""From gradients of routing weights to those of the logits and of the learned scale; the selection itself has none."""

import torch
import triton
import triton.language as tl

from moe_fast.kernels.scores import capped, capped_slope, score_gradient, score_of
from moe_fast.kernels.select import score_arguments
from moe_fast.kernels.weigh import divisor_gradient, divisor_of
from moe_fast.launch import launch
from moe_ref.contract.spec import Router


@triton.jit
def select_gradient_kernel(grad_weights, grad_shared, logits, shared_logits, weight_scale, ids, grad_logits,
                           grad_shared_logits, grad_scale, num_tokens, num_experts, num_shared, stride_grad_T,
                           stride_grad_K, stride_grad_shared_T, stride_grad_shared_S, stride_logits_T,
                           stride_logits_E, stride_shared_T, stride_shared_S, stride_scale_E, logit_scale,
                           logit_softcap, epsilon, scaling_factor, TOP_K: tl.constexpr, EXPERTS: tl.constexpr,
                           SHARED: tl.constexpr, SCORE: tl.constexpr, SOFTCAP: tl.constexpr,
                           RENORMALIZE: tl.constexpr, CLAMP: tl.constexpr, HAS_SCALE: tl.constexpr,
                           PER_EXPERT: tl.constexpr, HAS_SHARED: tl.constexpr, BLOCK_T: tl.constexpr):
    """With scores s, w_k = c_k s_k / D and D = sum of selected s + epsilon, or 1: first d_s, then through the score.

    grad_scale[t] = sum of d_w_k w_k / c, for each expert where each has a scale.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    wide_t = t.to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    in_tokens = t < num_tokens
    in_range = in_tokens[:, None] & (expert < num_experts)[None, :]
    logit = tl.load(logits + wide_t[:, None] * stride_logits_T + expert.to(tl.int64)[None, :] * stride_logits_E,
                    mask=in_range, other=-float("inf"))
    value = capped(logit, logit_scale, logit_softcap, SOFTCAP)
    score = score_of(value, in_range, in_tokens, SCORE)
    is_chosen = expert[None, :] < tl.zeros((BLOCK_T, 1), tl.int32)
    grad = tl.zeros((BLOCK_T, EXPERTS), tl.float32)
    for k in range(TOP_K):
        chosen = tl.load(ids + wide_t * TOP_K + k, mask=in_tokens, other=-1)
        grad_k = tl.load(grad_weights + wide_t * stride_grad_T + k * stride_grad_K, mask=in_tokens, other=0.0)
        is_slot = expert[None, :] == chosen[:, None]
        is_chosen = is_chosen | is_slot
        grad = tl.where(is_slot, (grad_k * scaling_factor)[:, None], grad)
    # Of the shares s / D; where there is a learned scale, before it.
    chosen_score = tl.where(is_chosen, score, 0.0)
    column = tl.arange(0, SHARED)
    in_shared = in_tokens[:, None] & (column < num_shared)[None, :]
    shared_logit = tl.zeros((BLOCK_T, SHARED), tl.float32)
    grad_column = shared_logit
    shared_score = shared_logit
    if HAS_SHARED:
        shared_logit = tl.load(shared_logits + wide_t[:, None] * stride_shared_T + column[None, :] * stride_shared_S,
                               mask=in_shared, other=0.0)
        grad_column = scaling_factor * tl.load(grad_shared + wide_t[:, None] * stride_grad_shared_T
                                               + column[None, :] * stride_grad_shared_S, mask=in_shared, other=0.0)
        shared_score = score_of(capped(shared_logit, logit_scale, logit_softcap, SOFTCAP), in_shared, in_tokens, SCORE)
    divisor = tl.full((BLOCK_T,), 1.0, tl.float32)
    if RENORMALIZE:
        divisor = divisor_of(chosen_score, shared_score, epsilon, CLAMP, HAS_SHARED)
    if HAS_SCALE:
        by_expert = grad * chosen_score / divisor[:, None]
        if PER_EXPERT:
            tl.store(grad_scale + wide_t[:, None] * num_experts + expert[None, :], by_expert, mask=in_range)
        else:
            of_token = tl.sum(by_expert, axis=1)
            if HAS_SHARED:
                of_token += tl.sum(grad_column * shared_score / divisor[:, None], axis=1)
            tl.store(grad_scale + wide_t, of_token, mask=in_tokens)
        grad *= tl.load(weight_scale + expert * stride_scale_E, mask=expert < num_experts,
                        other=0.0).to(tl.float32)[None, :]
        if HAS_SHARED and not PER_EXPERT:
            grad_column *= tl.load(weight_scale).to(tl.float32)
    if RENORMALIZE:
        weighted = divisor_gradient(grad, chosen_score, grad_column, shared_score, divisor, epsilon, CLAMP,
                                    HAS_SHARED)[:, None]
        grad = tl.where(is_chosen, (grad - weighted) / divisor[:, None], 0.0)
        grad_column = tl.where(in_shared, (grad_column - weighted) / divisor[:, None], 0.0)
    slope = capped_slope(logit, logit_scale, logit_softcap, SOFTCAP)
    tl.store(grad_logits + wide_t[:, None] * num_experts + expert[None, :],
             slope * score_gradient(grad, score, value, SCORE), mask=in_range)
    if HAS_SHARED:
        shared_value = capped(shared_logit, logit_scale, logit_softcap, SOFTCAP)
        slope_column = capped_slope(shared_logit, logit_scale, logit_softcap, SOFTCAP)
        tl.store(grad_shared_logits + wide_t[:, None] * num_shared + column[None, :],
                 slope_column * score_gradient(grad_column, shared_score, shared_value, SCORE), mask=in_shared)


def select_gradient(grad_weights_TK: torch.Tensor, grad_shared_TS: torch.Tensor, logits_TE: torch.Tensor,
                    shared_logits_TS: torch.Tensor | None, weight_scale_E: torch.Tensor | None, ids_TK: torch.Tensor,
                    router: Router) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of logits_TE and shared_logits_TS in fp32, for the ids_TK that were selected, and parts of the scale's.

    The parts are fp32 and of each token: (T, E), or (T, 1) where the layer has one scale, or (0, 1) without any.
    """
    (num_tokens, num_experts), top_k, device = logits_TE.shape, ids_TK.shape[1], logits_TE.device
    grad_logits_TE = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=device)
    grad_columns_TS = torch.empty(grad_shared_TS.shape, dtype=torch.float32, device=device)
    num_scales = 1 if weight_scale_E is None else weight_scale_E.shape[0]
    parts = torch.empty(0 if weight_scale_E is None else num_tokens, num_scales, dtype=torch.float32, device=device)
    block_t = 32 if device.type == "cpu" else 4
    launch(select_gradient_kernel, (triton.cdiv(num_tokens, block_t),), device, grad_weights=grad_weights_TK,
           grad_shared=grad_shared_TS, ids=ids_TK.contiguous(), grad_logits=grad_logits_TE,
           grad_shared_logits=grad_columns_TS, grad_scale=parts, num_tokens=num_tokens, num_experts=num_experts,
           stride_grad_T=grad_weights_TK.stride(0), stride_grad_K=grad_weights_TK.stride(1),
           stride_grad_shared_T=grad_shared_TS.stride(0), stride_grad_shared_S=grad_shared_TS.stride(1),
           scaling_factor=router.scaling_factor, TOP_K=top_k, BLOCK_T=block_t,
           **score_arguments(logits_TE, shared_logits_TS, weight_scale_E, router))
    return grad_logits_TE, grad_columns_TS, parts
