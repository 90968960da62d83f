"""Injected logits that force a routing pattern; each value is an fp32 number with a short significand."""

import torch

from moe_ref.contract.case import Problem
from moe_ref.contract.case_id import format_problem
from moe_ref.contract.spec import Router
from moe_ref.contract.vocabulary import Pattern
from moe_ref.inputs.philox import random_integers

NEAR_STEP, NEAR_BITS = 2.0**-13, 3
"""Differences that fp32 scores resolve 2^10 times over, and scores of 16 bits do not at all."""
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
    tied = problem.pattern in (Pattern.TIES, Pattern.NEAR)
    bits = 2 if tied else 13
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
    elif problem.pattern is Pattern.NEAR and _router(problem).selection_bias is None:
        logits_TE += _steps(problem, "near", tokens * experts).reshape(tokens, experts)
    return logits_TE


def _router(problem: Problem) -> Router:
    assert problem.spec.router is not None  # a pattern without a router is no Problem
    return problem.spec.router


def _steps(problem: Problem, name: str, count: int) -> torch.Tensor:
    """A few multiples of NEAR_STEP."""
    return torch.from_numpy(random_integers(format_problem(problem), name, 0, count, NEAR_BITS)).float() * NEAR_STEP


def pattern_selection_bias(problem: Problem, bias_E: torch.Tensor) -> torch.Tensor:
    """The selection bias, moved where it would undo the pattern; under `ties` quantised, under `near` nearly equal."""
    bias_E = bias_E.clone()
    if problem.pattern is Pattern.EMPTY:
        bias_E[list(empty_experts(len(bias_E)))] = -4.0
    elif problem.pattern is Pattern.ALL_TO_ONE:
        bias_E[favourite_expert(len(bias_E))] = 4.0
    elif problem.pattern is Pattern.TIES:
        bias_E = (bias_E * 4).round() / 4
    elif problem.pattern is Pattern.NEAR:
        bias_E = 0.25 + _steps(problem, "near_bias", len(bias_E))
    return bias_E
