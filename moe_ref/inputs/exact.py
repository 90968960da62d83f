"""Inputs whose every partial sum is exact, so that all right implementations agree to the bit; see contract/exact.py.

Tokens are -1 or 1. Channels come in pairs half the hidden axis apart, equal up to a sign, on which a weight row has
opposite integers: they cancel, but any part of the axis that is left out, swapped or read twice shows in every row.
What remains of a row is the constant channel 0 and one further channel. Channels and columns that rows take are spread
evenly, so that each is taken where there are rows enough.
"""

import numpy as np
import torch

from moe_ref.contract.case import Problem
from moe_ref.contract.case_id import format_problem
from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.exact import SLOT_WEIGHTS, UNIT, down_terms
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MLP
from moe_ref.contract.vocabulary import Pattern
from moe_ref.contract.weights import ExpertWeights
from moe_ref.inputs.philox import random_integers, random_words

_NOISE_BITS = 3
"""Weights that cancel are in [-4, 4)."""


def exact_tokens(problem: Problem) -> torch.Tensor:
    """x_TH of -1 and 1, the first channel 1."""
    name, (num_tokens, hidden) = format_problem(problem), (problem.num_tokens, problem.spec.hidden_size)
    x_TH = _signs(name, "x", 0, num_tokens * hidden).reshape(num_tokens, hidden)
    x_TH[:, 0] = 1.0
    half = (hidden - 1) // 2
    x_TH[:, 1 + half:1 + 2 * half] = x_TH[:, 1:1 + half] * _pair_signs(name, half)
    return x_TH.to(TORCH_DTYPES[problem.dtype])


def exact_residual(problem: Problem) -> torch.Tensor:
    """residual_TH: UNIT / 2 or UNIT, with a sign."""
    name, shape = format_problem(problem), (problem.num_tokens, problem.spec.hidden_size)
    count = shape[0] * shape[1]
    larger = torch.from_numpy(random_integers(name, "residual_size", 0, count, 1)).to(torch.float32) + 2.0
    return (_signs(name, "residual", 0, count) * larger * (UNIT / 2)).reshape(shape).to(TORCH_DTYPES[problem.dtype])


def exact_routing(problem: Problem) -> Routing | None:
    """Every expert as far as there are slots enough, and weights that differ from slot to slot; None if dense.

    With holes, every fourth slot names no expert: -1, one past the last, or one whose lower 32 bits name the second.
    """
    router, num_tokens, name = problem.spec.router, problem.num_tokens, format_problem(problem)
    if router is None:
        return None
    experts, top_k = router.num_experts, router.top_k
    words_TE = random_words(name, "ids", 0, num_tokens * experts).reshape(num_tokens, experts)
    ids_TK = np.argsort(words_TE, axis=1, kind="stable")[:, :top_k]
    # The first tokens take the experts one after the other.
    covering = min(num_tokens, -(-experts // top_k))
    in_turn = np.arange(covering * top_k).reshape(covering, top_k) % experts
    ids_TK[:covering] = _permutation(name, "experts", 0, experts)[in_turn]
    place_TK = torch.arange(num_tokens)[:, None] + torch.arange(top_k)
    weights_TK = torch.tensor(SLOT_WEIGHTS, dtype=torch.float32)[place_TK % len(SLOT_WEIGHTS)]
    ids_TK = ids_TK.astype(np.int64)
    if problem.pattern is Pattern.HOLES:
        for first, (step, missing) in {3: (4, -1), 7: (16, problem.spec.num_choices), 11: (16, 2**32 + 1)}.items():
            ids_TK.reshape(-1)[first::step] = missing
    return Routing(torch.from_numpy(ids_TK), weights_TK)


def exact_expert(problem: Problem, prefix: str, mlp: MLP, intermediate_size: int, index: int) -> ExpertWeights:
    """w13_GIH and w2_HI of one expert."""
    name, spec = format_problem(problem), problem.spec
    rows, hidden = mlp.num_projections * intermediate_size, spec.hidden_size
    w13_NH, half = torch.zeros(rows, hidden), (hidden - 1) // 2
    noise = random_integers(name, prefix + "w13", index, rows * half, _NOISE_BITS).reshape(rows, half)
    noise_NP = torch.from_numpy(noise).to(torch.float32)
    w13_NH[:, 1:1 + half] = noise_NP
    w13_NH[:, 1 + half:1 + 2 * half] = -noise_NP * _pair_signs(name, half)
    # 3/2 c with the constant channel and 1/2 c with another one make a gate of c or 2 c.
    gate = 8.0 if mlp.activation == "relu_squared" else float(UNIT)
    w13_NH[:intermediate_size, 0] = 1.5 * gate
    step_N = torch.ones(rows)
    step_N[:intermediate_size] = gate / 2
    [channel_N] = 1 + _spread(name, prefix + "channels", index, rows, max(1, hidden - 1))
    w13_NH[torch.arange(rows), channel_N.clamp(max=hidden - 1)] += step_N * _signs(name, prefix + "steps", index, rows)
    w2_HI, terms = torch.zeros(hidden, intermediate_size), down_terms(spec, problem.residual)
    sign_NH = _signs(name, prefix + "w2", index, terms * hidden).reshape(terms, hidden)
    for column_H, sign_H in zip(_spread(name, prefix + "columns", index, hidden, intermediate_size, terms), sign_NH,
                                strict=True):
        w2_HI[torch.arange(hidden), column_H] = sign_H
    dtype = TORCH_DTYPES[problem.dtype]
    return ExpertWeights(w13_NH.unflatten(0, (-1, intermediate_size)).to(dtype), w2_HI.to(dtype))


def _signs(name: str, tensor: str, index: int, count: int) -> torch.Tensor:
    return torch.from_numpy(random_integers(name, tensor, index, count, 1)).to(torch.float32) * 2.0 + 1.0


def _pair_signs(name: str, half: int) -> torch.Tensor:
    return _signs(name, "pairs", 0, half)


def _permutation(name: str, tensor: str, index: int, count: int) -> np.ndarray:
    return np.argsort(random_words(name, tensor, index, count), kind="stable")


def _spread(name: str, tensor: str, index: int, rows: int, size: int, terms: int = 1) -> torch.Tensor:
    """Numbers below `size`, as evenly spread as so many can be, (terms, rows); each term in a part of its own."""
    even = (np.arange(rows * terms) * size // (rows * terms)).reshape(terms, rows)
    return torch.from_numpy(np.stack([part[_permutation(name, tensor, index * terms + term, rows)]
                                      for term, part in enumerate(even)]))
