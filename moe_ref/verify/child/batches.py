"""The same tokens in other batches, permuted and beside further ones, in which a promise may keep rows to the bit."""

import torch

from moe_ref.contract.case import Problem
from moe_ref.contract.case_id import format_problem
from moe_ref.inputs.philox import random_words

ADDED = (1, 17)
"""Less than any tile, and more than the smallest."""


def other_batches(problem: Problem) -> dict[str, torch.Tensor]:
    """By name, the token of the problem that each token of another batch is; added ones are copies of some of them."""
    num_tokens = problem.num_tokens
    token_T = torch.arange(num_tokens)
    words = random_words(format_problem(problem), "permuted", 0, num_tokens)
    order_T = torch.tensor(sorted(range(num_tokens), key=lambda token: int(words[token])), dtype=torch.int64)
    batches = {"tokens are permuted": order_T}
    for count in ADDED:
        more = (5 * torch.arange(count) + 3) % num_tokens
        batches[f"{count} token{'s are' if count > 1 else ' is'} added"] = torch.cat([token_T, more])
    return batches


def same_rows(first_TH: torch.Tensor, other_TH: torch.Tensor, token_T: torch.Tensor) -> bool:
    """Whether row t of `other_TH` has the bits of row token_T[t] of `first_TH`; one NaN is like another."""
    wanted_TH = first_TH[token_T]
    if wanted_TH.shape != other_TH.shape or wanted_TH.dtype != other_TH.dtype:
        return False
    lanes = {2: torch.int16, 4: torch.int32, 8: torch.int64}[other_TH.element_size()]
    same_TH = wanted_TH.contiguous().view(lanes) == other_TH.contiguous().view(lanes)
    return bool((same_TH | (torch.isnan(wanted_TH) & torch.isnan(other_TH))).all())
