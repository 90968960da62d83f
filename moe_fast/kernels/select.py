"""The selection of experts with their weights."""

import torch
import triton
import triton.language as tl

from moe_fast.kernels.scores import capped, score_of
from moe_fast.kernels.weigh import divisor_of
from moe_fast.launch import launch
from moe_ref.contract.spec import Router

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

ELEMENTS_PER_WARP = 256
"""Logits that one warp holds, eight to a thread."""


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
    for g in range(NUM_GROUPS):
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
    for _ in range(GROUPS_KEPT):
        chosen = best(group_score, left, group, GROUPS)
        left = left & (group[None, :] != chosen[:, None])
        kept = kept | (in_range & ((expert // group_size)[None, :] == chosen[:, None]))
    return kept


@triton.jit
def select_rows(logit, t, shared_logits, selection_bias, weight_scale, ids, weights, shared_weights, num_tokens,
                num_experts, num_shared, group_size, stride_shared_T, stride_shared_S, stride_scale_E, logit_scale,
                logit_softcap, epsilon, scaling_factor, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
                EXPERTS: tl.constexpr, SHARED: tl.constexpr, SCORE: tl.constexpr, SOFTCAP: tl.constexpr,
                BIAS_ON: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, GROUPS_KEPT: tl.constexpr,
                TOP2_SUM: tl.constexpr, FILL_ZERO: tl.constexpr, RENORMALIZE: tl.constexpr, CLAMP: tl.constexpr,
                HAS_SCALE: tl.constexpr, PER_EXPERT: tl.constexpr, HAS_SHARED: tl.constexpr, BLOCK_T: tl.constexpr):
    """From complete logits of tokens t to ids and weights of their TOP_K best experts and weights of the shared ones.

    All in fp32; ties go to the lower id.
    """
    wide_t = t.to(tl.int64)
    in_tokens = t < num_tokens
    expert = tl.arange(0, EXPERTS)
    slot = tl.arange(0, SLOTS)
    in_range = in_tokens[:, None] & (expert < num_experts)[None, :]
    value = capped(logit, logit_scale, logit_softcap, SOFTCAP)
    score = score_of(value, in_range, in_tokens, SCORE)
    # All scores grow with the logit, so the exact logit decides wherever nothing is added to the score.
    selection = logit
    if BIAS_ON != "none":
        bias = tl.load(selection_bias + expert, mask=expert < num_experts, other=0.0).to(tl.float32)
        if BIAS_ON == "logit":
            selection = value + bias[None, :]
        else:
            selection = score + bias[None, :]
    candidates = in_range
    if NUM_GROUPS > 1:
        if BIAS_ON == "none":
            selection = score
        kept = keep_groups(selection, in_range, expert, group_size, EXPERTS, NUM_GROUPS, GROUPS, GROUPS_KEPT, TOP2_SUM,
                           BLOCK_T)
        if FILL_ZERO:
            selection = tl.where(kept, selection, 0.0)
        else:
            candidates = kept
    weight = tl.zeros((BLOCK_T, SLOTS), tl.float32)
    scale = tl.zeros((BLOCK_T, SLOTS), tl.float32) + scaling_factor
    for k in range(TOP_K):
        chosen = best(selection, candidates, expert, EXPERTS)
        candidates = candidates & (expert[None, :] != chosen[:, None])
        found = tl.sum(tl.where(expert[None, :] == chosen[:, None], score, 0.0), axis=1)
        weight = tl.where(slot[None, :] == k, found[:, None], weight)
        tl.store(ids + wide_t * TOP_K + k, chosen.to(tl.int32), mask=in_tokens)
        if HAS_SCALE:
            learned = tl.load(weight_scale + chosen * stride_scale_E, mask=in_tokens, other=1.0).to(tl.float32)
            scale = tl.where(slot[None, :] == k, scale * learned[:, None], scale)
    shared = weight
    column = tl.arange(0, SHARED)
    in_shared = in_tokens[:, None] & (column < num_shared)[None, :]
    if HAS_SHARED:
        shared_logit = tl.load(shared_logits + wide_t[:, None] * stride_shared_T + column[None, :] * stride_shared_S,
                               mask=in_shared, other=0.0)
        shared_value = capped(shared_logit, logit_scale, logit_softcap, SOFTCAP)
        shared = score_of(shared_value, in_shared, in_tokens, SCORE)
    if RENORMALIZE:
        divisor = divisor_of(weight, shared, epsilon, CLAMP, HAS_SHARED)[:, None]
        weight = weight / divisor
        shared = shared / divisor
    tl.store(weights + wide_t[:, None] * TOP_K + slot[None, :], weight * scale,
             mask=in_tokens[:, None] & (slot < TOP_K)[None, :])
    if HAS_SHARED:
        shared *= scaling_factor
        if HAS_SCALE and not PER_EXPERT:
            shared *= tl.load(weight_scale).to(tl.float32)
        tl.store(shared_weights + wide_t[:, None] * num_shared + column[None, :], shared, mask=in_shared)


@triton.jit
def select_kernel(logits, sums, shared_logits, selection_bias, weight_scale, ids, weights, shared_weights, num_tokens,
                  num_experts, num_shared, group_size, stride_logits_P, stride_logits_T, stride_logits_E,
                  stride_shared_T, stride_shared_S, stride_scale_E, logit_scale, logit_softcap, epsilon,
                  scaling_factor, PARTS: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
                  EXPERTS: tl.constexpr, SHARED: tl.constexpr, SCORE: tl.constexpr, SOFTCAP: tl.constexpr,
                  BIAS_ON: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, GROUPS_KEPT: tl.constexpr,
                  TOP2_SUM: tl.constexpr, FILL_ZERO: tl.constexpr, RENORMALIZE: tl.constexpr, CLAMP: tl.constexpr,
                  HAS_SCALE: tl.constexpr, PER_EXPERT: tl.constexpr, HAS_SHARED: tl.constexpr, BLOCK_T: tl.constexpr):
    """The selection by logits in PARTS, which are added up in order; where there are several their sums are kept."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, EXPERTS)
    wide_t = t.to(tl.int64)[:, None]
    in_range = (t < num_tokens)[:, None] & (expert < num_experts)[None, :]
    logit_at = logits + wide_t * stride_logits_T + expert.to(tl.int64)[None, :] * stride_logits_E
    logit = tl.load(logit_at, mask=in_range, other=-float("inf"))
    for _ in tl.static_range(1, PARTS):
        logit_at += stride_logits_P
        logit += tl.load(logit_at, mask=in_range, other=0.0)
    if PARTS > 1:
        tl.store(sums + wide_t * num_experts + expert[None, :], logit, mask=in_range)
    select_rows(logit, t, shared_logits, selection_bias, weight_scale, ids, weights, shared_weights, num_tokens,
                num_experts, num_shared, group_size, stride_shared_T, stride_shared_S, stride_scale_E, logit_scale,
                logit_softcap, epsilon, scaling_factor, TOP_K, SLOTS, EXPERTS, SHARED, SCORE, SOFTCAP, BIAS_ON,
                NUM_GROUPS, GROUPS, GROUPS_KEPT, TOP2_SUM, FILL_ZERO, RENORMALIZE, CLAMP, HAS_SCALE, PER_EXPERT,
                HAS_SHARED, BLOCK_T)


def select(logits_PTE: torch.Tensor, shared_logits_TS: torch.Tensor | None, selection_bias_E: torch.Tensor | None,
           weight_scale_E: torch.Tensor | None, router: Router) -> Four:
    """ids_TK (int32), weights_TK and shared_TS (fp32), without any capacity, and logits_TE, what the parts add up to.

    A row with NaN logits gets NaN weights.
    """
    (num_parts, num_tokens, num_experts), device = logits_PTE.shape, logits_PTE.device
    logits_TE = logits_PTE[0]
    if num_parts > 1:
        logits_TE = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=device)
    chosen, arguments = select_arguments(logits_PTE[0], shared_logits_TS, selection_bias_E, weight_scale_E, router)
    # One warp finds the best expert of its tokens without a barrier, and there are dozens of searches, one by one.
    block_t = 32 if device.type == "cpu" else max(1, ELEMENTS_PER_WARP // triton.next_power_of_2(num_experts))
    launch(select_kernel, (triton.cdiv(num_tokens, block_t),), device, **arguments | {"logits": logits_PTE},
           sums=logits_TE, stride_logits_P=logits_PTE.stride(0), PARTS=num_parts, BLOCK_T=block_t, num_warps=1)
    return *chosen, logits_TE


def select_arguments(logits_TE: torch.Tensor, shared_logits_TS: torch.Tensor | None,
                     selection_bias_E: torch.Tensor | None, weight_scale_E: torch.Tensor | None,
                     router: Router) -> tuple[Three, dict[str, object]]:
    """ids_TK, weights_TK and shared_TS, not yet written, and what of a launch select_rows needs to write them."""
    (num_tokens, num_experts), device = logits_TE.shape, logits_TE.device
    num_shared = 0 if shared_logits_TS is None else shared_logits_TS.shape[1]
    ids_TK = torch.empty(num_tokens, router.top_k, dtype=torch.int32, device=device)
    weights_TK = torch.empty(num_tokens, router.top_k, dtype=torch.float32, device=device)
    shared_TS = torch.empty(num_tokens, num_shared, dtype=torch.float32, device=device)
    return (ids_TK, weights_TK, shared_TS), {
        "selection_bias": logits_TE if selection_bias_E is None else selection_bias_E.contiguous(), "ids": ids_TK,
        "weights": weights_TK, "shared_weights": shared_TS, "num_tokens": num_tokens, "num_experts": num_experts,
        "group_size": num_experts // router.num_groups, "scaling_factor": router.scaling_factor,
        "TOP_K": router.top_k, "SLOTS": triton.next_power_of_2(router.top_k),
        "BIAS_ON": router.selection_bias or "none", "NUM_GROUPS": router.num_groups,
        "GROUPS": triton.next_power_of_2(router.num_groups), "GROUPS_KEPT": router.num_groups_kept,
        "TOP2_SUM": router.group_score == "top2_sum", "FILL_ZERO": router.group_fill == "zero",
        **score_arguments(logits_TE, shared_logits_TS, weight_scale_E, router)}


def score_arguments(logits_TE: torch.Tensor, shared_logits_TS: torch.Tensor | None,
                    weight_scale_E: torch.Tensor | None, router: Router) -> dict[str, object]:
    """What of a launch the scores and their weighting need, forward and backward."""
    shared = logits_TE[:, :0] if shared_logits_TS is None else shared_logits_TS
    return {"logits": logits_TE, "stride_logits_T": logits_TE.stride(0), "stride_logits_E": logits_TE.stride(1),
            "shared_logits": shared, "num_shared": shared.shape[1], "stride_shared_T": shared.stride(0),
            "stride_shared_S": shared.stride(1), "SHARED": triton.next_power_of_2(max(shared.shape[1], 1)),
            "HAS_SHARED": shared_logits_TS is not None, "SCORE": router.score, "logit_scale": router.logit_scale,
            "logit_softcap": router.logit_softcap, "SOFTCAP": router.logit_softcap > 0.0,
            "EXPERTS": triton.next_power_of_2(logits_TE.shape[1]),
            **weighting_arguments(logits_TE, weight_scale_E, router)}


def weighting_arguments(other: torch.Tensor, weight_scale_E: torch.Tensor | None, router: Router) -> dict[str, object]:
    """What of a launch renormalisation and learned scale need; `other` stands in where there is no scale."""
    scale, per_expert = other if weight_scale_E is None else weight_scale_E, router.learned_scale == "expert"
    return {"weight_scale": scale, "stride_scale_E": scale.stride(0) if per_expert else 0,
            "HAS_SCALE": weight_scale_E is not None, "PER_EXPERT": per_expert,
            "epsilon": router.renormalize_epsilon, "RENORMALIZE": router.renormalize,
            "CLAMP": router.epsilon_rule == "clamp"}
