"""From gradients of the weights that a capacity left to those of the scores and of the learned scale."""

import torch
import triton
import triton.language as tl

from moe_fast.kernels.drop import slot_arguments
from moe_fast.kernels.weigh import divisor_gradient, divisor_of
from moe_fast.launch import launch
from moe_ref.contract.spec import Router


@triton.jit
def drop_gradient_kernel(grad_weights, grad_shared, ids, scores, shared, weight_scale, grad_scores, grad_shared_scores,
                         grad_scale, num_tokens, num_experts, num_shared, stride_grad_T, stride_grad_K,
                         stride_grad_shared_T, stride_grad_shared_S, stride_scale_E, epsilon, scaling_factor,
                         TOP_K: tl.constexpr, SLOTS: tl.constexpr, EXPERTS: tl.constexpr, SHARED: tl.constexpr,
                         RENORMALIZE: tl.constexpr, CLAMP: tl.constexpr, HAS_SCALE: tl.constexpr,
                         PER_EXPERT: tl.constexpr, HAS_SHARED: tl.constexpr, BLOCK_T: tl.constexpr):
    """w_k = c_k s_k / D for slots that were kept, D over these as in select_gradient_kernel; the others have 0."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    wide_t = t.to(tl.int64)
    slot = tl.arange(0, SLOTS)
    in_tokens = t < num_tokens
    in_slots = in_tokens[:, None] & (slot < TOP_K)[None, :]
    own = wide_t[:, None] * TOP_K + slot[None, :]
    expert = tl.load(ids + own, mask=in_slots, other=-1)
    is_kept = expert >= 0
    score = tl.load(scores + own, mask=is_kept, other=0.0)
    grad = scaling_factor * tl.load(grad_weights + wide_t[:, None] * stride_grad_T + slot[None, :] * stride_grad_K,
                                    mask=is_kept, other=0.0)
    column = tl.arange(0, SHARED)
    in_shared = in_tokens[:, None] & (column < num_shared)[None, :]
    shared_score = tl.zeros((BLOCK_T, SHARED), tl.float32)
    grad_column = shared_score
    if HAS_SHARED:
        shared_score = tl.load(shared + wide_t[:, None] * num_shared + column[None, :], mask=in_shared, other=0.0)
        grad_column = scaling_factor * tl.load(grad_shared + wide_t[:, None] * stride_grad_shared_T
                                               + column[None, :] * stride_grad_shared_S, mask=in_shared, other=0.0)
    divisor = tl.full((BLOCK_T,), 1.0, tl.float32)
    if RENORMALIZE:
        divisor = divisor_of(score, shared_score, epsilon, CLAMP, HAS_SHARED)
        if not HAS_SHARED:
            divisor = tl.where(tl.sum(is_kept.to(tl.int32), axis=1) > 0, divisor, 1.0)
    if HAS_SCALE:
        of_slot = grad * score / divisor[:, None]
        if PER_EXPERT:
            place = tl.arange(0, EXPERTS)
            by_expert = tl.zeros((BLOCK_T, EXPERTS), tl.float32)
            for k in range(TOP_K):
                chosen = tl.load(ids + wide_t * TOP_K + k, mask=in_tokens, other=-1)
                part = tl.sum(tl.where(slot[None, :] == k, of_slot, 0.0), axis=1)
                by_expert = tl.where(place[None, :] == chosen[:, None], part[:, None], by_expert)
            tl.store(grad_scale + wide_t[:, None] * num_experts + place[None, :], by_expert,
                     mask=in_tokens[:, None] & (place < num_experts)[None, :])
        else:
            of_token = tl.sum(of_slot, axis=1)
            if HAS_SHARED:
                of_token += tl.sum(grad_column * shared_score / divisor[:, None], axis=1)
                grad_column *= tl.load(weight_scale).to(tl.float32)
            tl.store(grad_scale + wide_t, of_token, mask=in_tokens)
        grad *= tl.load(weight_scale + expert * stride_scale_E, mask=is_kept, other=0.0).to(tl.float32)
    if RENORMALIZE:
        weighted = divisor_gradient(grad, score, grad_column, shared_score, divisor, epsilon, CLAMP,
                                    HAS_SHARED)[:, None]
        grad = tl.where(is_kept, (grad - weighted) / divisor[:, None], 0.0)
        grad_column = (grad_column - weighted) / divisor[:, None]
    tl.store(grad_scores + own, grad, mask=in_slots)
    if HAS_SHARED:
        tl.store(grad_shared_scores + wide_t[:, None] * num_shared + column[None, :], grad_column, mask=in_shared)


def drop_gradient(grad_weights_TK: torch.Tensor, grad_shared_TS: torch.Tensor, ids_TK: torch.Tensor,
                  scores_TK: torch.Tensor, shared_TS: torch.Tensor, weight_scale_E: torch.Tensor | None,
                  router: Router) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of scores_TK and shared_TS in fp32, for the ids_TK that were kept, and parts of the scale's.

    The parts are those of select_gradient.
    """
    num_tokens, device = len(ids_TK), ids_TK.device
    grad_scores_TK, grad_scores_TS = torch.empty_like(scores_TK), torch.empty_like(shared_TS)
    num_scales = 1 if weight_scale_E is None else weight_scale_E.shape[0]
    parts = torch.empty(0 if weight_scale_E is None else num_tokens, num_scales, dtype=torch.float32, device=device)
    block_t = 32 if device.type == "cpu" else 4
    launch(drop_gradient_kernel, (triton.cdiv(num_tokens, block_t),), device, grad_weights=grad_weights_TK,
           grad_shared=grad_shared_TS, ids=ids_TK, scores=scores_TK, shared=shared_TS, grad_scores=grad_scores_TK,
           grad_shared_scores=grad_scores_TS, grad_scale=parts, num_tokens=num_tokens,
           num_experts=router.num_experts, stride_grad_T=grad_weights_TK.stride(0),
           stride_grad_K=grad_weights_TK.stride(1), stride_grad_shared_T=grad_shared_TS.stride(0),
           stride_grad_shared_S=grad_shared_TS.stride(1), scaling_factor=router.scaling_factor,
           EXPERTS=triton.next_power_of_2(router.num_experts), BLOCK_T=block_t,
           **slot_arguments(scores_TK, shared_TS, weight_scale_E, router))
    return grad_scores_TK, grad_scores_TS, parts
