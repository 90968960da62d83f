"""Distributions of tokens and weights beyond those that a case id names, made of the generated ones."""

from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property

import torch

from moe_ref.contract.case import Problem
from moe_ref.contract.case_id import format_problem
from moe_ref.contract.vocabulary import Data
from moe_ref.contract.weights import ExpertWeights
from moe_ref.inputs.build import GeneratedWeights, Inputs, build_inputs, inverse_root
from moe_ref.inputs.philox import random_integers, random_words

SMALL_TOKENS = 2.0**-4
"""Makes a deviation of 0.08 of the generated tokens' 1.3, and of weights without their part of the fan-in."""
MOST_DOUBLINGS = 4
"""A heavy-tailed channel is up to 16 times larger, and an outlier 64 times besides."""


class StudyData(StrEnum):
    """What is done to generated tokens and weights.

    `unit`: nothing. `small`: all of a deviation near 0.1, however wide the layer. `heavy`: data outlier, and every
    channel doubled a geometric number of times. `positive`: neither tokens nor matrices of experts have a negative
    entry. `graded`: tokens, channels and rows scaled by powers of two, undone in part by the weights that meet them.
    `alike`: positive, and tokens within an eighth of 1, so that outputs are nearly equal, anywhere between powers of
    two: their roundings are alike too, and need not be uniform.
    """

    UNIT = "unit"
    SMALL = "small"
    HEAVY = "heavy"
    POSITIVE = "positive"
    GRADED = "graded"
    ALIKE = "alike"


@dataclass(frozen=True)
class StudyWeights(GeneratedWeights):
    """Generated weights, changed as the data class has it, and kept."""

    data: StudyData

    @cached_property
    def _experts(self) -> list[ExpertWeights]:
        return [self._changed(super(StudyWeights, self).expert(e)) for e in range(self.problem.spec.num_experts)]

    def expert(self, e: int) -> ExpertWeights:
        """Expert e, the same tensors at every call."""
        return self._experts[e]

    @cached_property
    def router_EH(self) -> torch.Tensor | None:
        """The router as its tokens need it."""
        router_EH = GeneratedWeights(self.problem).router_EH
        if router_EH is None:
            return None
        if self.data is StudyData.SMALL:
            return router_EH * (SMALL_TOKENS / inverse_root(router_EH.shape[1]))
        return router_EH / channel_grades(self.problem) if self.data is StudyData.GRADED else router_EH

    def _changed(self, expert: ExpertWeights) -> ExpertWeights:
        w13_GIH, w2_HI = expert.w13_GIH, expert.w2_HI
        hidden, intermediate = w2_HI.shape
        if self.data is StudyData.SMALL:
            w13_GIH = w13_GIH * (SMALL_TOKENS / inverse_root(hidden))
            w2_HI = w2_HI * (SMALL_TOKENS / inverse_root(intermediate))
        elif self.data in (StudyData.POSITIVE, StudyData.ALIKE):
            w13_GIH = w13_GIH.abs() * (2 * inverse_root(hidden))
            w2_HI = w2_HI.abs() * (2 * inverse_root(intermediate))
            if self.data is StudyData.ALIKE:
                w2_HI = w2_HI.float() * _place(self.problem)
        elif self.data is StudyData.GRADED:
            rows_I = _grades(self.problem, "rows", intermediate)
            falling_H = torch.exp2(-(torch.arange(hidden) % 4).float())
            w13_GIH = w13_GIH / channel_grades(self.problem) * (rows_I[:, None] / 4)
            w2_HI = w2_HI * falling_H[:, None] * (rows_I / 4)
        return expert._replace(w13_GIH=w13_GIH.to(expert.w13_GIH.dtype), w2_HI=w2_HI.to(expert.w2_HI.dtype))


def channel_grades(problem: Problem) -> torch.Tensor:
    """What channels of graded tokens are multiplied with, (H,) fp32: powers of two from 1/16 to 8."""
    return _grades(problem, "channels", problem.spec.hidden_size)


def _grades(problem: Problem, name: str, count: int) -> torch.Tensor:
    exponents = random_integers(format_problem(problem), f"grades of {name}", 0, count, 3)
    return torch.exp2(torch.from_numpy(exponents).float())


def _place(problem: Problem) -> float:
    """From 1 to 31/16, one number of a problem."""
    return 1.5 + int(random_integers(format_problem(problem), "place", 0, 1, 4)[0]) / 16


def _doublings(problem: Problem) -> torch.Tensor:
    """Powers of two with a geometric number of doublings, (H,) fp32: the trailing zeros of random words."""
    words = random_words(format_problem(problem), "doublings", 0, problem.spec.hidden_size)
    zeros = [min(MOST_DOUBLINGS, (int(word) & -int(word)).bit_length() - 1) for word in words]
    return torch.exp2(torch.tensor(zeros).float())


def study_inputs(problem: Problem, data: StudyData) -> Inputs:
    """Inputs of a problem of unit data with its tokens and weights changed, every number one of the problem's dtype."""
    base = replace(problem, data=Data.OUTLIER) if data is StudyData.HEAVY else problem
    inputs = build_inputs(base)
    x_TH = inputs.x_TH
    if data is StudyData.SMALL:
        x_TH = x_TH * SMALL_TOKENS
    elif data is StudyData.HEAVY:
        x_TH = x_TH * _doublings(problem)
    elif data is StudyData.POSITIVE:
        x_TH = x_TH.abs()
    elif data is StudyData.ALIKE:
        x_TH = 1 + x_TH.float() / 32
    elif data is StudyData.GRADED:
        x_TH = x_TH * channel_grades(problem) * torch.exp2(-(torch.arange(len(x_TH)) % 5).float())[:, None]
    return replace(inputs, x_TH=x_TH.to(inputs.x_TH.dtype), weights=StudyWeights(base, data))
