"""The selection of experts with their weights."""

import torch
import triton
import triton.language as tl

from moe_fast.launch import launch


@triton.jit
def best(values, candidates, index, NONE: tl.constexpr):
    """Lowest index of the largest candidate per row; NaN counts as the largest, as in torch.topk."""
    ranked = tl.where(values == values, values, float("inf"))
    largest = tl.max(tl.where(candidates, ranked, -float("inf")), axis=1)
    return tl.min(tl.where(candidates & (ranked == largest[:, None]), index[None, :], NONE), axis=1)


@triton.jit
def keep_groups(selection, in_range, expert, group_size, EXPERTS: tl.constexpr, NUM_GROUPS: tl.constexpr,
                GROUPS: tl.constexpr, GROUPS_KEPT: tl.constexpr, TOP2_SUM: tl.constexpr, BLOCK_T: tl.constexpr):
    """Which experts sit in one of the best GROUPS_KEPT groups; ties between groups go to the lower group."""
    group = tl.arange(0, GROUPS)
    group_score = tl.full((BLOCK_T, GROUPS), -float("inf"), tl.float32)
    for g in tl.static_range(NUM_GROUPS):
        member = in_range & ((expert // group_size) == g)[None, :]
        first = best(selection, member, expert, EXPERTS)
        is_first = expert[None, :] == first[:, None]
        value = tl.sum(tl.where(is_first, selection, 0.0), axis=1)
        if TOP2_SUM:
            second = best(selection, member & (expert[None, :] != first[:, None]), expert, EXPERTS)
            value += tl.sum(tl.where(expert[None, :] == second[:, None], selection, 0.0), axis=1)
        group_score = tl.where(group[None, :] == g, value[:, None], group_score)
    left = (group < NUM_GROUPS)[None, :] & (tl.zeros((BLOCK_T, GROUPS), tl.int32) == 0)
    kept = in_range & (expert < 0)[None, :]
    for _ in tl.static_range(GROUPS_KEPT):
        chosen = best(group_score, left, group, GROUPS)
        left = left & (group[None, :] != chosen[:, None])
        kept = kept | (in_range & ((expert // group_size)[None, :] == chosen[:, None]))
    return kept


@triton.jit
def select_kernel(logits, selection_bias, ids, weights, num_tokens, num_experts, group_size, stride_logits_T,
                  stride_logits_E, epsilon, scaling_factor, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
                  EXPERTS: tl.constexpr, SOFTMAX: tl.constexpr, HAS_BIAS: tl.constexpr, NUM_GROUPS: tl.constexpr,
                  GROUPS: tl.constexpr, GROUPS_KEPT: tl.constexpr, TOP2_SUM: tl.constexpr,
                  RENORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr):
    """ids and weights of the TOP_K best experts per token, all in fp32; ties go to the lower id."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, EXPERTS)
    slot = tl.arange(0, SLOTS)
    in_range = (t < num_tokens)[:, None] & (expert < num_experts)[None, :]
    logit = tl.load(logits + t.to(tl.int64)[:, None] * stride_logits_T + expert.to(tl.int64)[None, :] * stride_logits_E,
                    mask=in_range, other=-float("inf")).to(tl.float32)
    if SOFTMAX:
        safe = tl.where((t < num_tokens)[:, None], logit, 0.0)
        power = tl.exp(safe - tl.max(safe, axis=1)[:, None])
        score = power / tl.sum(power, axis=1)[:, None]
    else:
        score = tl.sigmoid(logit)
    # Both scores grow with the logit, so the exact logit decides wherever nothing is added to the score.
    selection = logit
    if HAS_BIAS:
        selection = score + tl.load(selection_bias + expert, mask=expert < num_experts, other=0.0)[None, :]
    candidates = in_range
    if NUM_GROUPS > 1:
        if not HAS_BIAS:
            selection = score
        candidates = keep_groups(selection, in_range, expert, group_size, EXPERTS, NUM_GROUPS, GROUPS, GROUPS_KEPT,
                                 TOP2_SUM, BLOCK_T)
    weight = tl.zeros((BLOCK_T, SLOTS), tl.float32)
    for k in tl.static_range(TOP_K):
        chosen = best(selection, candidates, expert, EXPERTS)
        candidates = candidates & (expert[None, :] != chosen[:, None])
        value = tl.sum(tl.where(expert[None, :] == chosen[:, None], score, 0.0), axis=1)
        weight = tl.where(slot[None, :] == k, value[:, None], weight)
        tl.store(ids + t.to(tl.int64) * TOP_K + k, chosen.to(tl.int32), mask=t < num_tokens)
    if RENORMALIZE:
        weight = weight / (tl.sum(weight, axis=1)[:, None] + epsilon)
    tl.store(weights + t.to(tl.int64)[:, None] * TOP_K + slot[None, :], weight * scaling_factor,
             mask=(t < num_tokens)[:, None] & (slot < TOP_K)[None, :])


def select(logits_TE: torch.Tensor, selection_bias_E: torch.Tensor | None, top_k: int, score: str, num_groups: int,
           num_groups_kept: int, group_score: str, renormalize: bool, renormalize_epsilon: float,
           scaling_factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """ids_TK (int32) and weights_TK (fp32); the options as in Router; a row with NaN logits gets NaN weights."""
    (num_tokens, num_experts), device = logits_TE.shape, logits_TE.device
    ids_TK = torch.empty(num_tokens, top_k, dtype=torch.int32, device=device)
    weights_TK = torch.empty(num_tokens, top_k, dtype=torch.float32, device=device)
    block_t = 32 if device.type == "cpu" else 4
    launch(select_kernel, (triton.cdiv(num_tokens, block_t),), device, logits=logits_TE,
           selection_bias=logits_TE if selection_bias_E is None else selection_bias_E.contiguous(), ids=ids_TK,
           weights=weights_TK, num_tokens=num_tokens, num_experts=num_experts, group_size=num_experts // num_groups,
           stride_logits_T=logits_TE.stride(0), stride_logits_E=logits_TE.stride(1), epsilon=renormalize_epsilon,
           scaling_factor=scaling_factor, TOP_K=top_k, SLOTS=triton.next_power_of_2(top_k),
           EXPERTS=triton.next_power_of_2(num_experts), SOFTMAX=score == "softmax",
           HAS_BIAS=selection_bias_E is not None, NUM_GROUPS=num_groups, GROUPS=triton.next_power_of_2(num_groups),
           GROUPS_KEPT=num_groups_kept, TOP2_SUM=group_score == "top2_sum", RENORMALIZE=renormalize,
           BLOCK_T=block_t)
    return ids_TK, weights_TK
