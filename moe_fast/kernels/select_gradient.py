"""From gradients of routing weights to those of the logits; the selection itself has none."""

import torch
import triton
import triton.language as tl

from moe_fast.launch import launch


@triton.jit
def select_gradient_kernel(grad_weights, logits, ids, grad_logits, num_tokens, num_experts, stride_grad_T,
                           stride_grad_K, stride_logits_T, stride_logits_E, epsilon, scaling_factor,
                           TOP_K: tl.constexpr, EXPERTS: tl.constexpr, SOFTMAX: tl.constexpr,
                           RENORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr):
    """With scores s, w_k = c s_k / D and D = sum of selected s + epsilon, or 1: first d_s, then through the score."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, EXPERTS)
    in_tokens = t < num_tokens
    in_range = in_tokens[:, None] & (expert < num_experts)[None, :]
    logit = tl.load(logits + t.to(tl.int64)[:, None] * stride_logits_T + expert.to(tl.int64)[None, :] * stride_logits_E,
                    mask=in_range, other=-float("inf"))
    if SOFTMAX:
        safe = tl.where(in_tokens[:, None], logit, 0.0)
        power = tl.exp(safe - tl.max(safe, axis=1)[:, None])
        score = power / tl.sum(power, axis=1)[:, None]
    else:
        score = tl.sigmoid(logit)
    is_chosen = expert[None, :] < tl.zeros((BLOCK_T, 1), tl.int32)
    grad_score = tl.zeros((BLOCK_T, EXPERTS), tl.float32)
    for k in tl.static_range(TOP_K):
        chosen = tl.load(ids + t.to(tl.int64) * TOP_K + k, mask=in_tokens, other=-1)
        grad = tl.load(grad_weights + t.to(tl.int64) * stride_grad_T + k * stride_grad_K, mask=in_tokens, other=0.0)
        is_slot = expert[None, :] == chosen[:, None]
        is_chosen = is_chosen | is_slot
        grad_score = tl.where(is_slot, (grad * scaling_factor)[:, None], grad_score)
    if RENORMALIZE:
        divisor = tl.sum(tl.where(is_chosen, score, 0.0), axis=1) + epsilon
        weighted = tl.sum(tl.where(is_chosen, grad_score * score / divisor[:, None], 0.0), axis=1)
        grad_score = tl.where(is_chosen, (grad_score - weighted[:, None]) / divisor[:, None], 0.0)
    if SOFTMAX:
        slope = score
        grad_score -= tl.sum(score * grad_score, axis=1)[:, None]
    else:
        slope = score * tl.sigmoid(-logit)
    tl.store(grad_logits + t.to(tl.int64)[:, None] * num_experts + expert[None, :], slope * grad_score, mask=in_range)


def select_gradient(grad_weights_TK: torch.Tensor, logits_TE: torch.Tensor, ids_TK: torch.Tensor, score: str,
                    renormalize: bool, renormalize_epsilon: float, scaling_factor: float) -> torch.Tensor:
    """grad_logits_TE in fp32, for the ids_TK that were selected; the options as in Router."""
    (num_tokens, num_experts), top_k, device = logits_TE.shape, ids_TK.shape[1], logits_TE.device
    grad_logits_TE = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=device)
    block_t = 32 if device.type == "cpu" else 4
    launch(select_gradient_kernel, (triton.cdiv(num_tokens, block_t),), device, grad_weights=grad_weights_TK,
           logits=logits_TE, ids=ids_TK.contiguous(), grad_logits=grad_logits_TE, num_tokens=num_tokens,
           num_experts=num_experts, stride_grad_T=grad_weights_TK.stride(0), stride_grad_K=grad_weights_TK.stride(1),
           stride_logits_T=logits_TE.stride(0), stride_logits_E=logits_TE.stride(1), epsilon=renormalize_epsilon,
           scaling_factor=scaling_factor, TOP_K=top_k, EXPERTS=triton.next_power_of_2(num_experts),
           SOFTMAX=score == "softmax", RENORMALIZE=renormalize, BLOCK_T=block_t)
    return grad_logits_TE
