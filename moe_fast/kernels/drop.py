"""A capacity: which slots an expert keeps, and the weights of what is left."""

import torch
import triton
import triton.language as tl

from moe_fast.kernels.select import weighting_arguments
from moe_fast.kernels.weigh import divisor_of
from moe_fast.launch import launch
from moe_ref.contract.spec import Router


@triton.jit
def rank_of(scores, slot, mask):
    """Scores as slots are ranked by them; NaN is put last, so that a broken token takes nobody's place."""
    score = tl.load(scores + slot, mask=mask, other=0.0)
    return tl.where(score == score, score, -float("inf"))


@triton.jit
def slots_before(ids, scores, t, expert, rank, k, first, last, sequence_length, TOP_K: tl.constexpr,
                 PRIORITY: tl.constexpr, BLOCK_T: tl.constexpr, OTHERS: tl.constexpr):
    """How many slots of tokens [first, last) come before slot k of each token in the queue of its expert."""
    before = tl.zeros((BLOCK_T,), tl.int32)
    for start in range(first * TOP_K, last * TOP_K, OTHERS):
        other = start + tl.arange(0, OTHERS)
        in_slots = other < last * TOP_K
        other_t = other // TOP_K
        other_expert = tl.load(ids + other, mask=in_slots, other=-1)
        same = in_slots[None, :] & (other_expert[None, :] == expert[:, None])
        same = same & ((other_t // sequence_length)[None, :] == (t // sequence_length)[:, None])
        # An expert is at most once in a token, so that tokens tell apart what else is equal.
        earlier = other_t[None, :] < t[:, None]
        if PRIORITY == "choice":
            choice = (other % TOP_K)[None, :]
            earlier = (choice < k) | ((choice == k) & earlier)
        if PRIORITY == "weight":
            other_rank = rank_of(scores, other, in_slots)[None, :]
            earlier = (other_rank > rank[:, None]) | ((other_rank == rank[:, None]) & earlier)
        before += tl.sum((same & earlier).to(tl.int32), axis=1)
    return before


@triton.jit
def drop_kernel(ids, scores, shared, weight_scale, kept_ids, weights, shared_weights, num_tokens, num_experts,
                num_shared, sequence_length, limit, last_limit, stride_scale_E, epsilon, scaling_factor,
                TOP_K: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr, PRIORITY: tl.constexpr,
                RENORMALIZE: tl.constexpr, CLAMP: tl.constexpr, HAS_SCALE: tl.constexpr, PER_EXPERT: tl.constexpr,
                HAS_SHARED: tl.constexpr, BLOCK_T: tl.constexpr, OTHERS: tl.constexpr):
    """A slot stays where fewer than `limit` slots of its expert and sequence come before it; then the weights.

    Every slot is compared with every other one of its sequences: no sort, so that no order of its own decides.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_tokens = t < num_tokens
    slot = tl.arange(0, SLOTS)
    end = tl.program_id(0) * BLOCK_T + BLOCK_T
    first = tl.program_id(0) * BLOCK_T // sequence_length * sequence_length
    last = end
    if PRIORITY != "token":
        last = (end - 1) // sequence_length * sequence_length + sequence_length
    last = tl.minimum(last, num_tokens)
    room = tl.where((t // sequence_length + 1) * sequence_length > num_tokens, last_limit, limit)
    score = tl.zeros((BLOCK_T, SLOTS), tl.float32)
    scale = tl.zeros((BLOCK_T, SLOTS), tl.float32) + scaling_factor
    any_kept = t < 0
    for k in range(TOP_K):
        own = t * TOP_K + k
        expert = tl.load(ids + own, mask=in_tokens, other=-1)
        before = slots_before(ids, scores, t, expert, rank_of(scores, own, in_tokens), k, first, last, sequence_length,
                              TOP_K, PRIORITY, BLOCK_T, OTHERS)
        is_kept = in_tokens & ((before < room) | (expert >= num_experts))
        any_kept = any_kept | is_kept
        tl.store(kept_ids + own, tl.where(is_kept, expert, -1), mask=in_tokens)
        found = tl.load(scores + own, mask=is_kept, other=0.0)
        score = tl.where(slot[None, :] == k, found[:, None], score)
        if HAS_SCALE:
            learned = tl.load(weight_scale + expert * stride_scale_E, mask=is_kept, other=0.0).to(tl.float32)
            scale = tl.where(slot[None, :] == k, scale * learned[:, None], scale)
    column = tl.arange(0, SHARED)
    in_shared = in_tokens[:, None] & (column < num_shared)[None, :]
    shared_score = score
    if HAS_SHARED:
        shared_score = tl.load(shared + t[:, None] * num_shared + column[None, :], mask=in_shared, other=0.0)
    if RENORMALIZE:
        divisor = divisor_of(score, shared_score, epsilon, CLAMP, HAS_SHARED)
        if not HAS_SHARED:
            # A token that lost every slot may have no sum to divide by; its weights are 0 anyway.
            divisor = tl.where(any_kept, divisor, 1.0)
        score = score / divisor[:, None]
        shared_score = shared_score / divisor[:, None]
    tl.store(weights + t[:, None] * TOP_K + slot[None, :], score * scale,
             mask=in_tokens[:, None] & (slot < TOP_K)[None, :])
    if HAS_SHARED:
        shared_score *= scaling_factor
        if HAS_SCALE and not PER_EXPERT:
            shared_score *= tl.load(weight_scale).to(tl.float32)
        tl.store(shared_weights + t[:, None] * num_shared + column[None, :], shared_score, mask=in_shared)


def drop(ids_TK: torch.Tensor, scores_TK: torch.Tensor, shared_TS: torch.Tensor, weight_scale_E: torch.Tensor | None,
         router: Router) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids_TK with -1 for what was dropped, weights_TK, 0 there, and shared_TS (fp32), after renormalisation and scale.

    T * K must be below 2^31.
    """
    (num_tokens, top_k), device, capacity = ids_TK.shape, ids_TK.device, router.capacity
    assert capacity is not None
    length = max(min(capacity.sequence_length or num_tokens, num_tokens), 1)
    limit, last_limit = (min(capacity.limit(size, top_k, router.num_experts), num_tokens)
                         for size in (length, num_tokens % length))
    kept_TK, weights_TK, weights_TS = torch.empty_like(ids_TK), torch.empty_like(scores_TK), torch.empty_like(shared_TS)
    block_t, others = (32, 256) if device.type == "cpu" else (32, 64)
    launch(drop_kernel, (triton.cdiv(num_tokens, block_t),), device, ids=ids_TK, scores=scores_TK, shared=shared_TS,
           kept_ids=kept_TK, weights=weights_TK, shared_weights=weights_TS, num_tokens=num_tokens,
           num_experts=router.num_experts, sequence_length=length, limit=limit, last_limit=last_limit,
           scaling_factor=router.scaling_factor, PRIORITY=capacity.priority, BLOCK_T=block_t, OTHERS=others,
           **slot_arguments(scores_TK, shared_TS, weight_scale_E, router))
    return kept_TK, weights_TK, weights_TS


def slot_arguments(scores_TK: torch.Tensor, shared_TS: torch.Tensor, weight_scale_E: torch.Tensor | None,
                   router: Router) -> dict[str, object]:
    """What of a launch the weighting of slots needs, forward and backward."""
    top_k, num_shared = scores_TK.shape[1], shared_TS.shape[1]
    return {"TOP_K": top_k, "SLOTS": triton.next_power_of_2(top_k), "num_shared": num_shared,
            "SHARED": triton.next_power_of_2(max(num_shared, 1)), "HAS_SHARED": num_shared > 0,
            **weighting_arguments(scores_TK, weight_scale_E, router)}
