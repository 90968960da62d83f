"""Injected logits that force a routing pattern; each value is an fp32 number with a short significand."""

import torch

from moe_ref.contract.case import Problem
from moe_ref.contract.case_id import format_problem
from moe_ref.contract.vocabulary import Pattern
from moe_ref.inputs.philox import random_integers

TOWER = 32.0
"""Height that makes a softmax weight 1 in every format here: exp(-32) is below the last bit of bf16 and fp16."""


def empty_experts(num_experts: int) -> tuple[int, int]:
    """The experts that get no token under pattern `empty`: one in the middle, and the last."""
    return num_experts // 2, num_experts - 1


def favourite_expert(num_experts: int) -> int:
    """The first choice of every token under pattern `allone`."""
    return num_experts // 3


def pattern_logits(problem: Problem) -> torch.Tensor | None:
    """logits_TE in fp32 for the problem's pattern, or None where the router computes its own."""
    if problem.pattern is Pattern.UNIFORM:
        return None
    tokens, experts = problem.num_tokens, problem.spec.num_choices
    bits = 2 if problem.pattern is Pattern.TIES else 13
    integers = random_integers(format_problem(problem), "logits", 0, tokens * experts, bits)
    logits_TE = torch.from_numpy(integers).to(torch.float32).reshape(tokens, experts) * 2.0 ** (2 - bits)
    if problem.pattern is Pattern.ZIPF:
        logits_TE -= 2.0 * torch.tensor([float((e + 1).bit_length()) for e in range(experts)])
    elif problem.pattern is Pattern.ONE_HOT:
        token_T = torch.arange(tokens)
        logits_TE[token_T, (5 * token_T + 1) % experts] += TOWER
    elif problem.pattern is Pattern.EMPTY:
        logits_TE[:, list(empty_experts(experts))] -= TOWER
    elif problem.pattern is Pattern.ALL_TO_ONE:
        logits_TE[:, favourite_expert(experts)] += TOWER
    return logits_TE


def pattern_selection_bias(problem: Problem, bias_E: torch.Tensor) -> torch.Tensor:
    """The selection bias, moved where it would undo the pattern; quantised under `ties` so that ties stay exact."""
    bias_E = bias_E.clone()
    if problem.pattern is Pattern.EMPTY:
        bias_E[list(empty_experts(len(bias_E)))] = -4.0
    elif problem.pattern is Pattern.ALL_TO_ONE:
        bias_E[favourite_expert(len(bias_E))] = 4.0
    elif problem.pattern is Pattern.TIES:
        bias_E = (bias_E * 4).round() / 4
    return bias_E
